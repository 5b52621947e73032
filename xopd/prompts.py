"""From corpus records to prompts: audio embeddings once per clip, and a resumable prompt order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from xopd.data.corpus import SpokenPrompt, decode_audio, log_mel
from xopd.models import SpeechLM
from xopd.models.prompting import speech_prompt, text_prompt
from xopd.types import Prompt

CLIPS_PER_BATCH = 64


def encode_prompts(
    student: SpeechLM,
    records: Sequence[SpokenPrompt],
    *,
    question: str = "",
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Prompt]:
    """Prompts of ``records``, in order; the frozen audio tower sees each clip exactly once.

    ``question`` is written text after the clip (probes). ``on_progress`` gets the clips done.
    """
    prompts: list[Prompt] = []
    student.model.eval()
    for start in range(0, len(records), CLIPS_PER_BATCH):
        batch = records[start : start + CLIPS_PER_BATCH]
        features = log_mel([decode_audio(r) for r in batch], student.feature_extractor)
        with torch.no_grad():
            embeddings = student.encode_audio(features)
        for record, audio in zip(batch, embeddings, strict=True):
            # A clone, because a view would keep the whole batch alive.
            prompts.append(_prompt(student, record, audio.float().clone(), question))
        on_progress(len(prompts))
    return prompts


def _prompt(student: SpeechLM, record: SpokenPrompt, audio: torch.Tensor, question: str) -> Prompt:
    text = f"{record.text} {question}".strip()
    return Prompt(
        id=record.id,
        task=record.task,
        text_ids=text_prompt(student.tokenizer, text),
        speech_ids=speech_prompt(student.tokenizer, student.audio_id, audio.shape[0], question),
        audio=audio,
        text=record.text,
        reference=record.answer,
    )


def prompts_of_step(prompts: Sequence[Prompt], *, step: int, count: int, seed: int) -> list[Prompt]:
    """The ``count`` prompts of step ``step`` (0-based): a fresh permutation every epoch.

    A pure function of (seed, step), so a resumed run continues the order without any state.
    """
    picked = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(prompts))
        order = _permutation(len(prompts), seed, epoch)
        picked.append(prompts[order[index]])
    return picked


_permutations: dict[tuple[int, int, int], list[int]] = {}


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    key = (size, seed, epoch)
    if key not in _permutations:
        order = list(range(size))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        _permutations.clear()  # only the current epoch is ever needed again
        _permutations[key] = order
    return _permutations[key]
