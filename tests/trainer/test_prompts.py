"""From corpus records to prompts, and the order in which steps take them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from xopd import prompts as prompts_module
from xopd.data.corpus import SpokenPrompt, decode_audio, log_mel
from xopd.models import SpeechLM
from xopd.models.prompting import text_prompt
from xopd.prompts import PromptStore, encode_prompts, numbers_of_step
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


def test_progress_and_a_written_question(student: SpeechLM, records: list[SpokenPrompt]) -> None:
    done: list[int] = []
    found = encode_prompts(student, records[:3], question="who speaks", on_progress=done.append)
    assert done == [1, 2, 3]
    for prompt, record in zip(found, records, strict=False):
        assert prompt.text_ids == text_prompt(student.tokenizer, f"{record.text} who speaks")
        assert prompt.speech_ids[-3:-1] == tuple(student.tokenizer("who speaks").input_ids)


def test_a_store_encodes_what_is_asked_for_and_keeps_the_last(
    student: SpeechLM,
    records: list[SpokenPrompt],
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[str] = []

    def counting(lm: SpeechLM, rows: list[SpokenPrompt]) -> list[Prompt]:
        encoded.extend(row.id for row in rows)
        return encode_prompts(lm, rows)

    monkeypatch.setattr(prompts_module, "encode_prompts", counting)
    store = PromptStore(student, records, kept_clips=2)
    assert len(store) == len(records)
    found = store.load([3, 1, 3])
    assert [p.id for p in found] == [prompts[i].id for i in (3, 1, 3)]
    for prompt, i in zip(found, (3, 1, 3), strict=True):
        assert torch.equal(prompt.audio, prompts[i].audio)  # to the bit, whatever came before
    store.load([1])
    assert encoded == [records[i].id for i in (3, 1)]
    store.load([2])  # 3 was used longest ago
    store.load([1, 2])
    assert encoded == [records[i].id for i in (3, 1, 2)]
    store.load([3])
    assert encoded[-1] == records[3].id
    # More at once than are kept: all come back.
    assert [p.id for p in store.load([0, 4, 5])] == [prompts[i].id for i in (0, 4, 5)]


def test_autocast_around_does_not_change_a_clip(
    student: SpeechLM, records: list[SpokenPrompt], prompts: list[Prompt]
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = encode_prompts(student, records[:1])
    assert torch.equal(found.audio, prompts[0].audio)


def test_every_epoch_takes_each_prompt_once_in_a_new_order() -> None:
    # 5 prompts, 2 a step: 5 steps are 2 epochs, and the third step holds a bit of both.
    steps = [numbers_of_step(5, step=s, count=2, seed=3) for s in range(5)]
    order = [number for step in steps for number in step]
    first, second = order[:5], order[5:]
    assert sorted(first) == sorted(second) == list(range(5))
    assert first != second


def test_a_step_is_a_function_of_seed_and_step() -> None:
    def numbers(step: int, seed: int) -> list[int]:
        return numbers_of_step(24, step=step, count=6, seed=seed)

    expected = numbers(9, 1)
    numbers(0, 1), numbers(3, 2)
    assert numbers(9, 1) == expected
    assert numbers(9, 2) != expected


def test_more_prompts_a_step_than_there_are() -> None:
    picked = numbers_of_step(2, step=0, count=5, seed=0)
    assert Counter(picked).most_common(1)[0][1] <= 3
    assert len(picked) == 5
