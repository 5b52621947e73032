"""Row chunks in eager torch: what every Backend.REFERENCE implementation is made of.

Rows are processed in chunks, so that no tensor of N * V elements exists. Everything is computed
in float32 (float64 for float64 inputs) from upcast inputs: log-probs that come from logits rounded
to bf16 are off by up to 0.06 nat and can be positive. Deterministic: fixed chunk order, no atomics.
How many rows a chunk has, and what else is allocated, is decided in `xopd_kernels.memory`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.sparse import Missing
from xopd_kernels.needs import FILLED_CLASSES, FILLED_ROWS
from xopd_kernels.records import GradientSink, HeadGradient
from xopd_kernels.shard import VocabShard
from xopd_kernels.validation import check_target_range

_FEW_ROWS = 32  # with 16 threads up to 27 rows were seen to be shared so
LOG_ZERO = -1000.0  # exp(LOG_ZERO) == 0 even in float64; keeps 0 * log(0) at 0, not NaN


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out += a @ b``: out [n, D], a [n, T], b [T, D].

    One to three rows are multiplied by another routine of torch's, whose sums over a large
    vocabulary lose ten times as much: they are multiplied with rows of zeros. So are the last ones
    of a few rows more, as threads share them by fours and one may be left with so few.
    """
    rows = len(a) % FILLED_ROWS if len(a) < _FEW_ROWS else 0
    whole = len(a) - rows
    if whole > 0:
        out[:whole].addmm_(a[:whole], b)
    if rows == 0:
        return out
    filled = a.new_zeros(FILLED_ROWS, min(FILLED_CLASSES, len(b)))
    product = out.new_empty(FILLED_ROWS, out.shape[1])
    for begin in range(0, len(b), FILLED_CLASSES):
        part = b[begin : begin + FILLED_CLASSES]
        factor = filled[:, : len(part)]
        factor[:rows] = a[whole:, begin : begin + FILLED_CLASSES]
        out[whole:] += torch.mm(factor, part, out=product)[:rows]
    return out


class LiveRows(NamedTuple):
    """The rows that are not ignored; the others are taken out before the first GEMM."""

    kept: Tensor | None  # [live] int64 row numbers; None if all are live (nothing is copied then)
    live: int
    total: int

    @classmethod
    def of(cls, is_live: Tensor) -> "LiveRows":
        kept = is_live.nonzero().squeeze(1)
        all_live = len(kept) == len(is_live)
        return cls(None if all_live else kept, len(kept), len(is_live))

    def parts(self, step: int) -> Iterator[slice]:
        """Chunks of at most `step` live rows, in order."""
        begin = 0
        while begin < self.live:
            end = min(begin + max(1, step), self.live)
            yield slice(begin, end)
            begin = end

    def take(self, values: Tensor) -> Tensor:
        """The live rows of `values` [total, ...]."""
        return values if self.kept is None else values.index_select(0, self.kept)

    def take_any(self, values: Tensor) -> Tensor:
        """As `take`; an empty `values` (a statistic that was not asked for) stays empty."""
        return self.take(values) if values.numel() else values

    def chunk(self, values: Tensor, part: slice) -> Tensor:
        """The live rows `part` of `values` [total, ...]: a chunk's copy, never all rows."""
        return values[part] if self.kept is None else values.index_select(0, self.kept[part])

    def rows(self, part: slice, alive: Tensor | None) -> Tensor | slice:
        """Where the live rows `part` (of those, only `alive`) lie among all rows."""
        if self.kept is not None:
            rows = self.kept[part]
            return rows if alive is None else rows[alive]
        return part if alive is None else alive + part.start

    def spread(self, values: Tensor) -> Tensor:
        """`values` [live, ...] back in their rows; the ignored rows are 0."""
        if self.kept is None:
            return values
        spread = values.new_zeros(self.total, *values.shape[1:])
        return spread.index_copy_(0, self.kept, values)


