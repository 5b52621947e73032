"""The operators in dense plain torch: baseline in the dtype of a test, oracle in fp64.

In fp64 a formula without cancellation replaces that of torch where the latter loses all digits
(softcap near saturation, the log-prob of a certain token), so that the oracle stays one.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xopd_kernels.records import (
    TAIL_FLOOR,
    Head,
    LinearDivergence,
    LinearLogprob,
    PolicyLoss,
    PolicyTerms,
    ReverseKLAdvantage,
)


class _ExactTanh(torch.autograd.Function):
    """tanh with the slope 1 / cosh(x)^2: 1 - tanh(x)^2 is 0 in fp64 from x = 19 on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = grad / x.cosh().square()
        return slope


def dense_logits(hidden: Tensor, head: Head) -> Tensor:
    """[..., V] logits: F.linear in the dtype of hidden, then the transform in fp32 or fp64."""
    return transform(functional.linear(hidden, head.weight, head.bias), head)


def transform(linear: Tensor, head: Head) -> Tensor:
    """Logits from the output of the linear layer: scale, softcap, temperature."""
    is_exact = linear.dtype == torch.float64
    logits = (linear if is_exact else linear.float()) * head.logit_scale
    if head.softcap is not None:
        capped = logits / head.softcap
        tanh = _ExactTanh.apply(capped) if is_exact else capped.tanh()  # type: ignore[no-untyped-call]
        logits = head.softcap * tanh
    return logits / head.temperature


def finite_maximum(logits: Tensor) -> Tensor:
    """The largest logit of each row as a constant [..., 1]; 0 where all are -inf."""
    maximum = logits.detach().amax(-1, keepdim=True)
    return maximum.where(maximum != -torch.inf, 0.0)


def logprob_of(logits: Tensor, column: Tensor) -> Tensor:
    """Log-probability of `column` [..., 1] under softmax(logits): [..., 1]."""
    if logits.dtype != torch.float64:
        return logits.log_softmax(-1).gather(-1, column)
    # log p = log sigmoid(z_y - lse of the others) keeps its digits, and its slope's, near p = 1.
    shifted = logits - finite_maximum(logits)
    own = shifted.gather(-1, column)
    rest = shifted.scatter(-1, column, -torch.inf)
    is_alone = rest.amax(-1, keepdim=True) == -torch.inf  # no other class is possible: p = 1
    others = rest.masked_fill(is_alone, 0.0).logsumexp(-1, keepdim=True)
    value = functional.logsigmoid(own - others).masked_fill(is_alone, 0.0)
    return value.masked_fill(is_alone & (own == -torch.inf), torch.nan)


def dense_logprob(
    hidden: Tensor, head: Head, target: Tensor, ignore_index: int = -100
) -> LinearLogprob:
    """`linear_logprob` in plain torch: logits in the dtype of hidden, softmax in fp32 or fp64."""
    return rows_of(dense_logits(hidden, head), target, ignore_index)


def rows_of(logits: Tensor, target: Tensor, ignore_index: int = -100) -> LinearLogprob:
    """The statistics of `linear_logprob` from all logits [..., V]."""
    is_live = target != ignore_index
    column = target.where(is_live, 0)[..., None]
    logprob = logprob_of(logits, column).squeeze(-1)
    log_p = logits.log_softmax(-1)
    finite = log_p.where(log_p != -torch.inf, 0.0)
    entropy = -(log_p.exp() * finite).sum(-1)
    rows = (logprob, logits.logsumexp(-1), entropy)
    return LinearLogprob(*(torch.where(is_live, x, 0.0) for x in rows))


def dense_policy_loss(
    hidden: Tensor, head: Head, target: Tensor, terms: PolicyTerms, ignore_index: int = -100
) -> PolicyLoss:
    """`linear_policy_loss` in plain torch, written from the formula in its docstring."""
    return policy_of(dense_logprob(hidden, head, target, ignore_index), target, terms, ignore_index)


def policy_of(
    row: LinearLogprob, target: Tensor, terms: PolicyTerms, ignore_index: int = -100
) -> PolicyLoss:
    """The policy loss from the statistics of every row."""
    is_live = target != ignore_index
    if terms.token_weight is not None:
        is_live = is_live & (terms.token_weight != 0)
    logprob = row.logprob
    if terms.teacher_logprob is None:
        if terms.advantage is None:
            raise ValueError("terms must hold teacher_logprob or advantage, got neither")
        advantage = terms.advantage.to(logprob)
    else:
        bound = terms.advantage_clamp
        advantage = (terms.teacher_logprob - logprob.detach()).clamp(-bound, bound)
    old = logprob.detach() if terms.old_logprob is None else terms.old_logprob
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high) * advantage
    surrogate = torch.minimum(ratio * advantage, clipped)
    weight = 1.0 if terms.token_weight is None else terms.token_weight
    loss = -(weight * torch.where(is_live, surrogate, 0.0)).sum()
    is_clipped = is_live & (clipped < ratio * advantage)
    fields = (logprob, row.lse, advantage, ratio)
    rows = (torch.where(is_live, x.detach(), 0.0) for x in fields)
    return PolicyLoss(loss, *rows, is_clipped)  # type: ignore[call-arg]


