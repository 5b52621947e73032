"""The policy loss in eager torch: the oracle and Backend.REFERENCE at once.

A row's loss depends on its own log-prob alone, so its gradient is known as soon as its logits
are: each row chunk is computed once and its gradient written over its logits (3U; recomputing
would cost 4U). Chunks, precision and determinism are those of linear_logprob.reference.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.reference import ChunkSoftmax, ChunkStats, GradientSum, LiveRows
from xopd_kernels.records import GradientSink, HeadGradient, PolicyLoss, PolicyTerms


def forward(
    call: Call,
    hidden: Tensor,
    target: Tensor,
    terms: PolicyTerms,
    ignore_index: int,
    sink: GradientSink,
) -> tuple[PolicyLoss, HeadGradient]:
    """The loss of hidden [N, D], target [N] and the gradients that are wanted, in one pass."""
    is_live = target != ignore_index
    if terms.token_weight is not None:
        is_live &= terms.token_weight != 0
    live = LiveRows.of(is_live)
    softmax = ChunkSoftmax.of(call, target, live)
    gradient = GradientSum.of(hidden, softmax.logits, live, sink)
    terms = terms.map(lambda values: live.take(values).to(call.dtype))
    rows = Rows.empty(live.live, softmax.logits.buffer)
    for part in live.parts(call.step):
        chunk_hidden = live.chunk(hidden, part).to(call.dtype)
        stats = softmax.forward(chunk_hidden, part)
        token = token_loss(stats.logprob, terms.map(operator.itemgetter(part)))
        rows.put(part, stats.logprob, stats.lse, token)
        if call.work.has_gradient:
            alive = alive_rows(token.coefficient)
            d_logit = _logit_gradient_(softmax, stats, token.coefficient, alive)
            gradient.add(part, chunk_hidden, d_logit, alive)
    result = PolicyLoss(rows.loss.sum(), *(live.spread(x) for x in rows[1:]))
    return result, gradient.result()


def alive_rows(coefficient: Tensor) -> Tensor | None:
    """The rows [n] whose coefficient is not 0 (clipped, no advantage); None if that is all."""
    alive = coefficient.nonzero().squeeze(1)
    return None if len(alive) == len(coefficient) else alive


def _logit_gradient_(
    softmax: ChunkSoftmax, stats: ChunkStats, coefficient: Tensor, alive: Tensor | None
) -> Tensor:
    """d_logit = c * (1[y] - p) of the rows alive; the buffer holds p * total.

    1 - p = -expm1(log p). Rows without a gradient are left out of the two GEMMs that follow.
    """
    d_logit = softmax.logits.keep(len(coefficient), alive)
    stats = stats.take(alive)
    c = coefficient if alive is None else coefficient[alive]
    d_logit.mul_((-c / stats.total)[:, None])
    stats.set_target_(d_logit, -c * stats.logprob.expm1())
    return d_logit


class Rows(NamedTuple):
    """The per-token results of the live rows, filled chunk by chunk; field order of PolicyLoss."""

    loss: Tensor
    logprob: Tensor
    lse: Tensor
    advantage: Tensor
    ratio: Tensor
    is_clipped: Tensor

    @classmethod
    def empty(cls, count: int, like: Tensor) -> "Rows":
        """Uninitialised, in the dtype of `like`."""
        values = [like.new_empty(count) for _ in range(5)]
        return cls._make([*values, like.new_empty(count, dtype=torch.bool)])

    def put(self, part: slice, logprob: Tensor, lse: Tensor, token: "TokenLoss") -> None:
        """Fill a chunk."""
        self.loss[part], self.logprob[part], self.lse[part] = token.loss, logprob, lse
        self.advantage[part], self.ratio[part] = token.advantage, token.ratio
        self.is_clipped[part] = token.is_clipped


class TokenLoss(NamedTuple):
    """Per-token values of the clipped surrogate, and its derivative."""

    advantage: Tensor
    ratio: Tensor
    is_clipped: Tensor  # bool
    loss: Tensor  # -token_weight * min(ratio * A, clip(ratio) * A)
    coefficient: Tensor  # d loss / d logprob


def token_loss(logprob: Tensor, terms: PolicyTerms) -> TokenLoss:
    """The clipped surrogate of PPO (arXiv:1707.06347, eq. 7) for each token, and its derivative.

    The advantage is a constant: with teacher_logprob it is clamp(teacher - stopgrad(logprob)),
    the single-sample estimate of the negative reverse KL gradient.
    """
    if terms.teacher_logprob is not None:
        bound = terms.advantage_clamp
        advantage = (terms.teacher_logprob - logprob).clamp(-bound, bound)
    elif terms.advantage is not None:
        advantage = terms.advantage
    else:
        raise ValueError("one of teacher_logprob and advantage must be given, got neither")
    if terms.old_logprob is None:
        ratio = torch.ones_like(logprob)
    else:
        ratio = (logprob - terms.old_logprob).exp()
    low, high = 1.0 - terms.clip_low, 1.0 + terms.clip_high
    is_clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    # An advantage of 0 has no loss, whatever the ratio: 0 * inf would be NaN.
    product = torch.where(advantage == 0, 0.0, ratio * advantage)
    surrogate = torch.where(is_clipped, ratio.clamp(low, high) * advantage, product)
    derivative = torch.where(is_clipped, 0.0, product)
    if terms.token_weight is not None:
        surrogate = surrogate * terms.token_weight
        derivative = derivative * terms.token_weight
    return TokenLoss(advantage, ratio, is_clipped, -surrogate, -derivative)
