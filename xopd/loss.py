"""The X-OPD loss of one micro-batch: weights here, everything of size V in the kernels.

    L = lambda * L_text + (1 - lambda) * L_speech                                   (paper, eq. 5)
    L_m = -1/n_m sum_i 1/|y_i| sum_t min(r_t A_t, clip(r_t, 1-eps_low, 1+eps_high) A_t)   (eq. 3, 4)

n_m is the number of trajectories of modality m in the whole step, so the loss does not depend on
how the step is cut into micro-batches. ``token_weight`` carries lambda, 1/n_m and 1/|y_i|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xopd.config import LossConfig
from xopd.head import Head, fused_head
from xopd.models import SpeechLM
from xopd.scoring import TokenBatch, embed, layout, positions, support_bias
from xopd.types import Modality, Rollout
from xopd_kernels import PolicyLoss, SparsePolicyLoss, linear_policy_loss
from xopd_kernels.backend import BackendChoice


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a whole step holds of one modality; the normaliser of its loss."""

    rollouts: int
    tokens: int


class Trajectory(Protocol):
    """What a normaliser needs to know of a row."""

    @property
    def modality(self) -> Modality: ...

    @property
    def response_ids(self) -> tuple[int, ...]: ...


def step_sizes(rows: Sequence[Trajectory]) -> dict[Modality, StepSize]:
    """Trajectories and tokens of each modality over all rows of a step, of every rank."""
    return {
        modality: StepSize(
            rollouts=sum(r.modality is modality for r in rows),
            tokens=sum(len(r.response_ids) for r in rows if r.modality is modality),
        )
        for modality in Modality
    }


def token_weight(
    row: Rollout, sizes: Mapping[Modality, StepSize], loss: LossConfig
) -> Tensor:  # [n] fp32
    """The weight of each token of one trajectory in the step's loss."""
    share = loss.text_weight if row.modality is Modality.TEXT else 1.0 - loss.text_weight
    size, length = sizes[row.modality], len(row.response_ids)
    if row.weight == 0.0:
        return torch.zeros(length)
    each = share / (size.rollouts * length) if loss.sequence_mean else share / size.tokens
    weight = torch.full((length,), row.weight * each)
    return weight if row.importance is None else weight * row.importance.cpu()


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per-token results of one trajectory, for metrics and reports; detached, on the CPU."""

    rollout: Rollout
    logprob: Tensor  # [n] fp32
    advantage: Tensor  # [n] fp32, as used by the loss (clamped, centred if asked)
    is_clipped: Tensor  # [n] bool
    dropped_mass: Tensor | None = None  # [n] fp32, sparse gradients only
    gradient_error: float | None = None  # the bound of the whole pass, sparse gradients only


class _Given(TypedDict):
    """What the loss takes with exact gradients and with sparse ones."""

    teacher_logprob: Tensor
    old_logprob: Tensor | None
    token_weight: Tensor
    clip_low: float
    clip_high: float
    advantage_clamp: float
    bias: Tensor | None
    temperature: float
    vocab_group: ProcessGroup | None
    backend: BackendChoice


def policy_loss(
    student: SpeechLM,
    rows: Sequence[Rollout],
    sizes: Mapping[Modality, StepSize],
    config: LossConfig,
    *,
    temperature: float,
    backend: BackendChoice,
) -> tuple[Tensor, list[TokenStats]]:
    """Loss (scalar fp32 with gradient) and token statistics of a micro-batch of scored rollouts.

    The student's hidden states go into ``linear_policy_loss`` in place of lm_head. With a
    vocabulary-parallel head the loss is this rank's part in as many as there are ranks of the loss
    of all their rows.
    """
    batch = layout(rows, student)
    teacher = [r.teacher_logprob for r in rows if r.teacher_logprob is not None]
    old = [r.old_logprob for r in rows if r.old_logprob is not None]
    if len(teacher) != len(rows):
        raise ValueError("every rollout needs teacher_logprob before the loss.")
    if old and len(old) != len(rows):
        raise ValueError("old_logprob must be set on all rollouts of a batch or on none.")
    weights = batch.scatter([token_weight(r, sizes, config) for r in rows])
    values = [batch.target, batch.scatter(teacher), weights]
    values += [batch.scatter(old)] if old else []
    bound = config.max_gradient_error

    def op(hidden: Tensor, head: Head, values: Sequence[Tensor]) -> PolicyLoss | SparsePolicyLoss:
        target, teacher_logprob, weight_of_token, *old_logprob = values
        given: _Given = {
            "teacher_logprob": teacher_logprob,
            "old_logprob": old_logprob[0] if old_logprob else None,
            "token_weight": weight_of_token,
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "advantage_clamp": config.advantage_clamp,
            "bias": support_bias(student, head),
            "temperature": temperature,
            "vocab_group": head.group,
            "backend": backend,
        }
        if bound is None:
            return linear_policy_loss(hidden, head.weight, target, **given)
        return linear_policy_loss(
            hidden, head.weight, target, gradient="sparse", max_gradient_error=bound, **given
        )

    is_parallel = student.is_vocab_parallel
    with fused_head(student.model, op, values, is_vocab_parallel=is_parallel):
        result: PolicyLoss | SparsePolicyLoss = student.model(
            inputs_embeds=embed(student, batch), position_ids=positions(batch), use_cache=False
        ).logits
    return result.loss, _token_stats(rows, batch, result)


def _token_stats(
    rows: Sequence[Rollout], batch: TokenBatch, result: PolicyLoss | SparsePolicyLoss
) -> list[TokenStats]:
    """What the loss says of each row's tokens, and the bound of the pass where there is one."""

    def by_row(field: Tensor) -> list[Tensor]:
        return [value.cpu() for value in batch.gather(field.detach())]

    columns = (by_row(result.logprob), by_row(result.advantage), by_row(result.is_clipped))
    stats = [TokenStats(*found) for found in zip(rows, *columns, strict=True)]
    if isinstance(result, PolicyLoss):
        return stats
    reached = float(result.gradient_error)
    return [
        replace(one, dropped_mass=mass, gradient_error=reached)
        for one, mass in zip(stats, by_row(result.dropped_mass), strict=True)
    ]
