"""Gradients of few classes: what the sparse Backend.NATIVE implementations are made of.

Sweep one also keeps, for each row, a list of its largest logits (native code, while a tile is in
the cache) and sums what is not on the list apart, so that its mass is no difference. What the rule
of `chunk.sparse` calls sparse then needs no GEMM: d_hidden gathers rows of the weight, d_weight
sums rows of the hidden states over the entries, sorted by class. Dense rows go through the exact
sweep two, over the logits that are kept; the sparse part is added to its tiles before they are
rounded.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels import native_draw, native_sparse
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import AddTo, Chunk, GradientSum, Model
from xopd_kernels.chunk.native_gemm import Write
from xopd_kernels.chunk.native_softmax import Stats
from xopd_kernels.chunk.reference import LOG_ZERO
from xopd_kernels.chunk.sparse import Choice, Tail, raised_mass, row_uniform
from xopd_kernels.native_sparse import Bounds, ByClass, Listed, Lists
from xopd_kernels.records import Sparsity
from xopd_kernels.workload import LIST_BYTES, Operator

DenseRows = Callable[
    [Tensor | None], Write
]  # (rows [n] or None: all) -> what GradientSum.add needs

_REACH_SHARE = 1 / 32  # of the allowance: all that is too far below the maximum to be listed
_LONGEST_REACH = 88.0  # exp(-88) is 0
_COPY_BYTES = 2**20  # of a weight whose rows are not contiguous
_HIDDEN_ROWS = 256  # of d_hidden at a time: their lists are copied
_ROOM = 16  # entries, at least, that a list takes between two cuts
# Of an entry, with room for half as many more: class number, logit, slope; a mask and a copy for
# the rule or, after it, row and value in the order of classes.
_ENTRY_BYTES = 1.5 * 8 + 9
_SLOPE_BYTES = 1.5 * 4


def bounds_of(call: Call, rows: int, sparsity: Sparsity, id_count: int) -> Bounds:
    """What the lists of a chunk of `rows` rows take: the longest ones that fit their memory."""
    work, classes = call.work, len(call.head.weight)
    entry_bytes = _ENTRY_BYTES + _SLOPE_BYTES * work.has_softcap
    fitting = int(LIST_BYTES / (max(1, rows) * entry_bytes))
    if work.operator is Operator.LOGPROB:
        rows = work.rows  # they are all kept
    # A teacher's ids are not among the K classes of a list, the target is.
    length = work.list_length(rows) - (work.operator is not Operator.TOPK_DIVERGENCE)
    limit = min(length, classes - id_count, fitting)
    # All classes further below together have at most this share of the others' mass.
    share = sparsity.max_error * _REACH_SHARE
    reach = math.log(classes / share) if share > 0 else _LONGEST_REACH
    return Bounds(max(1, limit), min(max(1.0, reach), _LONGEST_REACH))


class ListedRows(NamedTuple):
    """A chunk's rows after sweep one: lists, and statistics of all classes but the ids."""

    ids: Tensor  # [rows, k] int64 classes that are kept always, ascending
    lists: Lists  # finished; values exp(z - maximum), 0 at the ids
    places: Tensor  # [rows, k] of the ids in the lists
    maximum: Tensor  # [rows] fp32, without the ids; finite
    total: Tensor  # [rows] fp64 sum of exp(z - maximum), without the ids
    moment: Tensor | None  # [rows] fp64 of exp(z - maximum) (z - maximum), without the ids

    @classmethod
    def of(
        cls, model: Model, chunk: Chunk, ids: Tensor, bounds: Bounds, needs_moment: bool = False
    ) -> "ListedRows":
        """Sweep one: the logits of a chunk, computed and folded in; `ids` [rows, k] ascending."""
        rows, id_count = ids.shape
        room = max(bounds.limit // 2, _ROOM, id_count + 1)
        has_cap = model.head.softcap is not None
        lists = Lists.empty(rows, bounds.limit + room, id_count, has_cap, needs_moment)
        for tile in model.tiles():
            logits = chunk.fill(model, tile)
            native_sparse.add_to_lists(logits, tile.start, ids, bounds, lists)
        inside = native_sparse.finish_lists(ids, bounds, lists)
        maximum = lists.maximum.where(lists.maximum != -torch.inf, 0.0)
        moment = None
        if inside.moment is not None and lists.moment is not None:
            moment = inside.moment + lists.moment
        lists = lists._replace(maximum=maximum)
        total = inside.total + lists.outside
        return cls(ids, lists, inside.places, maximum, total, moment)

    @property
    def width(self) -> int:
        """Entries of the longest list."""
        return int(self.lists.counts.amax()) if len(self.ids) else 0

    @property
    def values(self) -> Tensor:
        """[rows, width] of the lists: a view."""
        return self.lists.values[:, : self.width]

    def to_mass(self, unit: Tensor) -> Tensor:
        """exp(z - maximum) becomes a mass: the values times `unit` [rows] fp64, in place.

        Returns the mass outside of the lists [rows] fp64, not below the true one.
        """
        self.values.mul_(unit.float()[:, None])
        outside = self.lists.outside * unit
        return raised_mass(outside, outside, torch.float32)

    def to_gradient(
        self, choice: Choice, spared: Tensor, factor: Tensor, at_ids: Tensor, slope: float
    ) -> None:
        """Masses become d(loss)/d(linear output) of the sparse rows, and 0 in all others, in place.

        By the logits it is ``factor * mass``, `factor` [rows], and `at_ids` [rows, k] at the ids; 0
        where `spared` [rows, width]. `slope`: dz/dx without a cap.
        """
        values, slopes = self.values, self.lists.slope
        is_sparse = choice.is_sparse[:, None]
        values.mul_(factor.float()[:, None])
        values.masked_fill_(spared, 0.0).masked_fill_(~is_sparse, 0.0)
        values.scatter_(1, self.places, at_ids.float().where(is_sparse, 0.0))
        if slopes is not None:
            values.mul_(slopes[:, : self.width])
        elif slope != 1.0:
            values.mul_(slope)

    def draw(
        self, model: Model, chunk: Chunk, left: "LeftOut", numbers: tuple[int, Tensor]
    ) -> "Drawn":
        """A class for each sparse row, from those left out; reads the kept logits once more.

        `numbers`: the seed, and the rows' numbers [rows] among all. The values lose the entries
        that are spared.
        """
        values, seed = self.values, numbers[0]
        spared = values.where(left.spared, 0.0).double().sum(1)
        mass = spared + self.lists.outside * left.unit
        rows = ((mass > 0) & left.is_sparse).nonzero().squeeze(1)
        # Those of the ids may be 0; they are not drawn all the same.
        values.masked_fill_(left.spared, 0.0).scatter_(1, self.places, 1.0)
        point = (mass / left.unit)[rows] * row_uniform(seed, numbers[1][rows])
        at = native_draw.Point.of(rows, point, self.lists.slope is not None)
        for tile in model.tiles():
            logits = chunk.kept(model, tile)
            native_draw.draw(logits, tile.start, self.lists, len(model.head.weight), at)
        slope = model.head.slope if at.slope is None else at.slope
        return Drawn(rows, at.ids(), mass[rows] * slope)

    def insert(self, drawn: "Drawn", factor: Tensor) -> None:
        """Add the entries that were drawn to the gradient; `factor` [rows] as in `to_gradient`."""
        value = (factor[drawn.rows] * drawn.mass).float()
        native_draw.insert(self.lists.entries, drawn.rows, drawn.ids, value)


class TargetStats(NamedTuple):
    """Statistics of rows whose one id is the target."""

    stats: Stats
    unit: Tensor  # [rows] fp64 probability of a class of the rest with exp(z - maximum) = 1
    rest: Tensor  # [rows] fp64 probability of all classes but the target

    @classmethod
    def of(cls, listed: ListedRows) -> "TargetStats":
        """From sweep one."""
        at_target = listed.lists.at_ids[:, 0]
        has_rest = listed.total != 0
        maximum = torch.maximum(listed.maximum.where(has_rest, -torch.inf), at_target)
        # A row of -inf logits: lse -inf and logprob NaN, as in torch; not inf - inf everywhere.
        maximum = maximum.where(maximum != -torch.inf, 0.0)
        shift = (listed.maximum - maximum).clamp_(min=LOG_ZERO).double()
        of_target = (at_target - maximum).double()
        share = torch.where(has_rest, shift.exp(), 0.0)
        rest = listed.total * share
        total = rest + of_target.exp()
        log_total = total.log()
        entropy = log_total
        if listed.moment is not None:
            moment = listed.moment * share + shift * rest
            moment = moment + of_target.exp() * of_target.clamp(min=LOG_ZERO)
            entropy = log_total - moment / total
        logprob, lse = of_target - log_total, maximum + log_total
        stats = Stats(logprob.float(), lse.float(), entropy.float(), maximum, total, listed.ids)
        return cls(stats, share / total, rest / total)


class LeftOut(NamedTuple):
    """What a chunk's rows lack."""

    is_sparse: Tensor  # [rows] bool
    spared: Tensor  # [rows, width] bool entries of the lists
    unit: Tensor  # [rows] fp64 mass of exp(z - maximum) = 1


class Drawn(NamedTuple):
    """A class for all that are left out of a row, drawn by their masses."""

    rows: Tensor  # [n] int64 of the chunk
    ids: Tensor  # [n] int64
    mass: Tensor  # [n] fp64 of the classes left out, times dz/dx of the one


class SparseSum(NamedTuple):
    """Adds entries to a `GradientSum`, and dense rows by its GEMMs."""

    gradient: GradientSum
    hidden: Tensor  # [N, D]
    tail: Tail | None  # where d_hidden is wanted

    @classmethod
    def of(cls, gradient: GradientSum, hidden: Tensor, has_tail: bool = True) -> "SparseSum":
        """For all chunks of a call; no tail: nothing is left out unseen."""
        call, has_tail = gradient.call, has_tail and gradient.hidden is not None
        return cls(gradient, hidden, Tail.of(call.head, call.dtype) if has_tail else None)

    def add(
        self, chunk: Chunk, lists: Listed, choice: Choice, missing: Tensor, dense: DenseRows
    ) -> None:
        """Add a chunk: the entries of its sparse rows, and what `dense` writes of the others.

        `missing` [rows] fp32: what they lack, see `Tail`.
        """
        sums = self.gradient
        rows = choice.is_sparse.nonzero().squeeze(1)
        out_rows = sums.live.rows(chunk.part, rows)
        assert isinstance(out_rows, Tensor)
        self.add_hidden(lists, missing, rows, out_rows)
        entries = EntrySum.of(sums, lists, sums.live.chunk(self.hidden, chunk.part))
        dense_rows = (~(choice.is_sparse | choice.is_whole)).nonzero().squeeze(1)
        if len(dense_rows) == 0:
            is_last = chunk.part.stop == sums.live.live
            entries.write(sums, is_first=chunk.part.start == 0, is_last=is_last)
            return
        if sums.weight is None:
            entries.add_bias(sums)
        alive = None if len(dense_rows) == len(chunk.hidden) else dense_rows
        sums.add(chunk, alive, dense(alive), entries.add_to(sums))

    def add_hidden(self, lists: Listed, missing: Tensor, rows: Tensor, out_rows: Tensor) -> None:
        """Write the rows of d_hidden of the lists `rows` [n] int64 to its rows `out_rows`.

        `missing` fp32: of all lists.
        """
        sums = self.gradient
        if sums.hidden is None or len(rows) == 0:
            return
        step = max(1, min(sums.call.step, _HIDDEN_ROWS))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            out = self._gathered(lists, part)
            places = out_rows[begin : begin + step]
            if self.tail is not None:
                slot = torch.arange(lists.values.shape[1])
                is_entry = (slot < lists.counts[part, None]) & (lists.values[part] != 0)
                given = (lists.ids[part], is_entry, missing[part])
                self.tail.add_to(out, self.hidden[places], *given)
            sums.hidden[places] = out.to(sums.hidden.dtype)

    def _gathered(self, lists: Listed, rows: Tensor) -> Tensor:
        """[n, D] fp32: the sums of entry times row of the weight of the lists `rows` [n]."""
        weight = self.gradient.call.head.weight
        out = torch.zeros(len(rows), weight.shape[1], dtype=torch.float32)
        if _has_unit_stride(weight):
            native_sparse.gather(lists, len(weight), rows, weight, 0, out)
            return out
        step = max(1, _COPY_BYTES // (weight.shape[1] * weight.element_size()))
        for begin in range(0, len(weight), step):
            part = weight[begin : begin + step].contiguous()
            native_sparse.gather(lists, len(weight), rows, part, begin, out)
        return out


class EntrySum(NamedTuple):
    """What the entries of some rows add to d_weight and d_bias."""

    entries: ByClass
    hidden: Tensor  # [rows, D] of the lists

    @classmethod
    def of(cls, sums: GradientSum, lists: Listed, hidden: Tensor) -> "EntrySum":
        """Of all entries of `lists`, whose rows are those of `hidden`."""
        entries = native_sparse.by_class(lists, len(sums.call.head.weight))
        return cls(entries, hidden if _has_unit_stride(hidden) else hidden.contiguous())

    def add_to(self, sums: GradientSum) -> AddTo:
        """Adds a tile of the entries' sums to d_weight, before that is rounded, and to d_bias."""

        def add(tile: slice, out: Tensor) -> None:
            bias = None if sums.bias is None else sums.bias[tile]
            native_sparse.scatter(self.entries, tile, self.hidden, out, bias, adds=True)

        return add

    def add_bias(self, sums: GradientSum) -> None:
        """Add to d_bias alone: there is no d_weight."""
        every = slice(0, len(sums.call.head.weight))
        native_sparse.scatter(self.entries, every, self.hidden, None, sums.bias, adds=False)

    def write(self, sums: GradientSum, is_first: bool, is_last: bool) -> None:
        """d_weight and d_bias of a chunk without dense rows, over the logits that lie there."""
        if sums.weight is None:
            self.add_bias(sums)
            return
        every, total = slice(0, len(sums.weight)), sums.total
        if total is not None:
            adds = not is_first or sums.sink.main_grad is not None
            native_sparse.scatter(self.entries, every, self.hidden, total, sums.bias, adds)
            if is_last and total is not sums.weight:
                sums.weight.copy_(total)
        elif sums.weight.dtype == torch.bfloat16:
            out = sums.weight
            native_sparse.scatter(self.entries, every, self.hidden, out, sums.bias, adds=False)
        else:
            for tile in sums.model.tiles():
                out = sums.d_tile[: tile.stop - tile.start]
                bias = None if sums.bias is None else sums.bias[tile]
                native_sparse.scatter(self.entries, tile, self.hidden, out, bias, adds=False)
                sums.weight[tile] = out


def _has_unit_stride(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] == 1
