"""The divergence of two heads in eager torch: the oracle and Backend.REFERENCE at once.

A row's divergence and its gradient depend on that row's logits alone, so both models' logits of a
chunk are computed once: 3U of the student and 1U of the teacher.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.kl import row_divergence
from xopd_kernels.chunk.reference import ChunkLogits, GradientSum, LiveRows
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, Teacher, Wanted


def forward(
    call: Call,
    hidden: Tensor,
    teacher: Teacher,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
) -> tuple[LinearDivergence, HeadGradient]:
    """The divergence of hidden [N, D] and the gradients of its sum that are wanted, in one pass."""
    rows = hidden.shape[0]
    weight = hidden.new_ones(rows, dtype=call.dtype) if token_weight is None else token_weight
    live = LiveRows.of(weight != 0)
    weight = live.take(weight).to(call.dtype)
    frozen = call.work._replace(wanted=Wanted(False, False, False))
    student = ChunkLogits.of(call, live)
    other = ChunkLogits.of(call._replace(head=teacher.head, work=frozen), live)
    gradient = GradientSum.of(hidden, student, live, sink)
    out = torch.empty(3, live.live, dtype=call.dtype, device=hidden.device)
    for part in live.parts(call.step):
        chunk_hidden = live.chunk(hidden, part).to(call.dtype)
        z = student.fill(chunk_hidden)
        z_teacher = other.fill(live.chunk(teacher.hidden, part).to(call.dtype))
        _fill_rows(call, z, z_teacher, weight[part], beta, out[:, part])
        if call.work.has_gradient:
            gradient.add(part, chunk_hidden, z, None)
    result = LinearDivergence(*(live.spread(x.clone()) for x in out))
    return result, gradient.result()


def _fill_rows(
    call: Call, z: Tensor, z_teacher: Tensor, weight: Tensor, beta: float, out: Tensor
) -> None:
    """(divergence, lse, teacher_lse) into `out` [3, rows]; the gradient replaces the logits z.

    Piece by piece, so that what is between stays small; the slopes replace the teacher's logits.
    """
    value, top = out[0].zero_(), z.new_empty(len(z), 1, dtype=torch.int64)
    for rows in pieces(len(z), call.blocks.rows):
        out[1, rows], top[rows] = log_softmax_(z[rows])
        out[2, rows], _ = log_softmax_(z_teacher[rows])
    columns = min(z.shape[1], call.blocks.piece)
    for rows in pieces(len(z), call.blocks.piece // columns):
        for classes in pieces(z.shape[1], columns):
            part = row_divergence(z[rows, classes], z_teacher[rows, classes], beta)
            value[rows] += part.value
            z_teacher[rows, classes] = part.slope
    if call.work.has_gradient:
        # d value / d z = slope - p * sum(slope), with sum p = 1.
        slope = z_teacher
        is_certain = z.gather(1, top).exp() > 0.5
        z.exp_().mul_(-slope.sum(1, keepdim=True)).add_(slope)
        # d value / d z sums to 0; a class of p near 1 has nothing but rounding in the difference.
        at_top = z.gather(1, top)
        others = z.scatter_(1, top, 0.0).sum(1, keepdim=True)
        z.scatter_(1, top, at_top.where(~is_certain, -others)).mul_(weight[:, None])
    value.mul_(weight)


def pieces(count: int, step: int) -> Iterator[slice]:
    """`count` in parts of at most `step`."""
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def log_softmax_(z: Tensor) -> tuple[Tensor, Tensor]:
    """The lse and the likeliest class [rows, 1] of `z` [rows, V], which becomes its log-softmax."""
    maximum, top = z.max(1, keepdim=True)
    maximum = maximum.where(maximum != -torch.inf, 0.0)
    z.sub_(maximum)
    # The maximum stands apart, as the target does in ChunkSoftmax.
    e = z.exp()
    own = e.gather(1, top)
    others = e.scatter_(1, top, 0.0).sum(1, keepdim=True)
    log_total = (others + (own - 1)).log1p_()
    z.sub_(log_total)
    return (maximum + log_total).squeeze(1), top