class ChunkLogits(NamedTuple):
    """The logits of a head over one row chunk after the other, in buffers that are reused."""

    call: Call
    buffer: Tensor  # [chunk, V] logits, and what is made of them in place
    slope: Tensor | None  # [chunk, V] d(logit)/d(linear output); only with softcap and a gradient

    @classmethod
    def of(cls, call: Call, live: LiveRows) -> "ChunkLogits":
        """Allocate for chunks of the live rows."""
        rows = min(call.step, live.live)
        has_slope = call.work.has_gradient and call.head.softcap is not None
        return cls(call, call.empty(rows), call.empty(rows) if has_slope else None)

    def weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the arithmetic; upcast tile by tile where it differs."""
        weight, dtype, step = self.call.head.weight, self.call.dtype, self.call.blocks.tile_classes
        if weight.dtype == dtype:
            yield slice(0, len(weight)), weight
            return
        # One buffer: the caller still holds a tile when it asks for the next one.
        buffer = weight.new_empty(min(step, len(weight)), weight.shape[1], dtype=dtype)
        for begin in range(0, len(weight), step):
            classes = slice(begin, min(begin + step, len(weight)))
            tile = weight[classes]
            yield classes, buffer[: len(tile)].copy_(tile)

    def fill(self, hidden: Tensor) -> Tensor:
        """The transformed logits of the chunk `hidden` [rows, D], in the buffer; fills `slope`."""
        head = self.call.head
        z = self.buffer[: len(hidden)]
        for classes, tile in self.weight_tiles():
            torch.mm(hidden, tile.t(), out=z[:, classes])
            if head.bias is not None:
                z[:, classes].add_(head.bias[classes].to(z.dtype))
        if head.softcap is None:
            return z if head.slope == 1.0 else z.mul_(head.slope)
        z.mul_(head.logit_scale / head.softcap)
        if self.slope is not None:
            # d tanh(x) = 1 / cosh(x)^2; 1 - tanh(x)^2 would cancel near saturation.
            slope = self.slope[: len(z)]
            torch.cosh(z, out=slope).reciprocal_().square_()
        return z.tanh_().mul_(head.softcap / head.temperature)

    def keep(self, count: int, alive: Tensor | None) -> Tensor:
        """The first `count` rows; only those of `alive` [n] int64, moved to the front in place."""
        if alive is None:
            return self.buffer[:count]
        step = self.call.blocks.rows
        if self.slope is not None:
            move_to_front_(self.slope, alive, step)
        return move_to_front_(self.buffer, alive, step)


def move_to_front_(buffer: Tensor, alive: Tensor, step: int) -> Tensor:
    """The rows `alive` (ascending) of `buffer` [rows, V], moved to its front: a view of them.

    Row k goes to a place at or before its own, so blocks of `step` rows that are moved in order
    overwrite only what has been moved already; a block's copy is all the memory this takes.
    """
    for begin in range(0, len(alive), step):
        rows = alive[begin : begin + step]
        buffer[begin : begin + len(rows)] = buffer.index_select(0, rows)
    return buffer[: len(alive)]


class ChunkSoftmax(NamedTuple):
    """The softmax of the head over one row chunk after the other, and its targets."""

    logits: ChunkLogits
    shard: VocabShard
    target: Tensor  # [n] int64 local class, 0 where the class is another rank's
    is_local: Tensor  # [n] bool
    extra: Tensor | None  # [chunk, V]; only with entropy

    @classmethod
    def of(cls, call: Call, target: Tensor, live: LiveRows) -> "ChunkSoftmax":
        """Allocate for `target` [N]; raises ValueError if a live one is out of range."""
        shard, target = call.shard, live.take(target)
        check_target_range(target, shard.classes)
        local = target - shard.offset
        is_local = (local >= 0) & (local < len(call.head.weight))
        logits = ChunkLogits.of(call, live)
        extra = torch.empty_like(logits.buffer) if call.work.needs_entropy else None
        return cls(logits, shard, local.where(is_local, 0), is_local, extra)

    def forward(self, hidden: Tensor, part: slice) -> "ChunkStats":
        """Statistics of a chunk; the buffer then holds e = exp(logit - maximum).

        With entropy the spare buffer holds e * (logit - maximum).
        """
        z = self.logits.fill(hidden)
        target, is_local = self.target[part], self.is_local[part]
        maximum = self.shard.maximum_(z.amax(1))
        # A row of -inf logits: lse -inf and logprob NaN, as in torch; not inf - inf everywhere.
        maximum = maximum.where(maximum != -torch.inf, 0.0)
        at_target = z.gather(1, target[:, None]).squeeze(1)
        z.sub_(maximum[:, None])
        if self.extra is None:
            z.exp_()
            moment = torch.zeros_like(maximum)
        else:
            shifted = self.extra[: len(z)].copy_(z).clamp_(min=LOG_ZERO)
            moment = shifted.mul_(z.exp_()).sum(1)
        # The target stands apart: beside a probability near 1, a sum would lose the other classes,
        # and they are what its log-prob and its gradient are made of.
        column = target[:, None]
        own = z.gather(1, column)
        others = z.scatter_(1, column, own.masked_fill(is_local[:, None], 0.0)).sum(1)
        z.scatter_(1, column, own)
        found = is_local.to(z.dtype)
        local, own = (torch.where(is_local, x, 0.0) for x in (at_target, own[:, 0]))
        sums = torch.stack((others, own, moment, local, found))
        others, own, moment, local, found = self.shard.sum_(sums)
        at_target = local.where(found > 0, torch.nan)
        total, log_total = others + own, (others + (own - 1)).log1p()
        # H = log(total) - sum(p * (z - max)): both terms >= 0, so nothing cancels.
        entropy = log_total - moment / total
        logprob = (at_target - maximum) - log_total
        return ChunkStats(logprob, maximum + log_total, entropy, total, target, is_local)


class ChunkStats(NamedTuple):
    """Row statistics of a chunk; `total` is the sum of exp(logit - maximum) over all classes."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor  # meaningless unless has_entropy
    total: Tensor
    target: Tensor  # local class
    is_local: Tensor  # bool: this rank holds the target

    def take(self, alive: Tensor | None) -> "ChunkStats":
        """The rows `alive`; all of them if None."""
        return self if alive is None else ChunkStats(*(x[alive] for x in self))

    def set_target_(self, d_logit: Tensor, values: Tensor) -> None:
        """Write the target entry of each row, on the rank that holds it."""
        column = self.target[:, None]
        old = d_logit.gather(1, column)
        d_logit.scatter_(1, column, values[:, None].where(self.is_local[:, None], old))


