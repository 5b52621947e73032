"""linear_policy_loss on Backend.NATIVE: both sweeps of each chunk, 3U."""

import operator

from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import GradientSum, chunks
from xopd_kernels.chunk.native_softmax import Softmax, Stats, write_softmax_gradient
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.linear_policy_loss.reference import Rows, alive_rows, token_loss
from xopd_kernels.native import GradientTerms
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
    softmax = Softmax.of(call, target, live)
    gradient = GradientSum.of(call, softmax.model, hidden, live, sink)
    terms = terms.map(lambda values: live.take(values).to(call.dtype))
    rows = Rows.empty(live.live, hidden.new_empty(0, dtype=call.dtype))
    for chunk in chunks(call, hidden, live, gradient, call.work.has_gradient):
        stats = softmax.forward(chunk)
        token = token_loss(stats.logprob, terms.map(operator.itemgetter(chunk.part)))
        rows.put(chunk.part, stats.logprob, stats.lse, token)
        if call.work.has_gradient:
            alive = alive_rows(token.coefficient)
            of_logit = gradient_terms(stats, token.coefficient, alive)
            write = write_softmax_gradient(softmax.model, chunk, alive, of_logit)
            gradient.add(chunk, alive, write)
            del write
        del chunk
    result = PolicyLoss(rows.loss.sum(), *(live.spread(x) for x in rows[1:]))
    return result, gradient.result()


def gradient_terms(stats: Stats, coefficient: Tensor, alive: Tensor | None) -> GradientTerms:
    """d_logit = c * (1[y] - p) of the rows alive; 1 - p = -expm1(log p)."""
    at_target = -coefficient * stats.logprob.expm1()
    alpha = (-coefficient / stats.total).float()
    terms = (stats.maximum, alpha, stats.ids, at_target[:, None])
    maximum, alpha, ids, at_ids = terms if alive is None else (x[alive] for x in terms)
    return GradientTerms(maximum, alpha, None, ids, at_ids)
