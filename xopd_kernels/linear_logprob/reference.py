"""Log-probability of a linear head in eager torch: the oracle and Backend.REFERENCE at once.

Rows are processed in chunks, so that no tensor of N * V elements exists. Everything is computed
in float32 (float64 for float64 inputs) from upcast inputs: log-probs that come from logits rounded
to bf16 are off by up to 0.06 nat and can be positive. Deterministic: fixed chunk order, no atomics.

Memory: one [rows, V] buffer of at most CHUNK_BYTES (at least MIN_CHUNK_ROWS rows), a second one
with softcap (its slope) and one more with entropy, which divide the rows; low-precision weights
are upcast in tiles of at most TILE_BYTES.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.records import Head, HeadGradient, LinearLogprob, Wanted
from xopd_kernels.shard import VocabShard
from xopd_kernels.validation import check_target_range

CHUNK_BYTES = 32 * 2**20
TILE_BYTES = 16 * 2**20
MIN_CHUNK_ROWS = 16
_LOG_ZERO = -1000.0  # exp(_LOG_ZERO) == 0 even in float64; keeps 0 * log(0) at 0, not NaN


def forward(
    hidden: Tensor, head: Head, target: Tensor, ignore_index: int, needs_entropy: bool
) -> LinearLogprob:
    """Log-prob, lse and entropy of each row: hidden [N, D], target [N]. 1U."""
    live = LiveRows.of(target != ignore_index)
    softmax = ChunkSoftmax.of(head, live.take(target), needs_entropy)
    rows_hidden = live.take(hidden)
    rows = [torch.empty(live.live, dtype=softmax.dtype, device=hidden.device) for _ in range(3)]
    for part in softmax.parts():
        stats = softmax.forward(rows_hidden[part].to(softmax.dtype), part)
        rows[0][part], rows[1][part] = stats.logprob, stats.lse
        if needs_entropy:
            rows[2][part] = stats.entropy
    entropy = live.spread(rows[2]) if needs_entropy else rows[2].new_empty(0)
    return LinearLogprob(live.spread(rows[0]), live.spread(rows[1]), entropy)


def backward(
    upstream: LinearLogprob,
    entropy: Tensor,
    hidden: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    wanted: Wanted,
) -> HeadGradient:
    """Gradients from recomputed logits: U + U for each of d_hidden, d_weight that is wanted.

    d_logit = g * (1[y] - p) + g_lse * p - g_entropy * p * (log p + entropy), per row, with
    `upstream` = (g, g_lse, g_entropy) and `entropy` from `forward`. p = exp(z - maximum) / total:
    exp(z - lse) would lose the digits that lse loses by rounding where it is far from 0.
    """
    live = LiveRows.of(target != ignore_index)
    has_entropy = upstream.entropy.numel() > 0
    softmax = ChunkSoftmax.of(head, live.take(target), has_entropy)
    rows_hidden = live.take(hidden)
    gradient = GradientSum.of(rows_hidden, softmax, wanted)
    up = LinearLogprob(*(live.take_any(x) for x in upstream))
    entropy = live.take_any(entropy)
    for part in softmax.parts():
        chunk_hidden = rows_hidden[part].to(softmax.dtype)
        stats = softmax.forward(chunk_hidden, part)
        d_logit = softmax.buffer[: len(chunk_hidden)]
        log_p_target = stats.logprob.clamp(min=_LOG_ZERO)
        coefficient = up.lse[part] - up.logprob[part]
        # g * (1 - p) without the cancellation of 1 - p, plus what lse and entropy add.
        at_target = -up.logprob[part] * log_p_target.expm1() + up.lse[part] * log_p_target.exp()
        if has_entropy:
            # log p + entropy = (z - maximum) - mean.
            g_entropy = up.entropy[part]
            mean = stats.total.log() - entropy[part]
            coefficient = coefficient + g_entropy * mean
            moment = softmax.spare(len(d_logit)).mul_((g_entropy / stats.total)[:, None])
            d_logit.mul_((coefficient / stats.total)[:, None]).sub_(moment)
            at_target -= g_entropy * log_p_target.exp() * (log_p_target + entropy[part])
        else:
            d_logit.mul_((coefficient / stats.total)[:, None])
        softmax.set_target_(d_logit, part, at_target)
        gradient.add(part, chunk_hidden, d_logit)
    return gradient.result(hidden, live)


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

    def take(self, values: Tensor) -> Tensor:
        """The live rows of `values` [total, ...]."""
        return values if self.kept is None else values.index_select(0, self.kept)

    def take_any(self, values: Tensor) -> Tensor:
        """As `take`; an empty `values` (a statistic that was not asked for) stays empty."""
        return self.take(values) if values.numel() else values

    def spread(self, values: Tensor) -> Tensor:
        """`values` [live, ...] back in their rows; the ignored rows are 0."""
        if self.kept is None:
            return values
        spread = values.new_zeros(self.total, *values.shape[1:])
        return spread.index_copy_(0, self.kept, values)


class ChunkSoftmax(NamedTuple):
    """The softmax of the head over one row chunk after the other, in buffers that are reused."""

    head: Head
    shard: VocabShard
    target: Tensor  # [n] int64 local class, 0 where the class is another rank's
    is_local: Tensor  # [n] bool
    dtype: torch.dtype  # of all arithmetic
    buffer: Tensor  # [rows, V] logits, then their exponentials or gradients
    slope: Tensor | None  # [rows, V] d(logit)/d(linear output); only with softcap
    extra: Tensor | None  # [rows, V]; only with entropy

    @classmethod
    def of(cls, head: Head, target: Tensor, has_entropy: bool) -> "ChunkSoftmax":
        """Allocate for `target` [n] (live rows only); raises ValueError if it is out of range."""
        weight = head.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shard = VocabShard.of(weight, head.vocab_group)
        # Chunks from the whole vocabulary: every rank of a group must cut the rows alike, however
        # uneven the shards, or their collectives would not meet.
        vocab_size = weight.shape[0] if shard.group is None else int(shard.vocab_size)
        if shard.group is None or target.device.type == "cpu":
            check_target_range(target, vocab_size)
        local = target - shard.offset
        is_local = (local >= 0) & (local < weight.shape[0])
        count = 1 + (head.softcap is not None) + has_entropy
        rows = min(chunk_rows(vocab_size * count, dtype), len(target))
        shape = (rows, weight.shape[0])
        first, *more = (torch.empty(shape, dtype=dtype, device=weight.device) for _ in range(count))
        extra = more.pop() if has_entropy else None
        slope = more.pop() if more else None
        return cls(head, shard, local.where(is_local, 0), is_local, dtype, first, slope, extra)

    def parts(self) -> Iterator[slice]:
        """The row chunks in order."""
        step = max(1, len(self.buffer))
        for begin in range(0, len(self.target), step):
            yield slice(begin, min(begin + step, len(self.target)))

    def spare(self, rows: int) -> Tensor:
        """The second [rows, V] buffer that entropy needs."""
        if self.extra is None:
            raise RuntimeError("ChunkSoftmax was made with has_entropy=False")
        return self.extra[:rows]

    def weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the arithmetic; upcast tile by tile where it differs."""
        weight = self.head.weight
        if weight.dtype == self.dtype:
            yield slice(0, len(weight)), weight
            return
        step = max(1, TILE_BYTES // (weight.shape[1] * self.dtype.itemsize))
        for begin in range(0, len(weight), step):
            classes = slice(begin, min(begin + step, len(weight)))
            yield classes, weight[classes].to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The transformed logits of the chunk `hidden` [rows, D], in the buffer; fills `slope`."""
        head = self.head
        z = self.buffer[: len(hidden)]
        for classes, tile in self.weight_tiles():
            torch.mm(hidden, tile.t(), out=z[:, classes])
        if head.bias is not None:
            z.add_(head.bias.to(self.dtype))
        if head.softcap is None or self.slope is None:
            return z if head.slope == 1.0 else z.mul_(head.slope)
        z.mul_(head.logit_scale / head.softcap)
        # d tanh(x) = 1 / cosh(x)^2; 1 - tanh(x)^2 would cancel near saturation.
        slope = self.slope[: len(z)]
        torch.cosh(z, out=slope).reciprocal_().square_()
        return z.tanh_().mul_(head.softcap / head.temperature)

    def forward(self, hidden: Tensor, part: slice) -> "ChunkStats":
        """Statistics of a chunk; the buffer then holds e = exp(logit - maximum).

        With entropy the spare buffer holds e * (logit - maximum).
        """
        z = self.logits(hidden)
        target, is_local = self.target[part], self.is_local[part]
        maximum = self.shard.maximum_(z.amax(1))
        # A row of -inf logits: lse -inf and logprob NaN, as in torch; not inf - inf everywhere.
        maximum = maximum.where(maximum != -torch.inf, 0.0)
        at_target = z.gather(1, target[:, None]).squeeze(1)
        z.sub_(maximum[:, None])
        if self.extra is None:
            total = z.exp_().sum(1)
            moment = total
        else:
            shifted = self.extra[: len(z)].copy_(z).clamp_(min=_LOG_ZERO)
            total = z.exp_().sum(1)
            moment = shifted.mul_(z).sum(1)
        found = is_local.to(self.dtype)
        local = torch.where(is_local, at_target, 0.0)
        total, moment, local, found = self.shard.sum_(torch.stack((total, moment, local, found)))
        at_target = local.where(found > 0, torch.nan)
        log_total = total.log()
        # H = log(total) - sum(p * (z - max)): both terms >= 0, so nothing cancels.
        entropy = log_total - moment / total
        logprob = (at_target - maximum) - log_total
        return ChunkStats(logprob, maximum + log_total, entropy, total)

    def set_target_(self, d_logit: Tensor, part: slice, values: Tensor) -> None:
        """Write the target entry of each row, on the rank that holds it."""
        column = self.target[part, None]
        old = d_logit.gather(1, column)
        d_logit.scatter_(1, column, values[:, None].where(self.is_local[part, None], old))


class ChunkStats(NamedTuple):
    """Row statistics of a chunk; `total` is the sum of exp(logit - maximum) over all classes."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor  # meaningless unless has_entropy
    total: Tensor


class GradientSum(NamedTuple):
    """Accumulates d_hidden, d_weight, d_bias over row chunks, in the dtype of the arithmetic."""

    softmax: ChunkSoftmax
    hidden: Tensor | None  # [n, D] in the dtype of hidden: each row is written once
    weight: Tensor | None  # [V, D] float32 accumulator
    bias: Tensor | None  # [V] float32 accumulator

    @classmethod
    def of(cls, hidden: Tensor, softmax: ChunkSoftmax, wanted: Wanted) -> "GradientSum":
        """Zeros for what is wanted; `hidden` [n, D] are the live rows."""
        weight, dtype = softmax.head.weight, softmax.dtype
        # new_*, not *_like: contiguous, as the fake kernels promise, whatever the inputs' strides.
        return cls(
            softmax,
            hidden.new_empty(hidden.shape) if wanted.hidden else None,
            weight.new_zeros(weight.shape, dtype=dtype) if wanted.weight else None,
            weight.new_zeros(len(weight), dtype=dtype) if wanted.bias else None,
        )

    def add(self, part: slice, hidden: Tensor, d_logit: Tensor) -> None:
        """Add a chunk; `d_logit` [rows, V] is scaled in place to d(linear output)."""
        softmax = self.softmax
        if softmax.slope is not None:
            d_logit.mul_(softmax.slope[: len(d_logit)])
        if softmax.head.slope != 1.0:
            d_logit.mul_(softmax.head.slope)
        if self.hidden is not None:
            d_hidden = torch.zeros_like(hidden)
            for classes, tile in softmax.weight_tiles():
                d_hidden.addmm_(d_logit[:, classes], tile)
            self.hidden[part] = softmax.shard.sum_(d_hidden)
        if self.weight is not None:
            self.weight.addmm_(d_logit.t(), hidden)
        if self.bias is not None:
            self.bias.add_(d_logit.sum(0))

    def result(self, hidden: Tensor, live: LiveRows) -> HeadGradient:
        """The gradients in the dtypes of their tensors; [0] where not wanted."""
        weight = self.softmax.head.weight
        nothing = hidden.new_empty(0)
        return HeadGradient(
            nothing if self.hidden is None else live.spread(self.hidden),
            nothing.clone() if self.weight is None else self.weight.to(weight.dtype),
            nothing.clone() if self.bias is None else self.bias.to(weight.dtype),
        )


def chunk_rows(row_elements: int, dtype: torch.dtype) -> int:
    """Rows of a chunk whose buffers have `row_elements` elements a row."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (row_elements * dtype.itemsize))
