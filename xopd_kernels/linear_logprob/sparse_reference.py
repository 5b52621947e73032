"""Log-probs whose gradient comes from lists of classes, in eager torch: Backend.REFERENCE."""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.reference import ChunkSoftmax, ChunkStats, GradientSum, LiveRows
from xopd_kernels.chunk.reference_sparse import Lists
from xopd_kernels.chunk.sparse import Choice, Missing, Tail, choose_row_entries, gradient_error
from xopd_kernels.records import Entries, GradientSink, HeadGradient, LinearLogprob, Sparsity


def forward_sparse(
    call: Call, hidden: Tensor, target: Tensor, ignore_index: int, sparsity: Sparsity
) -> tuple[LinearLogprob, Entries, Tensor]:
    """The statistics of each row, its list, and the error [] fp32.

    The list of a row holds at most ``call.work.list_length(N)`` classes, the target among them.
    """
    live, needs_entropy = LiveRows.of(target != ignore_index), call.work.needs_entropy
    softmax = ChunkSoftmax.of(call, target, live)
    rows = [hidden.new_empty(live.live, dtype=call.dtype) for _ in range(3)]
    length = call.work.list_length(len(hidden))
    entries = Entries(
        target.new_full((len(hidden), length), -1),
        hidden.new_zeros(len(hidden), length, dtype=call.dtype),
        torch.zeros_like(target, dtype=torch.bool),
        hidden.new_zeros(len(hidden), dtype=torch.float32),
    )
    error = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in live.parts(call.step):
        stats = softmax.forward(live.chunk(hidden, part).to(call.dtype), part)
        rows[0][part], rows[1][part] = stats.logprob, stats.lse
        if needs_entropy:
            rows[2][part] = stats.entropy
        choice = _fill_entries(softmax, stats, entries, live.rows(part, None), sparsity)
        error = torch.maximum(error, choice.error)
    entropy = live.spread(rows[2]) if needs_entropy else rows[2].new_empty(0)
    result = LinearLogprob(live.spread(rows[0]), live.spread(rows[1]), entropy)
    reached = gradient_error(error, torch.ones_like(error), sparsity)
    return result, entries, reached


def _fill_entries(
    softmax: ChunkSoftmax,
    stats: ChunkStats,
    entries: Entries,
    rows: Tensor | slice,
    sparsity: Sparsity,
) -> Choice:
    """Write the lists of a chunk, from its exponentials, to the `rows` of `entries`."""
    logits = softmax.logits
    e, step = logits.buffer[: len(stats.total)], max(1, logits.call.blocks.rows // 4)
    length = entries.ids.shape[1] - 1
    lists = Lists.of(e, stats.total, stats.target[:, None], length, step)
    mass = lists.mass(torch.ones_like(stats.total), 2 * lists.rest)
    choice = choose_row_entries(mass, sparsity)
    is_left_out = choice.is_spared(mass) | ~choice.is_sparse[:, None]
    entries.is_dense[rows] = ~choice.is_sparse
    entries.dropped_mass[rows] = choice.dropped_mass.float()
    numbers = torch.arange(len(entries.ids), device=e.device)[rows]
    for begin in range(0, len(e), step):
        part = slice(begin, min(begin + step, len(e)))
        ids = lists.ids[part].masked_fill(is_left_out[part], e.shape[1])
        target = stats.target[part].where(choice.is_sparse[part], e.shape[1])
        ids, order = torch.cat((ids, target[:, None]), 1).sort(1)
        at_target = -stats.logprob[part].expm1()
        derivative = torch.cat((-lists.p[part], at_target[:, None]), 1).gather(1, order)
        is_padding = ids == e.shape[1]
        derivative = derivative.mul_(logits.call.head.slope).masked_fill_(is_padding, 0.0)
        if logits.slope is not None:
            derivative *= logits.slope[part].gather(1, ids.masked_fill(is_padding, 0))
        entries.ids[numbers[part]] = ids.masked_fill_(is_padding, -1)
        entries.derivative[numbers[part]] = derivative
    return choice


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

    Logits are computed for all rows of a chunk, although only those without a list need them.
    """
    live = LiveRows.of((target != ignore_index) & (upstream != 0))
    softmax = ChunkSoftmax.of(call, target, live)
    # What is handed to the sum is the gradient by the linear output already.
    head = call.head._replace(temperature=1.0, softcap=None, logit_scale=1.0)
    linear = softmax.logits._replace(call=call._replace(head=head), slope=None)
    gradient = GradientSum.of(hidden, linear, live, sink)
    tail = Tail.of(call.head, call.dtype) if call.wanted.hidden else None
    upstream = live.take(upstream).to(call.dtype)
    for part in live.parts(call.step):
        chunk_hidden = live.chunk(hidden, part).to(call.dtype)
        stats = softmax.forward(chunk_hidden, part)
        d_linear = _linear_gradient_(softmax, stats, upstream[part])
        _put_entries_(d_linear, entries, live, part, upstream[part], max(1, call.blocks.rows // 4))
        missing = None
        if tail is not None:
            dropped = live.chunk(entries.dropped_mass, part)
            missing = Missing(tail, (-upstream[part] * dropped).to(call.dtype))
        gradient.add(part, chunk_hidden, d_linear, None, missing)
    return gradient.result()


def _linear_gradient_(softmax: ChunkSoftmax, stats: ChunkStats, upstream: Tensor) -> Tensor:
    """slope * g (1[y] - p) of all rows, over the exponentials."""
    logits = softmax.logits
    d_linear = logits.buffer[: len(upstream)].mul_((-upstream / stats.total)[:, None])
    stats.set_target_(d_linear, -upstream * stats.logprob.expm1())
    if logits.slope is not None:
        d_linear.mul_(logits.slope[: len(d_linear)])
    return d_linear.mul_(logits.call.head.slope)


def _put_entries_(
    d_linear: Tensor, entries: Entries, live: LiveRows, part: slice, upstream: Tensor, step: int
) -> None:
    """Replace the live rows `part` that have a list by its entries, `step` rows at a time."""
    for begin in range(0, len(d_linear), step):
        at = slice(begin, min(begin + step, len(d_linear)))
        rows = slice(part.start + at.start, part.start + at.stop)
        ids, derivative, is_dense = (live.chunk(x, rows) for x in entries[:3])
        block = d_linear[at].masked_fill_(~is_dense[:, None], 0.0)
        row, column = (ids >= 0).nonzero(as_tuple=True)
        block[row, ids[row, column]] = derivative[row, column] * upstream[at][row]
