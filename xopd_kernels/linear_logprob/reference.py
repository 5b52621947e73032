"""Log-probability of a linear head in eager torch: the oracle and Backend.REFERENCE at once."""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.reference import (
    LOG_ZERO,
    ChunkSoftmax,
    ChunkStats,
    GradientSum,
    LiveRows,
)
from xopd_kernels.records import GradientSink, HeadGradient, LinearLogprob


def forward(call: Call, hidden: Tensor, target: Tensor, ignore_index: int) -> LinearLogprob:
    """Log-prob, lse and entropy of each row: hidden [N, D], target [N]. 1U."""
    live, needs_entropy = LiveRows.of(target != ignore_index), call.work.needs_entropy
    softmax = ChunkSoftmax.of(call, target, live)
    rows = [torch.empty(live.live, dtype=call.dtype, device=hidden.device) for _ in range(3)]
    for part in live.parts(call.step):
        stats = softmax.forward(live.chunk(hidden, part).to(call.dtype), part)
        rows[0][part], rows[1][part] = stats.logprob, stats.lse
        if needs_entropy:
            rows[2][part] = stats.entropy
    entropy = live.spread(rows[2]) if needs_entropy else rows[2].new_empty(0)
    return LinearLogprob(live.spread(rows[0]), live.spread(rows[1]), entropy)


def backward(
    call: Call,
    upstream: LinearLogprob,
    entropy: Tensor,
    hidden: Tensor,
    target: Tensor,
    ignore_index: int,
    main_grad: Tensor | None = None,
) -> HeadGradient:
    """Gradients from recomputed logits: U + U for each of d_hidden, d_weight that is wanted.

    `upstream` are the gradients (g, g_lse, g_entropy) of the three statistics and `entropy` comes
    from `forward`. Rows whose upstream gradients are all 0 are left out before the first GEMM.
    d_weight is added to `main_grad` [V, D] fp32 if that is given, and not handed out.
    """
    live = LiveRows.of((target != ignore_index) & has_upstream(upstream))
    softmax = ChunkSoftmax.of(call, target, live)
    gradient = GradientSum.of(hidden, softmax.logits, live, GradientSink(main_grad))
    up = LinearLogprob(*(live.take_any(x) for x in upstream))
    entropy = live.take_any(entropy)
    for part in live.parts(call.step):
        chunk_hidden = live.chunk(hidden, part).to(call.dtype)
        stats = softmax.forward(chunk_hidden, part)
        of_part = LinearLogprob(*(x[part] for x in up))
        d_logit = logit_gradient_(softmax, stats, of_part, entropy[part])
        gradient.add(part, chunk_hidden, d_logit, None)
    return gradient.result()


def has_upstream(upstream: LinearLogprob) -> Tensor:
    """[N] bool: the rows of which a statistic has an upstream gradient other than 0."""
    is_live = (upstream.logprob != 0) | (upstream.lse != 0)
    return is_live | (upstream.entropy != 0) if upstream.entropy.numel() else is_live


def logit_gradient_(
    softmax: ChunkSoftmax, stats: ChunkStats, up: LinearLogprob, entropy: Tensor
) -> Tensor:
    """d_logit = g (1[y] - p) + g_lse p - g_entropy p (log p + entropy), over the exponentials.

    p = exp(z - maximum) / total: exp(z - lse) would lose the digits that lse loses by rounding
    where it is far from 0.
    """
    d_logit = softmax.logits.buffer[: len(stats.total)]
    log_p_target = stats.logprob.clamp(min=LOG_ZERO)
    coefficient = up.lse - up.logprob
    # g * (1 - p) without the cancellation of 1 - p, plus what lse and entropy add.
    at_target = -up.logprob * log_p_target.expm1() + up.lse * log_p_target.exp()
    if softmax.extra is not None:
        # log p + entropy = (z - maximum) - mean.
        mean = stats.total.log() - entropy
        coefficient = coefficient + up.entropy * mean
        moment = softmax.extra[: len(d_logit)].mul_((up.entropy / stats.total)[:, None])
        d_logit.mul_((coefficient / stats.total)[:, None]).sub_(moment)
        at_target -= up.entropy * log_p_target.exp() * (log_p_target + entropy)
    else:
        d_logit.mul_((coefficient / stats.total)[:, None])
    stats.set_target_(d_logit, at_target)
    return d_logit
