"""The demo's student for tests of engines: its prompts, and the trainer's log-probs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xopd.config import RolloutConfig
from xopd.models import SpeechLM, load_student
from xopd.models.prompting import speech_prompt, text_prompt
from xopd.scoring import score
from xopd.types import Prompt, Rollout
from xopd.vllm.engine import Scorer
from xopd_kernels import Backend

TEXTS = ("start with seven add five", "start with nine take away three", "seven add two add one")


class Store:
    """Prompts by number, as `xopd.prompts.PromptStore` gives them: noise in place of speech."""

    def __init__(self, student: SpeechLM) -> None:
        random = np.random.default_rng(0)
        mels = int(student.feature_extractor.feature_size)
        clips = [random.normal(size=(mels, 90 + 40 * i)).astype(np.float32) for i in range(3)]
        with torch.no_grad():
            audio = student.encode_audio(clips)
        self._prompts = [
            Prompt(
                id=str(i),
                task="test",
                text_ids=text_prompt(student.tokenizer, text),
                speech_ids=speech_prompt(student.tokenizer, student.audio_id, heard.shape[0]),
                audio=heard.clone(),
                text=text,
                reference="",
            )
            for i, (text, heard) in enumerate(zip(TEXTS, audio, strict=True))
        ]

    def load(self, numbers: Sequence[int]) -> list[Prompt]:
        return [self._prompts[number] for number in numbers]


def demo_student(repository: Path) -> SpeechLM:
    """A trained student whose media and padding ids are reserved, as a run reserves them."""
    student = load_student(str(repository / "xopd/assets/demo/student"))
    student.freeze_all_but_language_model()
    rows = range(student.lm_head.weight.shape[0])
    words = set(student.tokenizer.get_vocab().values())
    reserved = (set(rows) - words) | set(student.reserved_ids)
    return replace(student, reserved_ids=tuple(sorted(reserved - {student.eos_id})))


def scorer(student: SpeechLM, temperature: float) -> Scorer:
    """The trainer's log-probs of the student."""

    def own(rows: Sequence[Rollout]) -> Sequence[Tensor]:
        (found,) = score(student, [rows], temperature=temperature, backend=Backend.REFERENCE)
        return found

    return own


def rollout_config(temperature: float, max_new_tokens: int = 12) -> RolloutConfig:
    """What an engine reads of a config."""
    return RolloutConfig(temperature=temperature, max_new_tokens=max_new_tokens)


def disturb(student: SpeechLM, seed: int, size: float = 0.02) -> None:
    """An update of every trained weight, large enough to change what is sampled."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
