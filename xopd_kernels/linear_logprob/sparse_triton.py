"""Log-probs whose gradient comes from lists of likely classes, on a device.

Forward: logits, statistics and lists chunk by chunk (1U); the lists wait for the backward pass,
which computes logits again for the dense rows alone.
"""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowGradients, RowStatistics
from xopd_kernels.chunk.sparse import choose_row_entries, gradient_error
from xopd_kernels.chunk.triton import ChunkPipeline
from xopd_kernels.chunk.triton_sparse import (
    EntryLists,
    EntryTerms,
    ListOptions,
    SparseSum,
    entry_rows,
    run_keep,
    run_lists,
)
from xopd_kernels.records import Entries, GradientSink, HeadGradient, LinearLogprob, Sparsity


def forward_sparse(
    call: Call, hidden: Tensor, target: Tensor, ignore_index: int, sparsity: Sparsity
) -> tuple[LinearLogprob, Entries, Tensor]:
    """Log-prob, lse and entropy of each row: hidden [N, D], target [N]; what the backward reads.

    Also the error [] fp32 of the worst row.
    """
    live = DeviceRows.of(target != ignore_index, call.step)
    pipeline = ChunkPipeline.of(call, target, live)
    rows = RowStatistics.zeros(pipeline.target_logit, call.work.needs_entropy)
    logits, ones = pipeline.empty_logits(), torch.ones_like(rows.lse)
    options = ListOptions(call.work.list_length(len(target)))
    entries = Entries(
        target.new_empty(len(target), options.length),
        logits.new_empty(len(target), options.length),
        torch.empty_like(target, dtype=torch.bool),
        torch.empty_like(rows.lse),
    )
    error = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part, live_count in live.parts():
        chunk = pipeline.gather(hidden, part)
        partial = pipeline.run_logits(chunk, part, live_count, logits, has_moment=False)
        # The entropy comes from the lists' sweep.
        pipeline.run_statistics(partial, part, live_count, rows._replace(entropy=None))
        log_p, one = rows.logprob[part], ones[part]
        enough = log_p.expm1() * (-sparsity.max_error)  # half of the row's allowance
        lists = run_lists(pipeline, logits, part, live_count, rows, enough, options)
        mass = lists.row_mass(one, pipeline.target[part], logits.shape[1])
        terms = EntryTerms(pipeline.target[part], one, -one, mass.rest)
        choice = choose_row_entries(mass, sparsity)
        lists = run_keep(lists, choice, terms, call.head.slope)
        is_live = torch.arange(len(chunk), device=hidden.device) < live_count
        _put(entries, live.order[part], lists, is_live & ~choice.is_sparse)
        entries.dropped_mass.index_copy_(0, live.order[part], choice.dropped_mass.float())
        error = torch.maximum(error, choice.error)
    entropy = rows.lse.new_empty(0) if rows.entropy is None else live.spread(rows.entropy)
    result = LinearLogprob(live.spread(rows.logprob), live.spread(rows.lse), entropy)
    reached = gradient_error(error, torch.ones_like(error), sparsity)
    return result, entries, reached


def _put(entries: Entries, order: Tensor, lists: EntryLists, is_dense: Tensor) -> None:
    """Write the rows `order` [rows] of what waits for the backward pass."""
    is_entry = lists.is_entry
    entries.ids.index_copy_(0, order, lists.ids.where(is_entry, -1).long())
    entries.derivative.index_copy_(0, order, lists.value.where(is_entry, 0.0))
    entries.is_dense.index_copy_(0, order, is_dense)


def backward_sparse(
    call: Call,
    hidden: Tensor,
    target: Tensor,
    entries: Entries,
    upstream: Tensor,
    ignore_index: int,
    sink: GradientSink,
) -> HeadGradient:
    """Gradients for `upstream` [N] of the log-probs; rows where it is 0 are left out."""
    has_gradient = (target != ignore_index) & (upstream != 0)
    live = DeviceRows.of(has_gradient & entries.is_dense, call.step)
    pipeline = ChunkPipeline.of(call, target, live)
    gradient = SparseSum.of(pipeline, hidden, sink)
    _add_dense(pipeline, gradient, hidden, live.take(upstream))
    step = entry_rows(entries.ids.shape[1])
    for begin in range(0, len(target), step):
        part = slice(begin, begin + step)
        ids = entries.ids[part].to(torch.int32)
        count = (ids >= 0).sum(1, dtype=torch.int32).where(has_gradient[part], 0)
        value = entries.derivative[part] * upstream[part, None].float()
        lists = EntryLists(ids, value, None, count, value[:, 0])
        out_row = torch.arange(begin, begin + len(ids), device=hidden.device)
        missing = -upstream[part].float() * entries.dropped_mass[part]
        missing = missing.where(count > 0, 0.0)  # an ignored row's upstream may be NaN
        gradient.add_entries(hidden[part].contiguous(), out_row, lists, missing)
    return gradient.result()


def _add_dense(
    pipeline: ChunkPipeline, gradient: SparseSum, hidden: Tensor, upstream: Tensor
) -> None:
    """The rows without a list, as in the exact pass; `upstream` [N] in live order."""
    rows = RowStatistics.zeros(pipeline.target_logit, has_entropy=False)
    up = RowGradients(upstream, None, None)
    logits = pipeline.empty_logits()
    for part, live_count in pipeline.live.parts():
        chunk, alive = pipeline.gather(hidden, part), Alive(None, live_count)
        partial = pipeline.run_logits(chunk, part, live_count, logits, has_moment=False)
        pipeline.run_statistics(partial, part, live_count, rows)
        gradient.add(part, chunk, pipeline.run_gradient(logits, part, alive, rows, up), alive)
