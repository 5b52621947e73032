"""linear_policy_loss with a sparse gradient on Backend.NATIVE: sweep one, and few entries."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import Chunk, GradientSum, Model, chunks
from xopd_kernels.chunk.native_gemm import Write
from xopd_kernels.chunk.native_softmax import Softmax, Stats, write_softmax_gradient
from xopd_kernels.chunk.native_sparse import (
    LeftOut,
    ListedRows,
    SparseSum,
    TargetStats,
    bounds_of,
)
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.chunk.sparse import Choice, RowMass, choose_rows, gradient_error
from xopd_kernels.linear_policy_loss.native import gradient_terms
from xopd_kernels.linear_policy_loss.reference import Rows, token_loss
from xopd_kernels.records import GradientSink, HeadGradient, PolicyLoss, PolicyTerms, Sparsity


def forward_sparse(
    call: Call,
    hidden: Tensor,
    target: Tensor,
    terms: PolicyTerms,
    ignore_index: int,
    sink: GradientSink,
    sparsity: Sparsity,
) -> tuple[PolicyLoss, HeadGradient, Tensor, Tensor]:
    """As `native.forward`; also the dropped mass [N] fp32 and the error [] fp32 that is reached."""
    is_live = target != ignore_index
    if terms.token_weight is not None:
        is_live &= terms.token_weight != 0
    live = LiveRows.of(is_live)
    softmax = Softmax.of(call, target, live)
    gradient = GradientSum.of(call, softmax.model, hidden, live, sink)
    terms = terms.map(lambda values: live.take(values).to(call.dtype))
    rows = Rows.empty(live.live, hidden.new_empty(0, dtype=call.dtype))
    dropped = hidden.new_empty(live.live, dtype=torch.float32)
    numbers = live.take(torch.arange(live.total))
    error, norm = torch.zeros(2, dtype=torch.float64)
    sums = SparseSum.of(gradient, hidden, has_tail=not sparsity.is_unbiased)
    for chunk in chunks(call, hidden, live, gradient, keeps_logits=True):
        part, bounds = chunk.part, bounds_of(call, len(chunk.hidden), sparsity, id_count=1)
        listed = ListedRows.of(softmax.model, chunk, softmax.ids[part], bounds)
        of_target = TargetStats.of(listed)
        stats = of_target.stats
        token = token_loss(stats.logprob, terms.map(operator.itemgetter(part)))
        rows.put(part, stats.logprob, stats.lse, token)
        rule = _Rule(softmax.model, sparsity, numbers[part])
        choice = rule.apply(chunk, listed, of_target, token.coefficient)
        sums.add(
            chunk,
            listed.lists.entries,
            choice,
            choice.missing(-token.coefficient),
            _dense_rows(softmax.model, chunk, stats, token.coefficient),
        )
        dropped[part] = choice.dropped_mass.float()
        error, norm = error + choice.error, norm + choice.norm
        del chunk, listed
    result = PolicyLoss(rows.loss.sum(), *(live.spread(x) for x in rows[1:]))
    return result, gradient.result(), live.spread(dropped), gradient_error(error, norm, sparsity)


class _Rule(NamedTuple):
    """What a chunk's gradient leaves out, and the entries that are left."""

    model: Model
    sparsity: Sparsity
    numbers: Tensor  # [rows] int64 of the chunk's rows among all

    def apply(
        self, chunk: Chunk, listed: ListedRows, of_target: TargetStats, coefficient: Tensor
    ) -> Choice:
        """Turn the values of the lists into the gradient ``c (1[y] - p)`` of the sparse rows."""
        unit, rest = of_target.unit, of_target.rest
        outside, scale = listed.to_mass(unit), coefficient.abs()
        mass = RowMass(scale, 2 * scale.double() * rest, rest, outside, listed.values)
        choice = choose_rows(mass, self.sparsity)
        spared, drawn = choice.is_spared(mass), None
        if self.sparsity.is_unbiased:
            left = LeftOut(choice.is_sparse, spared, unit)
            drawn = listed.draw(self.model, chunk, left, (self.sparsity.seed, self.numbers))
        at_target = coefficient * rest  # not -expm1(logprob): log p_y of a sure token has no digits
        slope = self.model.head.slope
        listed.to_gradient(choice, spared, -coefficient, at_target[:, None], slope)
        if drawn is not None:
            listed.insert(drawn, -coefficient)
        return choice


def _dense_rows(
    model: Model, chunk: Chunk, stats: Stats, coefficient: Tensor
) -> Callable[[Tensor | None], Write]:
    """The exact gradient of the rows that are asked for."""

    def rows(alive: Tensor | None) -> Write:
        terms = gradient_terms(stats, coefficient, alive)
        return write_softmax_gradient(model, chunk, alive, terms)

    return rows
