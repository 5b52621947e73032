"""Rollouts and scoring: what was sampled is what is scored, whatever the batch and its padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from xopd.config import RolloutConfig
from xopd.data.corpus import SpokenPrompt
from xopd.head import IGNORE
from xopd.models import SpeechLM, TextLM
from xopd.models.demo import build_teacher
from xopd.prompts import PromptStore
from xopd.ranks import ALONE
from xopd.rollout import GenerateEngine, Sampled, generate, requests_of_step
from xopd.scoring import layout, score
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
    found = generate(student, picked, modality, max_new_tokens=6)
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
    student: SpeechLM, prompts: list[Prompt], modality: Modality, monkeypatch: pytest.MonkeyPatch
) -> None:
    temperature, at_generation = 0.7, []
    original = student.model.generate

    def recording(**arguments: object) -> Tensor:
        output = original(**arguments, return_dict_in_generate=True, output_logits=True)
        at_generation.append(torch.stack(output.logits, dim=1))  # [B, T, V], nothing applied yet
        sequences: Tensor = output.sequences
        return sequences

    monkeypatch.setattr(student.model, "generate", recording)
    picked = [prompts[0], prompts[0], prompts[1], prompts[2]]
    found = generate(
        student,
        picked,
        modality,
        max_new_tokens=7,
        temperature=temperature,
        seeds=range(4),
    )
    rows = [Rollout(p, modality, y, is_finished=False) for p, y in zip(picked, found, strict=True)]
    scored = score(
        student, [rows[:3], rows[3:]], temperature=temperature, backend=Backend.REFERENCE
    )
    logits = at_generation[0].float()
    logits[..., list(student.reserved_ids)] = -torch.inf
    table = (logits / temperature).log_softmax(-1)
    for i, (row, logprob) in enumerate(zip(rows, [*scored[0], *scored[1]], strict=True)):
        ids = torch.tensor(row.response_ids)
        expected = table[i, torch.arange(len(ids)), ids]
        torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)


def test_samples_have_the_probabilities_of_the_softmax(
    new_student: SpeechLM, prompts: list[Prompt]
) -> None:
    """Chi-square of 4000 first tokens over five ids, at a temperature that is not 1."""
    temperature, kept = 0.7, torch.tensor([20, 21, 22, 23, 24])
    head = nn.Linear(128, new_student.lm_head.weight.shape[0])
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)
        head.bias[kept] = torch.tensor([0.0, 0.5, 1.0, -1.0, 0.2])
    new_student.model.set_output_embeddings(head)
    expected = (head.bias[kept] / temperature).softmax(0) * 4000
    found = generate(
        new_student,
        [prompts[0]] * 4000,
        TEXT,
        max_new_tokens=1,
        temperature=temperature,
        seeds=range(4000),
    )
    counts = torch.bincount(torch.tensor([y[0] for y in found]), minlength=25)[kept]
    assert counts.sum() == 4000
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand


def test_requests_are_in_prompt_order_with_a_seed_each() -> None:
    def requests(step: int) -> list[tuple[int, Modality, int]]:
        settings = {"rollouts_per_prompt": 2, "seed": 4}
        return list(requests_of_step([7, 7, 3], [TEXT, SPEECH], step=step, **settings))

    found = requests(5)
    assert [(r[0], r[1]) for r in found] == [
        (number, modality) for modality in (TEXT, SPEECH) for number in (7, 7, 7, 7, 3, 3)
    ]
    assert found == requests(5)
    seeds = {seed for step in (5, 6) for _, _, seed in requests(step)}
    assert len(seeds) == 24  # also for a prompt that a step takes twice
    assert all(0 <= seed < 2**63 for seed in seeds)


def sampled(
    student: SpeechLM, records: list[SpokenPrompt], *, batch_size: int, kept_clips: int = 99
) -> list[Sampled]:
    store = PromptStore(student, records, kept_clips=kept_clips)
    config = RolloutConfig(max_new_tokens=5, batch_size=batch_size)
    engine = GenerateEngine(student, store, config, ALONE)
    engine.update(3)
    requests = requests_of_step([0, 4, 2], [TEXT, SPEECH], rollouts_per_prompt=2, seed=4, step=0)
    found = engine.sample(requests)
    assert [s.request for s in found] == requests
    return found


def test_an_engine_answers_each_request_in_any_batch(
    student: SpeechLM, records: list[SpokenPrompt], prompts: list[Prompt]
) -> None:
    found = sampled(student, records, batch_size=4)
    assert len({s.response_ids for s in found}) > 1
    for s in found:
        assert s.is_finished == (s.response_ids[-1] == student.eos_id)
        assert s.prompt_tokens == len(prompts[s.request.number].ids(s.modality))
        assert (s.version, s.logprob) == (3, None)
    # One clip in memory at a time, other batches: the same trajectories.
    for batch_size in (1, 100):
        assert sampled(student, records, batch_size=batch_size, kept_clips=1) == found


def test_a_temperature_needs_a_seed_for_each_prompt(
    student: SpeechLM, prompts: list[Prompt]
) -> None:
    with pytest.raises(ValueError, match="needs a seed a prompt, got 1 seeds"):
        generate(student, prompts[:2], TEXT, max_new_tokens=1, temperature=1.0, seeds=[1])


def test_reserved_ids_are_never_sampled(new_student: SpeechLM, prompts: list[Prompt]) -> None:
    certain = biased(new_student, new_student.audio_id)
    rows = [prompts[0]] * 8
    for temperature in (0.0, 1.0):
        found = generate(
            certain, rows, TEXT, max_new_tokens=8, temperature=temperature, seeds=range(8)
        )
        for row in found:
            assert not set(row) & set(certain.reserved_ids)


def test_eos_ends_a_response_and_belongs_to_it(
    new_student: SpeechLM, prompts: list[Prompt]
) -> None:
    certain = biased(new_student, new_student.eos_id)
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seeds": [1]}
    assert generate(certain, prompts[:1], TEXT, **settings) == [(certain.eos_id,)]
    certain = biased(new_student, 20)
    (response,) = generate(certain, prompts[:1], TEXT, max_new_tokens=3)
    assert response == (20, 20, 20)


def test_padding_does_not_change_a_generation(student: SpeechLM, prompts: list[Prompt]) -> None:
    order = sorted(prompts, key=lambda p: len(p.speech_ids))
    short, long = order[0], order[-1]
    assert len(short.speech_ids) < len(long.speech_ids)
    (alone,) = generate(student, [short], SPEECH, max_new_tokens=6)
    together, _ = generate(student, [short, long], SPEECH, max_new_tokens=6)
    assert together == alone


def test_padding_and_order_do_not_change_a_score(student: SpeechLM, rollouts: MakeRollouts) -> None:
    rows = rollouts([TEXT, SPEECH, SPEECH, TEXT])[::-1]
    settings = {"temperature": 0.7, "backend": Backend.REFERENCE}
    (batch,) = score(student, [rows], **settings)
    for row, together in zip(rows, batch, strict=True):
        ((alone,),) = score(student, [[row]], **settings)
        assert together.shape == (len(row.response_ids),)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modality", Modality)
def test_the_teacher_reads_the_text(
    teacher: TextLM, rollouts: MakeRollouts, modality: Modality
) -> None:
    rows = rollouts([modality] * 2)
    (found,) = score(teacher, [rows], temperature=1.3, backend=Backend.REFERENCE)
    for row, logprob in zip(rows, found, strict=True):
        prompt = row.prompt.text_ids
        logits = logits_of(teacher, prompt + row.response_ids, [])
        expected = own_logprob(logits, row, len(prompt), 1.3)
        torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-6)


def test_scores_are_log_probabilities_of_the_head_with_its_bias(
    new_student: SpeechLM, rollouts: MakeRollouts
) -> None:
    certain = biased(new_student, 20)
    row = replace(rollouts([TEXT])[0], response_ids=(20, 20))
    ((logprob,),) = score(certain, [[row]], temperature=1.0, backend=Backend.REFERENCE)
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
    def sample() -> list[tuple[int, ...]]:
        return generate(
            new_student,
            prompts[:3],
            TEXT,
            max_new_tokens=8,
            temperature=1.0,
            seeds=[1, 2, 3],
        )

    expected = sample()
    own = new_student.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_p = 5.0, 1, 0.5
    assert sample() == expected
    assert new_student.model.generation_config is own
