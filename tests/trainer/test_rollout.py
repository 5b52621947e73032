"""Rollouts and scoring: what was sampled is what is scored, whatever the batch and its padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from xopd.models import SpeechLM, TextLM
from xopd.models.demo import build_teacher
from xopd.rollout import generate, sample_rollouts
from xopd.scoring import IGNORE, layout, score
from xopd.types import Modality, Prompt, Rollout
from xopd_kernels import Backend

TEXT, SPEECH = Modality.TEXT, Modality.SPEECH
MakeRollouts = Callable[[list[Modality]], list[Rollout]]


def logits_of(lm: SpeechLM | TextLM, ids: tuple[int, ...], audio: list[Tensor]) -> Tensor:
    """Logits [T, V] of one row by a plain forward pass."""
    row = torch.tensor([ids])
    embedded = lm.embed(row, audio) if isinstance(lm, SpeechLM) else lm.embed(row)
    position = torch.arange(len(ids))[None]
    with torch.no_grad():
        output = lm.model(inputs_embeds=embedded, position_ids=position, use_cache=False)
    logits: Tensor = output.logits[0]
    return logits


def biased(student: SpeechLM, towards: int) -> SpeechLM:
    """The student with an lm_head bias that makes one token certain."""
    head = nn.Linear(128, student.lm_head.weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(student.lm_head.weight)
        head.bias.zero_()
        head.bias[towards] = 100.0
    student.model.set_output_embeddings(head)
    return student


def own_logprob(logits: Tensor, row: Rollout, prompt_length: int, temperature: float) -> Tensor:
    table = (logits[prompt_length - 1 : -1].double() / temperature).log_softmax(-1)
    return table.gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]


@pytest.mark.parametrize("modality", Modality)
def test_greedy_generation_is_the_argmax_of_full_passes(
    student: SpeechLM, prompts: list[Prompt], modality: Modality
) -> None:
    picked = prompts[:4]
    audio = [p.audio for p in picked] if modality is SPEECH else []
    rows = [p.ids(modality) for p in picked]
    assert len({len(row) for row in rows}) > 1  # so that the batch is padded
    found = generate(student, rows, audio, max_new_tokens=6, temperature=0.0)
    for i, (row, response) in enumerate(zip(rows, found, strict=True)):
        ids = row
        for token in response:
            logits = logits_of(student, ids, audio[i : i + 1])[-1]
            logits[list(student.reserved_ids)] = -torch.inf
            assert token == int(logits.argmax())
            ids = (*ids, token)
        assert len(response) == 6 or response[-1] == student.eos_id


@pytest.mark.parametrize("modality", Modality)
def test_scores_equal_the_logits_that_were_sampled_from(
    student: SpeechLM,
    prompts: list[Prompt],
    modality: Modality,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temperature, at_generation = 0.7, []
    original = student.model.generate

    def recording(**arguments: object) -> Tensor:
        output = original(**arguments, return_dict_in_generate=True, output_scores=True)
        # [B, T, V] as sampled from: tempered, reserved ids at -inf.
        at_generation.append(torch.stack(output.scores, dim=1))
        sequences: Tensor = output.sequences
        return sequences

    monkeypatch.setattr(student.model, "generate", recording)
    torch.manual_seed(0)
    rows = sample_rollouts(
        student,
        prompts[:3],
        modality,
        rollouts_per_prompt=2,
        max_new_tokens=7,
        temperature=temperature,
        batch_size=100,
    )
    scored = score(student, rows, temperature=temperature, micro_batch=4, backend=Backend.REFERENCE)
    table = at_generation[0].float().log_softmax(-1)
    for i, (row, logprob) in enumerate(zip(rows, scored, strict=True)):
        ids = torch.tensor(row.response_ids)
        expected = table[i, torch.arange(len(ids)), ids]
        torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)


def test_rollouts_are_in_prompt_order_and_repeat_with_the_seed(
    student: SpeechLM, prompts: list[Prompt]
) -> None:
    def sample() -> list[Rollout]:
        torch.manual_seed(4)
        return sample_rollouts(
            student,
            prompts[:3],
            SPEECH,
            rollouts_per_prompt=2,
            max_new_tokens=5,
            temperature=1.0,
            batch_size=4,
        )

    first, again = sample(), sample()
    assert [row.prompt.id for row in first] == [p.id for p in prompts[:3] for _ in range(2)]
    assert all(row.modality is SPEECH for row in first)
    assert [r.response_ids for r in first] == [r.response_ids for r in again]
    assert len({r.response_ids for r in first}) > 1
    for row in first:
        assert row.is_finished == (row.response_ids[-1] == student.eos_id)


def test_reserved_ids_are_never_sampled(new_student: SpeechLM, prompts: list[Prompt]) -> None:
    certain = biased(new_student, new_student.audio_id)
    rows = [prompts[0].text_ids] * 8
    for temperature in (0.0, 1.0):
        torch.manual_seed(0)
        for row in generate(certain, rows, [], max_new_tokens=8, temperature=temperature):
            assert not set(row) & set(certain.reserved_ids)


def test_eos_ends_a_response_and_belongs_to_it(
    new_student: SpeechLM, prompts: list[Prompt]
) -> None:
    certain = biased(new_student, new_student.eos_id)
    (row,) = sample_rollouts(
        certain,
        prompts[:1],
        TEXT,
        rollouts_per_prompt=1,
        max_new_tokens=8,
        temperature=1.0,
        batch_size=1,
    )
    assert row.response_ids == (certain.eos_id,)
    assert row.is_finished
    certain = biased(new_student, 20)
    (response,) = generate(certain, [prompts[0].text_ids], [], max_new_tokens=3, temperature=0.0)
    assert response == (20, 20, 20)


def test_padding_does_not_change_a_generation(student: SpeechLM, prompts: list[Prompt]) -> None:
    order = sorted(prompts, key=lambda p: len(p.speech_ids))
    short, long = order[0], order[-1]
    assert len(short.speech_ids) < len(long.speech_ids)
    settings = {"max_new_tokens": 6, "temperature": 0.0}
    (alone,) = generate(student, [short.speech_ids], [short.audio], **settings)
    together, _ = generate(
        student, [short.speech_ids, long.speech_ids], [short.audio, long.audio], **settings
    )
    assert together == alone


def test_padding_and_order_do_not_change_a_score(student: SpeechLM, rollouts: MakeRollouts) -> None:
    rows = rollouts([TEXT, SPEECH, SPEECH, TEXT])[::-1]
    settings = {"temperature": 0.7, "backend": Backend.REFERENCE}
    batch = score(student, rows, micro_batch=10, **settings)
    for row, together in zip(rows, batch, strict=True):
        (alone,) = score(student, [row], micro_batch=1, **settings)
        assert together.shape == (len(row.response_ids),)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modality", Modality)
def test_the_teacher_reads_the_text(
    teacher: TextLM, rollouts: MakeRollouts, modality: Modality
) -> None:
    rows = rollouts([modality] * 2)
    settings = {"temperature": 1.3, "micro_batch": 2, "backend": Backend.REFERENCE}
    for row, logprob in zip(rows, score(teacher, rows, **settings), strict=True):
        prompt = row.prompt.text_ids
        logits = logits_of(teacher, prompt + row.response_ids, [])
        expected = own_logprob(logits, row, len(prompt), 1.3)
        torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-6)


def test_scores_are_log_probabilities_of_the_head_with_its_bias(
    new_student: SpeechLM, rollouts: MakeRollouts
) -> None:
    certain = biased(new_student, 20)
    row = replace(rollouts([TEXT])[0], response_ids=(20, 20))
    (logprob,) = score(certain, [row], temperature=1.0, micro_batch=1, backend=Backend.REFERENCE)
    assert logprob.abs().max() < 1e-6


def test_layout_by_hand(student: SpeechLM, teacher: TextLM, prompts: list[Prompt]) -> None:
    one = replace(prompts[0], text_ids=(2, 3, 30), speech_ids=(2, 5, 5, 4))
    short = Rollout(one, SPEECH, (31, 1), is_finished=True)
    long = Rollout(one, TEXT, (40, 41, 42, 43), is_finished=False)
    batch = layout([short, long], student)
    assert batch.ids.tolist() == [[2, 5, 5, 4, 31, 1, 0], [2, 3, 30, 40, 41, 42, 43]]
    x = IGNORE
    assert batch.target.tolist() == [[x, x, x, 31, 1, x, x], [x, x, 40, 41, 42, 43, x]]
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0, 6.0])]
    spread = batch.scatter(values)
    assert spread.tolist() == [[0, 0, 0, 1, 2, 0, 0], [0, 0, 3, 4, 5, 6, 0]]
    assert [v.tolist() for v in batch.gather(spread)] == [v.tolist() for v in values]
    assert layout([short], teacher).ids.tolist() == [[2, 3, 30, 31, 1]]


def test_a_batch_is_laid_out_where_the_model_is(
    tokenizer: PreTrainedTokenizerFast, rollouts: MakeRollouts
) -> None:
    with torch.device("meta"):
        elsewhere = TextLM(build_teacher(tokenizer, 0), tokenizer)
    batch = layout(rollouts([TEXT]), elsewhere)
    assert batch.ids.device.type == batch.target.device.type == "meta"


def test_the_checkpoints_generation_config_does_not_change_sampling(
    new_student: SpeechLM, prompts: list[Prompt]
) -> None:
    rows = [p.text_ids for p in prompts[:3]]

    def sample() -> list[tuple[int, ...]]:
        torch.manual_seed(3)
        return generate(new_student, rows, [], max_new_tokens=8, temperature=1.0)

    expected = sample()
    own = new_student.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_p = 5.0, 1, 0.5
    assert sample() == expected
    assert new_student.model.generation_config is own
