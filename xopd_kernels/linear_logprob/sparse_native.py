"""linear_logprob with a sparse gradient on Backend.NATIVE: lists wait for the backward pass."""

import torch
from torch import Tensor

from xopd_kernels import native_sparse
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import GradientSum, chunks
from xopd_kernels.chunk.native_softmax import Softmax, write_softmax_gradient
from xopd_kernels.chunk.native_sparse import (
    EntrySum,
    ListedRows,
    SparseSum,
    TargetStats,
    bounds_of,
)
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.chunk.sparse import Choice, RowMass, choose_row_entries, gradient_error
from xopd_kernels.linear_logprob.native import gradient_terms
from xopd_kernels.native_sparse import Listed
from xopd_kernels.records import Entries, GradientSink, HeadGradient, LinearLogprob, Sparsity


def forward_sparse(
    call: Call, hidden: Tensor, target: Tensor, ignore_index: int, sparsity: Sparsity
) -> tuple[LinearLogprob, Entries, Tensor]:
    """As `sparse_reference.forward_sparse`: [N] statistics, lists, and the error."""
    live, needs_entropy = LiveRows.of(target != ignore_index), call.work.needs_entropy
    softmax = Softmax.of(call, target, live)
    rows = [hidden.new_empty(live.live, dtype=torch.float32) for _ in range(3)]
    length = call.work.list_length(len(hidden))
    entries = Entries(
        target.new_full((len(hidden), length), -1),
        hidden.new_zeros(len(hidden), length, dtype=torch.float32),
        torch.zeros_like(target, dtype=torch.bool),
        hidden.new_zeros(len(hidden), dtype=torch.float32),
    )
    error = torch.zeros((), dtype=torch.float64)
    for chunk in chunks(call, hidden, live, None, keeps_logits=False):
        part = chunk.part
        bounds = bounds_of(call, len(chunk.hidden), sparsity, id_count=1)
        listed = ListedRows.of(softmax.model, chunk, softmax.ids[part], bounds, needs_entropy)
        of_target = TargetStats.of(listed)
        for row, values in zip(rows, of_target.stats[:3], strict=True):
            row[part] = values
        choice = _choose(call, listed, of_target, sparsity)
        out_rows = torch.arange(len(hidden))[live.rows(part, None)]
        entries.is_dense[out_rows] = ~choice.is_sparse
        _keep(call, listed, choice, out_rows, entries)
        entries.dropped_mass[out_rows] = choice.dropped_mass.float()
        error = torch.maximum(error, choice.error)
        del chunk, listed
    entropy = live.spread(rows[2]) if needs_entropy else rows[2].new_empty(0)
    result = LinearLogprob(live.spread(rows[0]), live.spread(rows[1]), entropy)
    reached = gradient_error(error, torch.ones_like(error), sparsity)
    return result, entries, reached


def _choose(call: Call, listed: ListedRows, of_target: TargetStats, sparsity: Sparsity) -> Choice:
    """Apply the rule; the values become the derivative of the log-prob in the sparse rows."""
    rest = of_target.rest
    outside = listed.to_mass(of_target.unit)
    mass = RowMass(torch.ones_like(rest), 2 * rest, rest, outside, listed.values)
    choice = choose_row_entries(mass, sparsity)
    at_target = rest[:, None]
    factor = -torch.ones_like(rest)
    listed.to_gradient(choice, choice.is_spared(mass), factor, at_target, call.head.slope)
    return choice


def _keep(
    call: Call, listed: ListedRows, choice: Choice, out_rows: Tensor, entries: Entries
) -> None:
    """Put the lists of the sparse rows into `entries`; the others stay empty."""
    lists = listed.lists.entries
    lists = lists._replace(counts=lists.counts.where(choice.is_sparse, 0))
    classes = len(call.head.weight)
    native_sparse.compact(lists, classes, listed.places, out_rows, entries.ids, entries.derivative)


def backward_sparse(
    call: Call,
    hidden: Tensor,
    target: Tensor,
    entries: Entries,
    upstream: Tensor,
    ignore_index: int,
    sink: GradientSink,
) -> HeadGradient:
    """Gradients for the `upstream` gradient [N] of the log-probs; rows where it is 0 are left out.

    Logits are computed for the rows alone that have no list.
    """
    is_live = (target != ignore_index) & (upstream != 0)
    dense = LiveRows.of(is_live & entries.is_dense)
    softmax = Softmax.of(call, target, dense)
    # Never as of no rows: the entries make a chunk of their own then.
    summed = dense if dense.live else dense._replace(live=1)
    gradient = GradientSum.of(call, softmax.model, hidden, summed, sink)
    lists = _lists(entries, upstream.float())
    rows = (is_live & ~entries.is_dense).nonzero().squeeze(1)
    missing = -upstream.float() * entries.dropped_mass
    SparseSum.of(gradient, hidden).add_hidden(lists, missing, rows, rows)
    of_entries = EntrySum.of(gradient, lists, hidden)
    del lists
    if dense.live == 0:
        of_entries.write(gradient, is_first=True, is_last=True)
        return gradient.result()
    if gradient.weight is None:
        of_entries.add_bias(gradient)
    up = dense.take(upstream).float()
    nothing = torch.zeros_like(up)
    for chunk in chunks(call, hidden, dense, gradient, keeps_logits=True):
        stats = softmax.forward(chunk)
        of_part = LinearLogprob(up[chunk.part], nothing[chunk.part], up[:0])
        terms = gradient_terms(stats, of_part, up[:0])
        write = write_softmax_gradient(softmax.model, chunk, None, terms)
        is_last = chunk.part.stop == dense.live
        gradient.add(chunk, None, write, of_entries.add_to(gradient) if is_last else None)
        del chunk, write
    return gradient.result()


def _lists(entries: Entries, upstream: Tensor) -> Listed:
    """The entries of the gradient, as the kernels take them."""
    values = entries.derivative * upstream[:, None]
    return Listed(entries.ids.int(), values, (entries.ids >= 0).sum(1))
