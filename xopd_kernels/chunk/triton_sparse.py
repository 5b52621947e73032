"""Sparse rows on a device: the lists of a chunk's rows, and the gradients from their entries.

What is left out decides `chunk.sparse`; here are the launches. Nothing is read on the host: a
row's number of entries stays on the device, and rows without entries cost an empty program.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from xopd_kernels.chunk.device_rows import Alive, RowStatistics
from xopd_kernels.chunk.sparse import Choice, RowMass, Tail
from xopd_kernels.chunk.triton import ChunkPipeline, GradientSum
from xopd_kernels.records import GradientSink, HeadGradient
from xopd_kernels.target import device_guard
from xopd_kernels.tile.entries import entry_hidden_kernel, entry_weight_kernel
from xopd_kernels.tile.sparse import (
    draw_kernel,
    keep_kernel,
    list_kernel,
    rest_kernel,
)
from xopd_kernels.workload import LIST_BYTES, Workload

LIST_BLOCK_V, LIST_WARPS = 1024, 4  # of the sweeps over a row's logits
KEEP_BLOCK = 256  # entries of a list that are looked at together
CLASS_GROUP = 8  # classes whose entries one program adds up
# A class number and a value, twice with an index of 8 bytes in the sort, and a key.
SORTED_ENTRY_BYTES = 40
ENTRY_BLOCK_E, ENTRY_BLOCK_D, ENTRY_WARPS = 8, 512, 4  # entries and columns of the products


def raised_outside(outside: Tensor, vocab_size: int) -> Tensor:
    """fp64 mass [rows] that is not below the true one, from fp32 sums of exponentials.

    Their rounding, relative to 2^-23: 64 for the exponents, which are below 128, and a step for
    each of the blocks of a lane, in the sum of what is outside and in the sum of all. What
    underflows is less than the smallest normal number for each class.
    """
    steps = 64 + 2 * -(-vocab_size // LIST_BLOCK_V)
    tiny = torch.finfo(torch.float32).tiny
    return outside.double() * (1 + steps * 2.0**-23) + vocab_size * tiny


class EntryLists(NamedTuple):
    """The lists of a chunk's rows; slots beyond `counts` are uninitialised."""

    ids: Tensor  # [rows, slots] int32
    value: Tensor  # [rows, slots] fp32: p; of `keep`: gradient by the linear output
    slope: Tensor | None  # [rows, slots] fp32 d(logit)/d(linear output); None: the same for all
    counts: Tensor  # [rows] int32; 0 for rows that are not live
    outside: Tensor  # [rows] fp32 mass of all other classes

    @property
    def is_entry(self) -> Tensor:
        """[rows, slots] bool: the slots that are in use."""
        slot = torch.arange(self.ids.shape[1], device=self.ids.device, dtype=torch.int32)
        return slot < self.counts[:, None]

    def row_mass(self, scale: Tensor, target: Tensor, vocab_size: int) -> RowMass:
        """For the rule: rows of the gradient c (1[y] - p), with scale = |c| and y = target."""
        listed = self.value.where(self.is_entry & (self.ids != target[:, None]), 0.0)
        rest = self.outside + listed.sum(1)
        outside = raised_outside(self.outside, vocab_size)
        return RowMass(scale, 2 * scale * rest, rest, outside, listed)

    def with_more(self, ids: Tensor, value: Tensor, is_sparse: Tensor) -> "EntryLists":
        """Further entries [rows, k] of the rows that are sparse, in free slots."""
        slot = self.counts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        self.ids.scatter_(1, slot, ids.to(self.ids.dtype))
        self.value.scatter_(1, slot, value)
        counts = (self.counts + ids.shape[1]).where(is_sparse, 0)
        return self._replace(counts=counts)


class ListOptions(NamedTuple):
    """How the lists of a chunk are made."""

    length: int  # most classes of a list, with the target
    extra: int = 0  # slots beyond them, for entries that come later
    has_target: bool = True  # the target is listed always