class GradientSum(NamedTuple):
    """Accumulates d_hidden, d_weight, d_bias over row chunks, in the dtype of the arithmetic."""

    logits: ChunkLogits
    live: LiveRows
    hidden: Tensor | None  # [N, D] in the dtype of hidden: each row is written once
    weight: Tensor | None  # [V, D] accumulator
    bias: Tensor | None  # [V] accumulator
    sink: GradientSink  # its main_grad is `weight`, and holds what other calls have added
    out_dtype: torch.dtype  # of the gradients that are handed out

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        logits: ChunkLogits,
        live: LiveRows,
        sink: GradientSink,
    ) -> "GradientSum":
        """Buffers for what is wanted of `hidden` [N, D]."""
        out_dtype = logits.call.held_dtype
        weight, dtype, wanted = logits.call.head.weight, logits.call.dtype, logits.call.wanted
        # new_*, not *_like: contiguous, as the fake kernels promise, whatever the inputs' strides.
        d_weight = sink.main_grad
        if wanted.weight and d_weight is None:
            d_weight = weight.new_empty(weight.shape, dtype=dtype)
        return cls(
            logits,
            live,
            hidden.new_zeros(hidden.shape, dtype=out_dtype) if wanted.hidden else None,
            d_weight if wanted.weight else None,
            weight.new_zeros(len(weight), dtype=dtype) if wanted.bias else None,
            sink,
            out_dtype,
        )

    def add(
        self,
        part: slice,
        hidden: Tensor,
        d_logit: Tensor,
        alive: Tensor | None,
        missing: Missing | None = None,
    ) -> None:
        """Add a chunk; `d_logit` [rows, V] is scaled in place to d(linear output).

        `hidden` [chunk, D] are all rows of the chunk, `d_logit` those of `alive`. `missing`: of
        all rows of a sparse gradient, whose classes left out are 0.
        """
        logits = self.logits
        if logits.slope is not None:
            d_logit.mul_(logits.slope[: len(d_logit)])
        if logits.call.head.slope != 1.0:
            d_logit.mul_(logits.call.head.slope)
        if alive is not None:
            hidden = hidden[alive]
        if self.hidden is not None:
            d_hidden = torch.zeros_like(hidden)
            for classes, tile in logits.weight_tiles():
                add_product_(d_hidden, d_logit[:, classes], tile)
            if missing is not None:
                missing.take(alive).add_to(d_hidden, hidden, d_logit)
            rows = self.live.rows(part, alive)
            self.hidden[rows] = logits.call.shard.sum_(d_hidden).to(self.hidden.dtype)
        if self.weight is not None and part.start == 0 and self.sink.main_grad is None:
            torch.mm(d_logit.t(), hidden, out=self.weight)  # spares filling it with zeros
        elif self.weight is not None:
            self.weight.addmm_(d_logit.t(), hidden)
        if self.bias is not None:
            self.bias.add_(d_logit.sum(0))

    def result(self) -> HeadGradient:
        """The gradients, [0] where not wanted or in main_grad."""
        dtype = self.logits.call.dtype if self.sink.keeps_fp32 else self.out_dtype

        def nothing(dtype: torch.dtype) -> Tensor:
            return self.logits.buffer.new_empty(0, dtype=dtype)

        weight = None if self.sink.main_grad is not None else self.weight
        if weight is not None and self.live.live == 0:
            weight.zero_()  # no chunk has written it
        return HeadGradient(
            nothing(self.out_dtype) if self.hidden is None else self.hidden,
            nothing(dtype) if weight is None else weight.to(dtype),
            nothing(self.out_dtype) if self.bias is None else self.bias.to(self.out_dtype),
        )
