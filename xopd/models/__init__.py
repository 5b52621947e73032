"""Speech language models and text teachers behind one small class each."""

from xopd.models.speech_lm import (
    SpeechLM,
    TextLM,
    Vocabulary,
    load_student,
    load_teacher,
    load_vocabulary,
)

__all__ = [
    "SpeechLM",
    "TextLM",
    "Vocabulary",
    "load_student",
    "load_teacher",
    "load_vocabulary",
]
