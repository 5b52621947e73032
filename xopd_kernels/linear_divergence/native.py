"""linear_divergence on Backend.NATIVE: the logits of both models side by side, 3U + 1U."""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels import native
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import Chunk, GradientSum, Model, chunks
from xopd_kernels.chunk.native_gemm import Write
from xopd_kernels.chunk.native_softmax import sweep
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, Teacher


def forward(
    call: Call,
    hidden: Tensor,
    teacher: Teacher,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
) -> tuple[LinearDivergence, HeadGradient]:
    """The divergence of hidden [N, D] and the gradients of its sum that are wanted, in one pass."""
    weight = hidden.new_ones(len(hidden)) if token_weight is None else token_weight
    live = LiveRows.of(weight != 0)
    weight = live.take(weight).to(call.dtype).contiguous()
    step = call.panel.tile_classes
    # The teacher's weight is not upcast any more when a tile of d_weight has to be rounded.
    spare = hidden.new_empty(step * call.work.shared_tile_dim, dtype=torch.float32)
    model, other = Model.of(call.head, step), Model.of(teacher.head, step, spare)
    gradient = GradientSum.of(call, model, hidden, live, sink, spare)
    out = torch.empty(3, live.live, dtype=call.dtype, device=hidden.device)
    for chunk in chunks(call, hidden, live, gradient, keeps_logits=True):
        of_teacher = Chunk.of(
            chunk.part,
            live.chunk(teacher.hidden, chunk.part),
            teacher.head.weight,
            chunk.store.behind(len(chunk.hidden)),
        )
        student = _Filled.of(model, chunk)
        reference = _Filled.of(other, of_teacher)
        zeros = hidden.new_zeros(3, len(chunk.hidden), dtype=torch.float64)
        sums = native.DivergenceSums(student.bound(), *zeros)
        for tile in model.tiles():
            native.add_divergence(student.side(tile), reference.side(tile), beta, sums)
        of_rows = weight[chunk.part]
        out[0, chunk.part] = sums.value.float() * of_rows
        out[1, chunk.part], out[2, chunk.part] = student.lse(), reference.lse()
        if call.work.has_gradient:
            gradient.add(chunk, None, _writer(student, reference, beta, sums, of_rows))
        del chunk, of_teacher, student, reference
    return LinearDivergence(*(live.spread(x.clone()) for x in out)), gradient.result()


class _Filled(NamedTuple):
    """A chunk of one model after sweep one."""

    model: Model
    chunk: Chunk
    maximum: Tensor  # [rows] fp32, finite
    log_total: Tensor  # [rows] fp32
    rest: Tensor  # [rows] fp64: probability of all classes but the likeliest

    @classmethod
    def of(cls, model: Model, chunk: Chunk) -> "_Filled":
        no_ids = chunk.hidden.new_empty(len(chunk.hidden), 0, dtype=torch.int64)
        running = sweep(model, chunk, no_ids)
        maximum = running.maximum.where(running.maximum != -torch.inf, 0.0)
        total = running.total
        return cls(model, chunk, maximum, total.log().float(), (total - 1) / total)

    def bound(self) -> Tensor:
        """[rows] fp32: the likeliest class stands apart where it is above it, clearly."""
        is_certain = self.rest < 0.25
        return torch.where(is_certain, 0.5, torch.inf).float()

    def side(self, tile: slice) -> native.Side:
        return native.Side(self.chunk.kept(self.model, tile), self.maximum, self.log_total)

    def lse(self) -> Tensor:
        return self.maximum + self.log_total


def _writer(
    student: _Filled,
    teacher: _Filled,
    beta: float,
    sums: native.DivergenceSums,
    weight: Tensor,
) -> Write:
    """What writes the gradient of a tile."""
    slope_sum = (sums.slope_top + sums.slope_others).float()
    of_rest = sums.slope_others.float(), student.rest.float()
    terms = native.DivergenceTerms(sums.bound, slope_sum, *of_rest, weight)

    def write(tile: slice, out: Tensor | native.Rounded) -> None:
        sides = student.side(tile), teacher.side(tile)
        native.write_divergence_gradient(*sides, beta, terms, out)

    return write
