"""Guards: a run that could only waste compute does not start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from xopd import guards
from xopd.data.corpus import SpokenPrompt
from xopd.guards import (
    MIN_LOGPROB_CHANGE,
    GuardError,
    check_audio_dependence,
    check_pair,
    check_prompts,
)
from xopd.models import SpeechLM, TextLM
from xopd.models.demo import build_teacher, build_tokenizer
from xopd_kernels import Backend

RESPONSE = (20, 21, 22)


class DeafLM(SpeechLM):
    """The known fault of other trainers: token ids reach the language model, audio does not."""

    def embed(self, token_ids: Tensor, audio: Sequence[Tensor]) -> Tensor:
        return super().embed(token_ids, [])


def changed_tokenizer(old: str, new: str) -> PreTrainedTokenizerFast:
    """The pair's tokenizer with one word of another spelling."""
    tokenizer = build_tokenizer()
    text = tokenizer.backend_tokenizer.to_str().replace(f'"{old}":', f'"{new}":')
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
    )


def test_a_fitting_pair_reserves_what_the_teacher_cannot_score(
    student: SpeechLM, teacher: TextLM
) -> None:
    rows, known = student.lm_head.weight.shape[0], len(student.tokenizer)
    assert rows > known
    checked = check_pair(student, teacher)
    assert set(range(known, rows)) <= set(checked.reserved_ids)
    assert set(checked.reserved_ids) == set(range(known, rows)) | set(student.reserved_ids)
    assert student.eos_id not in checked.reserved_ids


def test_another_eos_is_refused(student: SpeechLM) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "no"
    other = TextLM(build_teacher(tokenizer, 0), tokenizer)
    with pytest.raises(
        GuardError, match=rf"ends on id {student.eos_id}, teacher on {other.eos_id}"
    ):
        check_pair(student, other)


def test_another_vocabulary_is_refused(student: SpeechLM, teacher: TextLM) -> None:
    tokenizer = changed_tokenizer("seven", "sieben")
    first = student.tokenizer.convert_tokens_to_ids("seven")
    with pytest.raises(GuardError, match=rf"1 of 71 ids .*first: {first} is 'seven' and 'sieben'"):
        check_pair(student, replace(teacher, tokenizer=tokenizer))


def test_a_few_unshared_ids_are_reserved_instead(
    student: SpeechLM, teacher: TextLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "MAX_UNSHARED_SHARE", 0.02)
    other = replace(teacher, tokenizer=changed_tokenizer("seven", "sieben"))
    id_of = student.tokenizer.convert_tokens_to_ids
    reserved = check_pair(student, other).reserved_ids
    assert id_of("seven") in reserved
    assert id_of("eight") not in reserved


def test_a_teacher_of_fewer_rows_is_refused(student: SpeechLM) -> None:
    other = build_teacher(build_tokenizer(), 0)
    other.set_output_embeddings(nn.Linear(128, 40, bias=False))
    with pytest.raises(GuardError, match="31 of 71 ids"):
        check_pair(student, TextLM(other, build_tokenizer()))


def test_a_text_that_renders_to_audio_is_refused(
    student: SpeechLM, records: list[SpokenPrompt]
) -> None:
    check_prompts(student, records)
    bad = replace(records[3], text=f"{records[3].text} <audio>")
    with pytest.raises(GuardError, match=rf"{bad.id}.*audio placeholder"):
        check_prompts(student, [*records, bad])


def test_audio_reaches_the_loss(student: SpeechLM, records: list[SpokenPrompt]) -> None:
    change = check_audio_dependence(
        student, records[0], response_ids=RESPONSE, backend=Backend.REFERENCE
    )
    assert change > 10 * MIN_LOGPROB_CHANGE


def test_a_deaf_student_is_refused(student: SpeechLM, records: list[SpokenPrompt]) -> None:
    deaf = DeafLM(**{field.name: getattr(student, field.name) for field in fields(student)})
    with pytest.raises(GuardError, match="does not hear its prompts"):
        check_audio_dependence(deaf, records[0], response_ids=RESPONSE, backend=Backend.REFERENCE)


def test_a_student_of_nan_is_refused(new_student: SpeechLM, records: list[SpokenPrompt]) -> None:
    with torch.no_grad():
        new_student.lm_head.weight.fill_(torch.nan)
    with pytest.raises(GuardError, match="nan"):
        check_audio_dependence(
            new_student, records[0], response_ids=RESPONSE, backend=Backend.REFERENCE
        )
