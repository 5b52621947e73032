"""The top-k divergence with a sparse gradient on a device: about one GEMM.

Outside of the ids the gradient of a row is a factor times the probabilities: the lists of the
other operators, with the ids in the place of the target. Masses are shares of what the ids leave.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowGradients, RowStatistics
from xopd_kernels.chunk.sparse import Choice, RowMass, choose_rows, gradient_error
from xopd_kernels.chunk.triton import ChunkPipeline
from xopd_kernels.chunk.triton_sparse import (
    EntryLists,
    EntryTerms,
    ListOptions,
    SparseSum,
    list_length,
    raised_outside,
    run_keep,
    run_lists,
    run_rest,
)
from xopd_kernels.linear_topk_divergence.reference import TopKTerms, top_k_terms, usable_ids
from xopd_kernels.linear_topk_divergence.triton import check_teacher
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, Sparsity, TopK


def forward_sparse(
    call: Call,
    hidden: Tensor,
    teacher: TopK,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
    sparsity: Sparsity,
) -> tuple[LinearDivergence, HeadGradient, Tensor, Tensor]:
    """As `triton.forward`; also the dropped mass [N] fp32 and the error [] fp32 reached."""
    weight = hidden.new_ones(len(hidden)) if token_weight is None else token_weight
    check_teacher(teacher, weight, len(call.head.weight))
    run = _Run.of(call, teacher, weight, beta, sparsity)
    live, gradient = run.model.live, SparseSum.of(run.model, hidden, sink)
    out = run.logits.new_zeros(4, len(hidden))
    error, norm = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    for part, live_count in live.parts():
        rows = run.model.gather(hidden, part)
        run.model.run_logits(rows, part, live_count, run.logits, has_moment=False)
        chunk = run.chunk(part, live_count)
        choice, lists = run.choose(chunk)
        error, norm = error + choice.error, norm + choice.norm
        out[:, part] = torch.stack((*chunk.terms[:3], chunk.dropped(choice)))
        missing = choice.missing(run.factor[part])
        gradient.add_entries(rows, live.order[part], lists, missing)
        is_dense = chunk.is_live & ~(choice.is_sparse | choice.is_whole)
        dense = Alive.of(is_dense)
        gradient.add(part, rows, run.d_logit(chunk, dense), dense)
    value, lse, teacher_lse, dropped = (live.spread(x) for x in out)
    reached = gradient_error(error, norm, sparsity)
    return LinearDivergence(value, lse, teacher_lse), gradient.result(), dropped, reached


class _Chunk(NamedTuple):
    """The rows of a chunk; everything is 0 where a row is not live."""

    part: slice
    live_count: Tensor
    is_live: Tensor  # [rows] bool
    ids: Tensor  # [rows, K] int64, in range
    at_ids: Tensor  # [rows, K] d(loss)/d(linear output)
    terms: TopKTerms

    def dropped(self, choice: Choice) -> Tensor:
        """[rows] fp32 probability without an entry in the gradient."""
        mass = choice.dropped_mass * self.terms.rest_mass
        mass = torch.where(choice.is_sparse, mass, 0.0).float()  # a dense row may be NaN
        has_gradient = (self.terms.at_ids != 0).any(1) | (self.terms.of_rest != 0)
        return mass.masked_fill(choice.is_whole & has_gradient, 1.0)


class _Run(NamedTuple):
    """One call. Per row, [N] in live order: d(loss)/d(logit) = factor * share outside of the ids.

    share = exp(logit - rest.maximum) / rest.total, the softmax of the classes that are no ids.
    """

    model: ChunkPipeline
    logits: Tensor  # [chunk rows, V]
    teacher: TopK
    weight: Tensor  # [N] fp32
    beta: float
    sparsity: Sparsity
    rest: RowStatistics  # total: 1 where there are no other classes
    factor: Tensor

    @classmethod
    def of(
        cls, call: Call, teacher: TopK, weight: Tensor, beta: float, sparsity: Sparsity
    ) -> "_Run":
        """Buffers for the rows whose `weight` [N] is not 0."""
        live = DeviceRows.of(weight != 0, call.step)
        no_target = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        model = ChunkPipeline.of(call, no_target, live)
        model = model._replace(target=model.target - 1)  # of no class
        rest = RowStatistics.zeros(model.target_logit, has_entropy=False)
        weight, factor = live.take(weight).float(), torch.zeros_like(rest.total)
        return cls(model, model.empty_logits(), teacher, weight, beta, sparsity, rest, factor)

    def chunk(self, part: slice, live_count: Tensor) -> _Chunk:
        """What follows from the logits of a chunk; those of the ids become NaN."""
        head, classes = self.model.call.head, self.logits.shape[1]
        ids, is_wrong = usable_ids(self.model.gather(self.teacher.ids, part), classes)
        log_q = self.model.gather(self.teacher.logprob, part).float()
        x = self.logits[: len(ids)].gather(1, ids)
        top, rest = run_rest(self.model, self.logits, ids, live_count)
        cap = head.scale_and_cap[1]
        terms = top_k_terms(
            x if cap is None else x.tanh() * cap,
            top,
            rest,
            TopK(ids, log_q, self.teacher.has_tail),
            self.weight[part].where(~is_wrong, torch.nan),
            self.beta,
            has_rest=ids.shape[1] < classes,
        )
        is_live = torch.arange(len(ids), device=ids.device) < live_count
        shown = (is_live[:, None] if y.ndim == 2 else is_live for y in terms)
        terms = TopKTerms(*(y.where(is_, 0.0) for y, is_ in zip(terms, shown, strict=True)))
        self.rest.maximum[part] = top.where(top != -torch.inf, 0.0)
        self.rest.total[part] = rest.where(rest > 0, 1.0)
        self.factor[part] = terms.of_rest * self.rest.total[part]
        at_ids = terms.at_ids * _slope(x, head.slope, cap)
        at_ids = at_ids.where(is_live[:, None], 0.0)
        return _Chunk(part, live_count, is_live, ids, at_ids, terms)

    def choose(self, chunk: _Chunk) -> tuple[Choice, EntryLists]:
        """What is left out of a chunk, and the entries of its sparse rows."""
        call, part = self.model.call, chunk.part
        factor = self.factor[part]
        scale, at_ids = factor.abs(), chunk.terms.at_ids.abs().sum(1)
        enough = (at_ids + scale) * (self.sparsity.max_error / 2) / scale
        options = ListOptions(list_length(call.work, call.step), chunk.ids.shape[1], False)
        lists = run_lists(
            self.model, self.logits, part, chunk.live_count, self.rest, enough, options
        )
        listed = lists.value.where(lists.is_entry, 0.0)
        share = lists.outside + listed.sum(1)
        outside = raised_outside(lists.outside, self.logits.shape[1])
        mass = RowMass(scale, at_ids + scale * share, share, outside, listed)
        choice = choose_rows(mass, self.sparsity)
        terms = EntryTerms(None, scale, factor, None)
        lists = run_keep(lists, choice, terms, call.head.slope)
        return choice, lists.with_more(chunk.ids, chunk.at_ids, choice.is_sparse)

    def d_logit(self, chunk: _Chunk, dense: Alive) -> Tensor:
        """The gradient of the `dense` rows, in the memory of their logits."""
        upstream = RowGradients(-self.factor, None, None)
        d_logit = self.model.run_gradient(self.logits, chunk.part, dense, self.rest, upstream)
        # The ids, which were NaN; of other rows nobody reads them.
        return d_logit.scatter_(1, chunk.ids, chunk.at_ids.to(d_logit.dtype))


def _slope(x: Tensor, slope: float, cap: float | None) -> Tensor:
    """d(logit)/d(linear output) of logits slope * x or cap * tanh(x), as tile.dot.tanh_slope."""
    if cap is None:
        return torch.full_like(x, slope)
    e = (-2.0 * x.abs()).exp()
    return slope * 4.0 * e / (1.0 + e).square()
