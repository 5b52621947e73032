"""One training step through the fused head equals the same step with plain logits.

The plain side is written from the paper's equations, row by row and without padding; it shares no
code with xopd.loss, xopd.scoring or the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from xopd.config import LossConfig
from xopd.loss import policy_loss, step_sizes
from xopd.models import SpeechLM
from xopd.types import Modality, Rollout
from xopd_kernels import Backend, needs

TEXT, SPEECH = Modality.TEXT, Modality.SPEECH
MakeRollouts = Callable[[list[Modality]], list[Rollout]]
Gradients = dict[str, Tensor | None]

ROWS = {
    "text": [TEXT] * 3,
    "speech": [SPEECH] * 3,
    "mixed": [TEXT, SPEECH, SPEECH, TEXT, TEXT],
}


def plain_logprob(student: SpeechLM, row: Rollout, temperature: float) -> Tensor:
    """log pi(y_t | x, y_<t), [n], by the logits of this row alone."""
    prompt = row.prompt.text_ids if row.modality is TEXT else row.prompt.speech_ids
    ids = torch.tensor([prompt + row.response_ids])
    embedded = student.model.get_input_embeddings()(ids)
    if row.modality is SPEECH:
        first = prompt.index(student.audio_id)
        last = first + prompt.count(student.audio_id)
        parts = (embedded[:, :first], row.prompt.audio[None], embedded[:, last:])
        embedded = torch.cat(parts, dim=1)
    position = torch.arange(ids.shape[1])[None]
    logits = student.model(inputs_embeds=embedded, position_ids=position, use_cache=False).logits
    # The policy that samples never draws a reserved id: softmax over the others.
    allowed = logits[0, len(prompt) - 1 : -1].float().clone()
    allowed[:, list(student.reserved_ids)] = -torch.inf
    table = (allowed / temperature).log_softmax(-1)
    return table.gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]


def plain_loss(
    student: SpeechLM, rows: list[Rollout], config: LossConfig, temperature: float
) -> Tensor:
    """Equations 3, 4 and 5 of the paper."""
    total = torch.zeros(())
    for modality, share in ((TEXT, config.text_weight), (SPEECH, 1 - config.text_weight)):
        surrogates = []
        for row in (r for r in rows if r.modality is modality):
            logprob = plain_logprob(student, row, temperature)
            old = logprob.detach() if row.old_logprob is None else row.old_logprob
            assert row.teacher_logprob is not None
            advantage = (row.teacher_logprob - logprob.detach()).clamp(
                -config.advantage_clamp, config.advantage_clamp
            )
            ratio = torch.exp(logprob - old)
            clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
            surrogates.append(torch.minimum(ratio * advantage, clipped * advantage))
        if not surrogates:
            continue
        if config.sequence_mean:
            total = total - share * torch.stack([s.mean() for s in surrogates]).mean()
        else:
            total = total - share * torch.cat(surrogates).mean()
    return total


def with_teacher(student: SpeechLM, rows: list[Rollout], *, has_old: bool) -> list[Rollout]:
    """Rollouts with a random teacher near the student and, if asked, a stale old policy.

    The teacher is 1 nat better on average: a mean advantage near 0 would leave the loss a small
    difference of large terms, whose relative error says nothing.
    """
    generator = torch.Generator().manual_seed(5)

    def near(values: Tensor, spread: float) -> Tensor:
        return values + spread * torch.randn(values.shape, generator=generator)

    scored = []
    for row in rows:
        with torch.no_grad():
            logprob = plain_logprob(student, row, 1.0)
        old = near(logprob, 0.4) if has_old else None
        scored.append(replace(row, teacher_logprob=near(logprob + 1.0, 2.0), old_logprob=old))
    return scored


def gradients(student: SpeechLM, loss: Tensor) -> Gradients:
    student.model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in student.model.named_parameters()}


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert {n for n, g in found.items() if g is not None} == {
        n for n, g in expected.items() if g is not None
    }
    assert any(g is not None for g in found.values())
    for name, gradient in found.items():
        other = expected[name]
        if gradient is not None and other is not None:
            assert (gradient - other).norm() <= 1e-5 * other.norm(), name
            assert gradient.norm() > 0, name


def fused(
    student: SpeechLM,
    rows: list[Rollout],
    config: LossConfig,
    temperature: float,
    *,
    micro_batch: int = 100,
) -> tuple[float, Gradients, list[bool]]:
    """Loss, gradients and clip marks of the trainer's own path, in micro-batches."""
    sizes = step_sizes(rows)
    student.model.zero_grad(set_to_none=True)
    total, clipped = 0.0, []
    for start in range(0, len(rows), micro_batch):
        loss, stats = policy_loss(
            student,
            rows[start : start + micro_batch],
            sizes,
            config,
            temperature=temperature,
            backend=Backend.REFERENCE,
        )
        loss.backward()
        total += float(loss.detach())
        clipped += [mark for item in stats for mark in item.is_clipped.tolist()]
    found = {n: p.grad for n, p in student.model.named_parameters()}
    return total, found, clipped


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("sequence_mean", [True, False])
def test_loss_and_all_gradients(
    new_student: SpeechLM,
    rollouts: MakeRollouts,
    kind: str,
    has_old: bool,
    sequence_mean: bool,
) -> None:
    rows = with_teacher(new_student, rollouts(ROWS[kind]), has_old=has_old)
    config = LossConfig(text_weight=0.3, advantage_clamp=2.5, sequence_mean=sequence_mean)
    expected = plain_loss(new_student, rows, config, 0.7)
    expected_gradients = gradients(new_student, expected)
    loss, found, clipped = fused(new_student, rows, config, 0.7)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same(found, expected_gradients)
    assert any(clipped) == has_old


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_cut_into_micro_batches_does_not_matter(
    new_student: SpeechLM, rollouts: MakeRollouts, micro_batch: int
) -> None:
    rows = with_teacher(new_student, rollouts(ROWS["mixed"]), has_old=True)
    whole, expected, clipped = fused(new_student, rows, LossConfig(), 1.0)
    loss, found, marks = fused(new_student, rows, LossConfig(), 1.0, micro_batch=micro_batch)
    assert loss == pytest.approx(whole, rel=1e-5)
    assert marks == clipped
    assert_same(found, expected)


def largest_allocation(call: Callable[[], None]) -> int:
    """Bytes of the largest tensor allocated, also inside operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def test_no_tensor_of_all_logits_exists(
    new_student: SpeechLM, rollouts: MakeRollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 4096
    new_student.model.set_output_embeddings(nn.Linear(128, vocabulary, bias=False))
    monkeypatch.setattr(needs, "DEFAULT_CPU_BYTES", 32 * vocabulary * 4)
    rows = [
        replace(row, response_ids=row.response_ids * 20)
        for row in rollouts([TEXT, SPEECH, SPEECH, TEXT])
    ]
    rows = with_teacher(new_student, rows, has_old=False)
    tokens = sum(len(row.response_ids) for row in rows)
    logit_bytes = tokens * vocabulary * 4
    weight_bytes = vocabulary * 128 * 4

    def fused_step() -> None:
        fused(new_student, rows, LossConfig(), 1.0)

    def plain_step() -> None:
        gradients(new_student, plain_loss(new_student, rows[-1:], LossConfig(), 1.0))

    assert largest_allocation(fused_step) <= weight_bytes < logit_bytes
    # The same measurement sees the logits where there are any: one row is enough.
    assert largest_allocation(plain_step) >= len(rows[-1].response_ids) * vocabulary * 4
