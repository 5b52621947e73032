"""Inputs of the sparse study: heads of different entropy, and their gradients without a kernel.

A family is an exponent s or "peaked". Of exponent s: logits = -s log(rank of the class) + N(0, 1),
where a row belongs to one of 16 contexts and each context ranks the classes in an order of its own;
0 is flat random logits. Targets are sampled from the softmax, as on-policy training has them.
"peaked" is the input of that name of `xopd_bench`: half of the rows have p > 0.99 at their target.

A vector that is added to all rows of the weight changes no probability and no exact gradient of the
hidden states, but a sparse one: the entries of a list do not sum to 0. The exponents' weights have
the mean 0 in the columns that rank; those of "peaked" have not, and "peaked-centred" is the same
with the mean taken out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_bench.cell import Shape
from xopd_bench.problem import Drawn
from xopd_kernels.testing import Distribution, make_inputs

PEAKED, CENTRED = "peaked", "peaked-centred"
CONTEXTS = 16
_CLASSES = 8192  # whose logits of all rows exist at a time
_ROWS = 256  # whose logits of all classes exist at a time
_CLAMP = 10.0


class Inputs(NamedTuple):
    """One call of the policy loss; hidden and weight require gradients."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64
    teacher_logprob: Tensor  # [N] fp32: the student's, and N(0, 1)
    token_weight: Tensor  # [N] fp32: 1/N


class Described(NamedTuple):
    """How concentrated the softmax of the rows is."""

    entropy_nat: float  # mean over rows
    certain_share: float  # of rows whose likeliest class has p > 0.99
    target_p: float  # mean probability of the target


class Truth(NamedTuple):
    """What the exact gradients are, and what they are made of; from logits in a wide dtype."""

    coefficient: Tensor  # [N] wide: c of d_logit = c (1[y] - p)
    lse: Tensor  # [N] wide
    d_hidden: Tensor  # [N, D] wide
    d_weight: Tensor  # [V, D] fp32, rounded from wide


class GradientError(NamedTuple):
    """How far a gradient is from the exact one."""

    relative: float  # |g - t| / |t|, 2-norms over all elements
    cosine: float


class _Softmax(NamedTuple):
    """Statistics of each row [N] in the wide dtype."""

    lse: Tensor
    target: Tensor  # int64
    logprob: Tensor  # of the target
    entropy: Tensor
    largest_p: Tensor


def draw(
    shape: Shape, dtype: torch.dtype, family: str, device: torch.device, wide: torch.dtype
) -> tuple[Inputs, Described]:
    """Inputs that depend on the arguments alone, and how concentrated they are."""
    target: Tensor | None = None
    if family in (PEAKED, CENTRED):
        drawn = Drawn.of(shape, dtype, Distribution.PEAKED, device, has_teacher=False)
        hidden, weight, target = drawn.hidden, drawn.weight, drawn.target
        if family == CENTRED:  # the column that holds the Zipf tail
            weight[:, 0] -= weight[:, 0].float().mean().to(dtype)
    else:
        hidden, weight = _zipf(shape, dtype, float(family), device)
    rng = torch.Generator(device).manual_seed(5)
    found = _survey(hidden, weight, target, wide, rng)
    noise = torch.randn(len(hidden), generator=rng, device=device)
    inputs = Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        found.target,
        found.logprob.float() + noise,
        torch.full((len(hidden),), 1.0 / len(hidden), device=device),
    )
    described = Described(
        round(float(found.entropy.mean()), 4),
        round(float((found.largest_p > 0.99).double().mean()), 4),
        round(float(found.logprob.exp().mean()), 4),
    )
    return inputs, described


