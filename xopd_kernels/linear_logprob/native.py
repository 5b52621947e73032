"""linear_logprob on Backend.NATIVE: scoring tile by tile, and the gradient by recomputed chunks."""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import GradientSum, chunks
from xopd_kernels.chunk.native_softmax import Softmax, Stats, write_softmax_gradient
from xopd_kernels.chunk.reference import LOG_ZERO, LiveRows
from xopd_kernels.linear_logprob.reference import has_upstream
from xopd_kernels.native import GradientTerms
from xopd_kernels.records import GradientSink, HeadGradient, LinearLogprob


def forward(call: Call, hidden: Tensor, target: Tensor, ignore_index: int) -> LinearLogprob:
    """Log-prob, lse and entropy of each row: hidden [N, D], target [N]. 1U."""
    live = LiveRows.of(target != ignore_index)
    softmax = Softmax.of(call, target, live)
    rows = [hidden.new_empty(live.live, dtype=torch.float32) for _ in range(3)]
    for chunk in chunks(call, hidden, live, None, keeps_logits=False):
        stats = softmax.forward(chunk)
        for row, values in zip(rows, stats[:3], strict=True):
            row[chunk.part] = values
        del chunk
    entropy = live.spread(rows[2]) if call.work.needs_entropy else rows[2].new_empty(0)
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
    """Gradients from recomputed logits, as linear_logprob.reference.backward."""
    live = LiveRows.of((target != ignore_index) & has_upstream(upstream))
    softmax = Softmax.of(call, target, live)
    sink = GradientSink(main_grad)
    gradient = GradientSum.of(call, softmax.model, hidden, live, sink)
    up = LinearLogprob(*(live.take_any(x) for x in upstream))
    entropy = live.take_any(entropy)
    for chunk in chunks(call, hidden, live, gradient, keeps_logits=True):
        stats = softmax.forward(chunk)
        terms = gradient_terms(
            stats, LinearLogprob(*(x[chunk.part] for x in up)), entropy[chunk.part]
        )
        gradient.add(chunk, None, write_softmax_gradient(softmax.model, chunk, None, terms))
        del chunk
    return gradient.result()


def gradient_terms(stats: Stats, up: LinearLogprob, entropy: Tensor) -> GradientTerms:
    """d_logit = g (1[y] - p) + g_lse p - g_entropy p (log p + entropy); see `logit_gradient_`."""
    log_p_target = stats.logprob.clamp(min=LOG_ZERO)
    coefficient = (up.lse - up.logprob).double()
    at_target = -up.logprob * log_p_target.expm1() + up.lse * log_p_target.exp()
    gamma = None
    if up.entropy.numel() > 0:
        # log p + entropy = (z - maximum) - mean.
        coefficient = coefficient + up.entropy * (stats.total.log() - entropy)
        at_target = at_target - up.entropy * log_p_target.exp() * (log_p_target + entropy)
        gamma = (-up.entropy / stats.total).float()
    alpha = (coefficient / stats.total).float()
    return GradientTerms(stats.maximum, alpha, gamma, stats.ids, at_target[:, None])
