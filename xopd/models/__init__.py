"""Speech language models and text teachers behind one small class each."""

from xopd.models.speech_lm import SpeechLM, TextLM, load_student, load_teacher

__all__ = ["SpeechLM", "TextLM", "load_student", "load_teacher"]