def run_lists(
    pipeline: ChunkPipeline,
    logits: Tensor,
    part: slice,
    live_count: Tensor,
    rows: RowStatistics,
    enough: Tensor,
    options: ListOptions,
) -> EntryLists:
    """The lists of a chunk's live rows: logits [chunk rows, V] as `run_logits` stores them.

    Args:
        rows: statistics [N] in live order; an `entropy` is filled for `part`.
        enough: [part rows] fp32, the mass outside with which a list need not grow.
        options: how long the lists are.
    """
    head, count = pipeline.call.head, part.stop - part.start
    kept, slots = rows.part(part), options.length + options.extra
    ids = logits.new_empty(count, slots, dtype=torch.int32)
    p = logits.new_empty(count, slots)
    lists = EntryLists(
        ids,
        p,
        None if head.softcap is None else torch.empty_like(p),
        torch.zeros_like(ids[:, 0]),
        logits.new_zeros(count),
    )
    with device_guard(logits):
        list_kernel[(count,)](
            logits,
            pipeline.target[part] if options.has_target else None,
            live_count,
            kept.maximum,
            kept.total,
            enough,
            *lists,
            kept.entropy,
            logits.shape[1],
            options.length,
            slots,
            head.slope,
            head.scale_and_cap[1],
            LIST_BLOCK_V,
            num_warps=LIST_WARPS,
            num_stages=1,
        )
    return lists