def _zipf(
    shape: Shape, dtype: torch.dtype, exponent: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """hidden and weight; the first columns say which context a row is of, and how it ranks."""
    drawn = make_inputs(shape.rows, shape.vocab_size, shape.dim, torch.float32, device=str(device))
    hidden, weight = drawn.hidden.detach(), drawn.weight.detach()
    contexts = min(CONTEXTS, shape.dim // 4)
    if exponent and contexts:
        rng = torch.Generator(device).manual_seed(4)
        rank = torch.arange(1, shape.vocab_size + 1, device=device, dtype=torch.float32).log()
        rank -= rank.mean()
        own = torch.randint(contexts, (shape.rows,), generator=rng, device=device)
        hidden[:, :contexts] = torch.nn.functional.one_hot(own, contexts).float()
        for context in range(contexts):
            order = torch.randperm(shape.vocab_size, generator=rng, device=device)
            weight[order, context] = -exponent * rank
    return hidden.to(dtype), weight.to(dtype)


def _blocks(weight: Tensor, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The first class and the widened rows of each block."""
    for first in range(0, len(weight), _CLASSES):
        yield first, weight.detach()[first : first + _CLASSES].to(wide)


def _survey(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    wide: torch.dtype,
    rng: torch.Generator,
) -> _Softmax:
    """One look at all logits; without targets these are sampled, by the Gumbel-max trick."""
    rows = hidden.detach().to(wide)
    start = rows.new_full((len(rows),), -math.inf)
    largest, total, moment, best = start, torch.zeros_like(start), torch.zeros_like(start), start
    picked = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    picked_logit = torch.zeros_like(start)
    for first, part in _blocks(weight, wide):
        z = rows @ part.T
        top = torch.maximum(largest, z.amax(1))
        shrink = (largest - top).exp()
        p = (z - top[:, None]).exp_()
        total = total * shrink + p.sum(1)
        moment = moment * shrink + (p * z).sum(1)
        largest = top
        if target is not None:
            column = target - first
            inside = (column >= 0) & (column < len(part))
            logit = z.gather(1, column.clamp(0, len(part) - 1)[:, None]).squeeze(1)
            picked_logit = torch.where(inside, logit, picked_logit)
            continue
        race = torch.empty_like(z).exponential_(generator=rng).log_().neg_() + z
        value, column = race.max(1)
        is_better = value > best
        best = torch.where(is_better, value, best)
        picked = torch.where(is_better, column + first, picked)
        logit = z.gather(1, column[:, None]).squeeze(1)
        picked_logit = torch.where(is_better, logit, picked_logit)
    lse = largest + total.log()
    chosen = picked if target is None else target
    return _Softmax(lse, chosen, picked_logit - lse, lse - moment / total, (largest - lse).exp())


def solve(inputs: Inputs, wide: torch.dtype) -> Truth:
    """The gradients of the clipped policy loss at ratio 1, by blocks of classes in plain torch.

    loss = -sum_i w_i A_i r_i with A = clamp(teacher_logprob - logprob), so d_logit = c (1[y] - p)
    with c = -w A; d_hidden = d_logit W, d_weight = d_logit^T hidden.
    """
    found = _survey(
        inputs.hidden, inputs.weight, inputs.target, wide, torch.Generator(inputs.hidden.device)
    )
    rows = inputs.hidden.detach().to(wide)
    advantage = (inputs.teacher_logprob.to(wide) - found.logprob).clamp(-_CLAMP, _CLAMP)
    coefficient = -inputs.token_weight.to(wide) * advantage
    d_hidden = torch.zeros_like(rows)
    d_weight = torch.empty_like(inputs.weight, dtype=torch.float32, requires_grad=False)
    number = torch.arange(len(rows), device=rows.device)
    for first, part in _blocks(inputs.weight, wide):
        d_logit = -(rows @ part.T - found.lse[:, None]).exp_()
        inside = (inputs.target >= first) & (inputs.target < first + len(part))
        # 1 - p of the target without the digits that a p near 1 would cost.
        own = -torch.expm1(found.logprob[inside])
        d_logit[number[inside], inputs.target[inside] - first] = own
        d_logit *= coefficient[:, None]
        d_hidden += d_logit @ part
        d_weight[first : first + len(part)] = d_logit.T @ rows
    return Truth(coefficient, found.lse, d_hidden, d_weight)


def kept_entries(inputs: Inputs, lse: Tensor, dropped: Tensor) -> Tensor:
    """Entries of each row's list: [E, N] int64, from the mass [E, N] that each row left out.

    A list holds the target and the likeliest other classes, as many as leave out that mass: the
    count whose outside mass is nearest to it, because the operator's p are rounded otherwise.
    """
    most = min(max(64, inputs.weight.shape[0] // 32) + 1, inputs.weight.shape[0])
    kept = torch.zeros(dropped.shape, dtype=torch.int64, device=dropped.device)
    for rows in torch.arange(len(lse), device=lse.device).split(_ROWS):
        hidden = inputs.hidden.detach()[rows].to(lse.dtype)
        logits = torch.cat([hidden @ part.T for _, part in _blocks(inputs.weight, lse.dtype)], 1)
        p = (logits - lse[rows, None]).exp_().double()
        own = inputs.target[rows, None]
        p.scatter_(1, own, 0.0)
        top = p.topk(most - 1).values
        outside = torch.cat([top.new_zeros(len(rows), 1), top.cumsum(1)], 1)
        outside = p.sum(1, keepdim=True) - outside  # [., k]: beside the target and k others
        for number, mass in enumerate(dropped[:, rows].double()):
            kept[number, rows] = 1 + (outside - mass[:, None]).abs().argmin(1)
    return kept


def gradient_error(found: Tensor, truth: Tensor) -> GradientError:
    """Of all elements, summed in fp64 some rows at a time."""
    sums = torch.zeros(4, dtype=torch.float64, device=truth.device)
    for ours, exact in zip(
        found.detach().split(_CLASSES), truth.detach().split(_CLASSES), strict=True
    ):
        a, b = ours.double(), exact.double()
        parts = ((a - b).square(), b.square(), a.square(), a * b)
        sums += torch.stack([part.sum() for part in parts])
    difference, exact_norm, norm, product = (float(x) for x in sums)
    cosine = product / math.sqrt(norm * exact_norm) if norm and exact_norm else math.nan
    return GradientError(math.sqrt(difference / exact_norm) if exact_norm else math.nan, cosine)