def dense_divergence(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    beta: float,
    token_weight: Tensor | None = None,
) -> LinearDivergence:
    """`linear_divergence` in plain torch."""
    teacher = dense_logits(teacher_hidden.detach(), teacher_head).detach()
    return divergence_rows(dense_logits(hidden, head), teacher, beta, token_weight)


def divergence_rows(
    student: Tensor, teacher: Tensor, beta: float, token_weight: Tensor | None = None
) -> LinearDivergence:
    """`linear_divergence` from all logits; classes that only one of the two has are cut off."""
    classes = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :classes], teacher[..., :classes].to(student.dtype)
    value = divergence_of(student.log_softmax(-1), teacher.log_softmax(-1), beta)
    return _weighted(value, student.logsumexp(-1), teacher.logsumexp(-1), token_weight)


def _weighted(
    value: Tensor, lse: Tensor, teacher_lse: Tensor, token_weight: Tensor | None
) -> LinearDivergence:
    weight = torch.ones_like(value) if token_weight is None else token_weight.to(value)
    rows = (weight * value, lse, teacher_lse)
    return LinearDivergence(*(torch.where(weight != 0, x, 0.0) for x in rows))


def divergence_of(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """KL(T||S) for beta 0, KL(S||T) for 1, else beta * KL(T||M) + (1 - beta) * KL(S||M).

    M = (1 - beta) * S + beta * T; `log_s` and `log_t` [..., V] are normalised log-probs.
    """
    if beta == 0.0:
        return kl_divergence(log_t, log_s)
    if beta == 1.0:
        return kl_divergence(log_s, log_t)
    # Where both are -inf the gradient of logaddexp is NaN; the class adds 0 anyway.
    is_dead = (log_s == -torch.inf) & (log_t == -torch.inf)
    mixed = (log_s + math.log1p(-beta), log_t + math.log(beta))
    log_m = torch.logaddexp(*(x.masked_fill(is_dead, 0.0) for x in mixed))
    return beta * kl_divergence(log_t, log_m) + (1 - beta) * kl_divergence(log_s, log_m)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p * (log p - log q) over the last dimension; a class with p = 0 adds 0."""
    is_possible = log_p != -torch.inf
    difference = torch.where(is_possible, log_p, 0.0) - torch.where(is_possible, log_q, 0.0)
    return (log_p.exp() * difference).sum(-1)


def dense_topk_divergence(
    hidden: Tensor,
    head: Head,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    beta: float,
    has_bucket: bool = True,
    token_weight: Tensor | None = None,
) -> LinearDivergence:
    """`linear_topk_divergence` in plain torch."""
    logits = dense_logits(hidden, head)
    return topk_rows(logits, teacher_ids, teacher_logprob, beta, has_bucket, token_weight)


def topk_rows(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    beta: float,
    has_bucket: bool = True,
    token_weight: Tensor | None = None,
) -> LinearDivergence:
    """`linear_topk_divergence` from all logits."""
    outcomes = topk_outcomes(student, teacher_ids, teacher_logprob, has_bucket)
    mass = teacher_logprob.to(student).logsumexp(-1)
    return _weighted(divergence_of(*outcomes, beta), student.logsumexp(-1), mass, token_weight)


def topk_outcomes(
    student: Tensor, teacher_ids: Tensor, teacher_logprob: Tensor, has_bucket: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of student and teacher: of the K ids, and of all other classes as one."""
    log_s, log_t = student.log_softmax(-1).gather(-1, teacher_ids), teacher_logprob.to(student)
    if not has_bucket:
        return log_s, log_t
    rest = student.scatter(-1, teacher_ids, -torch.inf)
    is_empty = rest.amax(-1, keepdim=True) == -torch.inf
    tail = rest.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True)
    tail = (tail - student.logsumexp(-1, keepdim=True)).masked_fill(is_empty, -torch.inf)
    other = (-log_t.logsumexp(-1, keepdim=True).expm1()).clamp(min=TAIL_FLOOR).log()
    if teacher_ids.shape[-1] == student.shape[-1]:
        other = torch.full_like(other, -torch.inf)
    return torch.cat((log_s, tail), -1), torch.cat((log_t, other), -1)


def dense_reverse_kl_advantage(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    advantage_clamp: float = 10.0,
    ignore_index: int = -100,
) -> ReverseKLAdvantage:
    """`reverse_kl_advantage` from the `dense_logits` of student and teacher."""
    classes = min(logits.shape[-1], teacher_logits.shape[-1])
    logprob = rows_of(logits[..., :classes], target, ignore_index).logprob.detach()
    teacher = rows_of(teacher_logits[..., :classes], target, ignore_index).logprob.detach()
    difference = (teacher - logprob).clamp(-advantage_clamp, advantage_clamp)
    return ReverseKLAdvantage(difference, logprob, teacher)
