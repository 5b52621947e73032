"""linear_topk_divergence with a sparse gradient on Backend.NATIVE: sweep one, and few entries."""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import Chunk, GradientSum, Model, chunks
from xopd_kernels.chunk.native_gemm import Write
from xopd_kernels.chunk.native_softmax import write_softmax_gradient
from xopd_kernels.chunk.native_sparse import ListedRows, SparseSum, bounds_of
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.chunk.sparse import Choice, RowMass, choose_rows, gradient_error
from xopd_kernels.linear_topk_divergence.reference import TopKTerms, top_k_terms
from xopd_kernels.native import GradientTerms
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, Sparsity, TopK
from xopd_kernels.validation import check_top_k


def forward_sparse(
    call: Call,
    hidden: Tensor,
    teacher: TopK,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
    sparsity: Sparsity,
) -> tuple[LinearDivergence, HeadGradient, Tensor, Tensor]:
    """As `native.forward`; also the dropped mass [N] fp32 and the error [] fp32 that is reached."""
    weight = hidden.new_ones(len(hidden)) if token_weight is None else token_weight
    live = LiveRows.of(weight != 0)
    weight = live.take(weight).to(call.dtype)
    classes = len(call.head.weight)
    for part in live.parts(call.step):  # a chunk at a time: sorting takes 16 bytes an id
        check_top_k(live.chunk(teacher.ids, part), live.chunk(teacher.logprob, part), classes)
    model = Model.of(call.head, call.panel.tile_classes)
    gradient = GradientSum.of(call, model, hidden, live, sink)
    out = torch.empty(3, live.live, dtype=call.dtype)
    dropped = torch.empty(live.live, dtype=torch.float32)
    error, norm = torch.zeros(2, dtype=torch.float64)
    sums = SparseSum.of(gradient, hidden)
    for chunk in chunks(call, hidden, live, gradient, keeps_logits=True):
        part = chunk.part
        ids, order = live.chunk(teacher.ids, part).contiguous().sort(1)
        log_q = live.chunk(teacher.logprob, part).gather(1, order).to(call.dtype)
        bounds = bounds_of(call, len(chunk.hidden), sparsity, ids.shape[1])
        listed = ListedRows.of(model, chunk, ids, bounds)
        given = TopK(ids, log_q, teacher.has_tail)
        row_terms = _RowTerms.of(listed, given, weight[part], beta, classes)
        for row, values in zip(out, row_terms.terms[:3], strict=True):
            row[part] = values
        choice, dropped[part] = row_terms.apply(listed, model.head.slope, sparsity)
        dense = _DenseRows(model, chunk, row_terms)
        missing = choice.missing(row_terms.factor)
        sums.add(chunk, listed.lists.entries, choice, missing, dense.write)
        error, norm = error + choice.error, norm + choice.norm
        del chunk, listed, dense
    result = LinearDivergence(*(live.spread(x.clone()) for x in out))
    reached = gradient_error(error, norm, sparsity)
    return result, gradient.result(), live.spread(dropped), reached


class _RowTerms(NamedTuple):
    """A chunk's divergence and its derivative."""

    ids: Tensor  # [rows, K] ascending
    maximum: Tensor  # [rows] of all other classes; finite
    total: Tensor  # [rows] fp64 sum of exp(z - maximum) over them; 1 if there are none
    terms: TopKTerms

    @classmethod
    def of(
        cls, listed: ListedRows, teacher: TopK, weight: Tensor, beta: float, classes: int
    ) -> "_RowTerms":
        """From sweep one and the teacher's log-probs, in the order of the ids."""
        has_rest = listed.total != 0
        top = listed.maximum.where(has_rest, -torch.inf)
        is_part = teacher.ids.shape[1] < classes
        logits, total = listed.lists.at_ids, listed.total
        terms = top_k_terms(logits, top, total, teacher, weight, beta, has_rest=is_part)
        total = listed.total.where(has_rest, 1.0)
        return cls(teacher.ids, listed.maximum, total, terms)

    @property
    def factor(self) -> Tensor:
        """[rows] fp64: the gradient of a class, for its share of what the ids leave."""
        return self.terms.of_rest.double() * self.total

    def apply(self, listed: ListedRows, slope: float, sparsity: Sparsity) -> tuple[Choice, Tensor]:
        """The rule, and the dropped mass [rows] fp32; the values become a gradient.

        Masses are shares of what the ids leave: p_v is as small as that is, the share of a class is
        not.
        """
        factor = self.factor
        outside, scale = listed.to_mass(1 / self.total), factor.abs()
        norm = self.terms.at_ids.abs().double().sum(1) + scale * (listed.total / self.total)
        mass = RowMass(scale, norm, self.terms.rest_mass, outside, listed.values)
        choice = choose_rows(mass, sparsity)
        spared = choice.is_spared(mass)
        listed.to_gradient(choice, spared, factor, self.terms.at_ids, slope)
        dropped = torch.where(choice.is_sparse, choice.dropped_mass * self.terms.rest_mass, 0.0)
        return choice, dropped.masked_fill(choice.is_whole & (norm > 0), 1.0).float()


class _DenseRows(NamedTuple):
    """The exact gradient of a chunk's rows."""

    model: Model
    chunk: Chunk
    rows: _RowTerms

    def write(self, alive: Tensor | None) -> Write:
        """Of the rows `alive` [n]; None: all."""
        terms = (self.rows.maximum, self.rows.terms.of_rest, self.rows.ids, self.rows.terms.at_ids)
        top, of_rest, ids, at_ids = terms if alive is None else (x[alive] for x in terms)
        of_logit = GradientTerms(top, of_rest, None, ids, at_ids)
        return write_softmax_gradient(self.model, self.chunk, alive, of_logit)
