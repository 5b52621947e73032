"""From corpus records to prompts, and the order in which steps take them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from xopd import prompts as prompts_module
from xopd.data.corpus import SpokenPrompt, decode_audio, log_mel
from xopd.models import SpeechLM
from xopd.models.prompting import text_prompt
from xopd.prompts import encode_prompts, prompts_of_step
from xopd.types import Modality, Prompt


def test_both_forms_hold_the_same_instruction(
    student: SpeechLM, records: list[SpokenPrompt], prompts: list[Prompt]
) -> None:
    assert [p.id for p in prompts] == [r.id for r in records]
    for prompt, record in zip(prompts, records, strict=True):
        assert (prompt.text, prompt.task) == (record.text, record.task)
        assert prompt.reference == record.answer
        assert prompt.text_ids == text_prompt(student.tokenizer, record.text)
        assert prompt.ids(Modality.TEXT) is prompt.text_ids
        assert prompt.ids(Modality.SPEECH) is prompt.speech_ids
        assert prompt.speech_ids.count(student.audio_id) == len(prompt.audio) > 0
        assert student.audio_id not in prompt.text_ids


def test_audio_is_encoded_by_the_tower_and_owns_its_memory(
    student: SpeechLM, records: list[SpokenPrompt], prompts: list[Prompt]
) -> None:
    features = log_mel([decode_audio(records[2])], student.feature_extractor)
    with torch.no_grad():
        (expected,) = student.encode_audio(features)
    torch.testing.assert_close(prompts[2].audio, expected, rtol=1e-4, atol=1e-5)
    for prompt in prompts:
        assert prompt.audio.untyped_storage().nbytes() == prompt.audio.numel() * 4
        assert not prompt.audio.requires_grad


def test_batches_of_clips_and_a_written_question(
    student: SpeechLM, records: list[SpokenPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "CLIPS_PER_BATCH", 3)
    done: list[int] = []
    found = encode_prompts(student, records[:7], question="who speaks", on_progress=done.append)
    assert done == [3, 6, 7]
    for prompt, record in zip(found, records, strict=False):
        assert prompt.text_ids == text_prompt(student.tokenizer, f"{record.text} who speaks")
        assert prompt.speech_ids[-3:-1] == tuple(student.tokenizer("who speaks").input_ids)


def test_every_epoch_takes_each_prompt_once_in_a_new_order(prompts: list[Prompt]) -> None:
    five = prompts[:5]
    # 5 prompts, 2 a step: 5 steps are 2 epochs, and the third step holds a bit of both.
    steps = [prompts_of_step(five, step=s, count=2, seed=3) for s in range(5)]
    order = [p.id for step in steps for p in step]
    first, second = order[:5], order[5:]
    assert Counter(first) == Counter(second) == Counter(p.id for p in five)
    assert first != second


def test_a_step_is_a_function_of_seed_and_step(prompts: list[Prompt]) -> None:
    def ids(step: int, seed: int) -> list[str]:
        return [p.id for p in prompts_of_step(prompts, step=step, count=6, seed=seed)]

    expected = ids(9, 1)
    ids(0, 1), ids(3, 2)
    assert ids(9, 1) == expected
    assert ids(9, 2) != expected


def test_more_prompts_a_step_than_there_are(prompts: list[Prompt]) -> None:
    picked = prompts_of_step(prompts[:2], step=0, count=5, seed=0)
    assert Counter(p.id for p in picked).most_common(1)[0][1] <= 3
    assert len(picked) == 5
