"""From corpus records to prompts: audio embeddings once per clip, and a resumable prompt order."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from xopd.data.corpus import SpokenPrompt, decode_audio, log_mel
from xopd.models import SpeechLM
from xopd.models.prompting import speech_prompt, text_prompt
from xopd.sharding import gathered
from xopd.types import Prompt


def encode_prompts(
    student: SpeechLM,
    records: Sequence[SpokenPrompt],
    *,
    question: str = "",
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Prompt]:
    """Prompts of ``records``, in order; the frozen audio tower sees each clip exactly once.

    A clip goes through the tower alone: beside others, its embeddings would depend in their last
    bits on which others there are. ``question`` is written text after the clip (probes).
    ``on_progress`` gets the clips done.
    """
    prompts: list[Prompt] = []
    student.model.eval()
    # Without autocast, whoever asks: log-mel features know no bf16, and a clip has one embedding.
    plain = torch.autocast(student.device.type, enabled=False)
    with torch.no_grad(), plain, gathered(student.model, student.towers()):
        for record in records:
            features = log_mel([decode_audio(record)], student.feature_extractor)
            (audio,) = student.encode_audio(features)
            # Host memory: thousands of clips would take gigabytes of a GPU.
            prompts.append(_prompt(student, record, audio.float().cpu(), question))
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


class PromptStore:
    """The prompts of a split by number: clips are encoded when they are first asked for.

    The embeddings of the clips that were used last are kept in host memory, `kept_clips` of them.
    One clip of ten seconds is 130 embeddings: about 1 MB where D is 2048.
    """

    def __init__(
        self, student: SpeechLM, records: Sequence[SpokenPrompt], *, kept_clips: int
    ) -> None:
        self._student, self._records, self._kept_clips = student, records, kept_clips
        self._encoded: OrderedDict[int, Prompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def load(self, numbers: Sequence[int]) -> list[Prompt]:
        """The prompts with their audio. All ranks call this together, each for its own numbers."""
        wanted = dict.fromkeys(numbers)
        missing = [number for number in wanted if number not in self._encoded]
        fresh = encode_prompts(self._student, [self._records[number] for number in missing])
        self._encoded.update(zip(missing, fresh, strict=True))
        for number in wanted:
            self._encoded.move_to_end(number)
        prompts = [self._encoded[number] for number in numbers]
        while len(self._encoded) > self._kept_clips:
            self._encoded.popitem(last=False)
        return prompts


def numbers_of_step(size: int, *, step: int, count: int, seed: int) -> list[int]:
    """The ``count`` prompts of step ``step`` (0-based): a fresh permutation every epoch.

    A pure function of (seed, step), so a resumed run continues the order without any state.
    """
    picked = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, size)
        picked.append(_permutation(size, seed, epoch)[index])
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