def list_length(work: Workload, rows: int) -> int:
    """K of the lists of a chunk of `rows` rows: with what sorting their entries takes."""
    return max(1, min(work.list_length(rows), LIST_BYTES // (rows * SORTED_ENTRY_BYTES)))


def entry_rows(slots: int) -> int:
    """Rows of lists of `slots` classes whose entries can be sorted together."""
    return max(1, LIST_BYTES // (slots * SORTED_ENTRY_BYTES))


def run_rest(
    pipeline: ChunkPipeline, logits: Tensor, ids: Tensor, live_count: Tensor
) -> tuple[Tensor, Tensor]:
    """(largest logit, sum of exp(logit - that)) [rows] of all classes but `ids` [rows, K].

    The ids become NaN in `logits` [chunk rows, V], so that no list names them. 0 where not live.
    """
    rows, count = ids.shape
    top, rest = logits.new_zeros(2, rows)
    with device_guard(logits):
        rest_kernel[(rows,)](
            logits,
            ids,
            live_count,
            top,
            rest,
            logits.shape[1],
            count,
            pipeline.call.head.scale_and_cap[1],
            LIST_BLOCK_V,
            KEEP_BLOCK,
            num_warps=LIST_WARPS,
            num_stages=1,
        )
    return top, rest


class EntryTerms(NamedTuple):
    """What turns the probabilities of a chunk's lists into entries of the gradient, [rows] fp32."""

    target: Tensor | None  # int64
    scale: Tensor  # |f|: listed classes with scale * p <= threshold go
    factor: Tensor  # f: an entry is f * p
    at_target: Tensor | None  # the entry of the target


def run_keep(lists: EntryLists, choice: Choice, terms: EntryTerms, slope: float) -> EntryLists:
    """The entries of the rows that are sparse, in the memory of `lists`; the others have none.

    `slope`: d(logit)/d(linear output) where the lists have none of their own.
    """
    rows, slots = lists.ids.shape
    count = lists.counts.where(choice.is_sparse, 0)
    with device_guard(count):
        keep_kernel[(rows,)](
            lists.ids,
            lists.value,
            lists.slope,
            count,
            terms.target,
            terms.scale,
            choice.threshold.expand(rows).contiguous(),
            terms.factor,
            terms.at_target,
            slots,
            slope,
            KEEP_BLOCK,
        )
    return lists._replace(counts=count)


def run_draw(
    pipeline: ChunkPipeline,
    lists: EntryLists,
    logits: Tensor,
    part: slice,
    rows: RowStatistics,
    terms: EntryTerms,
    uniform: Tensor,
) -> None:
    """One more entry for each row that has any: a class drawn from those left out.

    Args:
        lists: of `run_keep`, with a free slot.
        logits: [chunk rows, V]; the rows with entries lose theirs.
        uniform: [part rows] fp64 in [0, 1).
    """
    head, kept = pipeline.call.head, rows.part(part)
    with device_guard(logits):
        draw_kernel[(len(lists.counts),)](
            logits,
            lists.ids,
            lists.value,
            lists.counts,
            uniform,
            terms.factor,
            kept.maximum,
            kept.total,
            logits.shape[1],
            lists.ids.shape[1],
            head.slope,
            head.scale_and_cap[1],
            LIST_BLOCK_V,
            KEEP_BLOCK,
            num_warps=LIST_WARPS,
            num_stages=1,
        )


class SparseSum(NamedTuple):
    """d_hidden, d_weight and d_bias of dense rows and of entries, over row chunks."""

    dense: GradientSum  # d_weight in `total`, in place
    total: Tensor | None  # [V, D] fp32; main_grad if there is one
    sink: GradientSink
    tail: Tail | None  # where d_hidden is wanted

    @classmethod
    def of(
        cls, pipeline: ChunkPipeline, hidden: Tensor, sink: GradientSink, has_tail: bool = True
    ) -> "SparseSum":
        """Buffers for what is wanted of `hidden` [N, D]; no tail: nothing is left out unseen."""
        total = sink.main_grad
        if total is None and pipeline.call.wanted.weight:
            total = pipeline.weight.new_zeros(pipeline.weight.shape, dtype=torch.float32)
        dense, call = GradientSum.of(pipeline, hidden, GradientSink(total)), pipeline.call
        tail = Tail.of(call.head, call.dtype) if call.wanted.hidden and has_tail else None
        return cls(dense, total, sink, tail)

    def add(self, part: slice, hidden: Tensor, d_logit: Tensor, dense: Alive) -> None:
        """Add the dense rows of a chunk, as GradientSum.add."""
        self.dense.add(part, hidden, d_logit, dense)

    def add_entries(
        self, hidden: Tensor, out_row: Tensor, lists: EntryLists, missing: Tensor
    ) -> None:
        """Add the entries of rows: `hidden` [rows, D], `out_row` [rows] their numbers among N.

        `missing` [rows] fp32: what they lack, see `Tail`.
        """
        with device_guard(hidden):
            if self.dense.hidden is not None:
                self._set_hidden(self.dense.hidden, hidden, out_row, lists, missing)
            if self.total is None and self.dense.bias is None:
                return
            vocab_size = len(self.dense.pipeline.weight)
            keys = lists.ids.where(lists.is_entry, vocab_size).flatten()
            keys, place = torch.sort(keys, stable=True)
            classes = torch.arange(vocab_size + 1, device=keys.device, dtype=torch.int32)
            begin = torch.searchsorted(keys, classes)
            if self.total is not None:
                _add_by_class(self.total, begin, place, lists.value, hidden)
            if self.dense.bias is not None:
                ones = hidden.new_ones(len(hidden), 1)
                _add_by_class(self.dense.bias[:, None], begin, place, lists.value, ones)

    def _set_hidden(
        self, out: Tensor, hidden: Tensor, out_row: Tensor, lists: EntryLists, missing: Tensor
    ) -> None:
        weight, (rows, slots) = self.dense.pipeline.weight, lists.ids.shape
        dim, tail = out.shape[1], None
        if self.tail is not None:
            tail = hidden.new_zeros(hidden.shape, dtype=torch.float32)
            is_entry = lists.is_entry & (lists.value != 0)
            self.tail.add_to(tail, hidden, lists.ids, is_entry, missing)
        entry_hidden_kernel[(rows * triton.cdiv(dim, ENTRY_BLOCK_D),)](
            lists.ids,
            lists.value,
            lists.counts,
            weight,
            tail,
            out_row,
            out,
            dim,
            slots,
            weight.stride(0),
            out.stride(0),
            ENTRY_BLOCK_E,
            ENTRY_BLOCK_D,
            num_warps=ENTRY_WARPS,
        )

    def result(self) -> HeadGradient:
        """The gradients as GradientSum hands them out."""
        result = self.dense.result()
        if self.total is None or self.sink.main_grad is not None:
            return result
        dtype = torch.float32 if self.sink.keeps_fp32 else self.dense.out_dtype
        return result._replace(weight=self.total.to(dtype))


def _add_by_class(out: Tensor, begin: Tensor, place: Tensor, value: Tensor, hidden: Tensor) -> None:
    """out [V, D] += the sum of value * hidden[row] over the entries of each class."""
    dim = hidden.shape[1]
    groups = triton.cdiv(len(out), CLASS_GROUP)
    entry_weight_kernel[(groups * triton.cdiv(dim, ENTRY_BLOCK_D),)](
        begin,
        place,
        value,
        hidden,
        out,
        len(out),
        dim,
        value.shape[1],
        hidden.stride(0),
        out.stride(0),
        CLASS_GROUP,
        ENTRY_BLOCK_E,
        ENTRY_BLOCK_D,
        num_warps=ENTRY_WARPS,
    )
