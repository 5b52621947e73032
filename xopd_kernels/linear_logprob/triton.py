"""Launches of linear_logprob: scoring without logits, and the gradient of a row chunk.

Row order: live rows first (a stable sort on the device). Their number stays on the device: every
kernel reads it and its programs beyond it return at once, so ignored rows cost neither
arithmetic nor a host synchronisation. linear_policy_loss drives the same kernels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from xopd_kernels import target as device_target
from xopd_kernels.linear_logprob.config import (
    GRADIENT_BLOCK_V,
    GRADIENT_WARPS,
    ROWS_PER_PROGRAM,
    Stage,
    TileConfig,
    chunk_rows,
    select,
)
from xopd_kernels.records import Head, HeadGradient, LinearLogprob, Wanted
from xopd_kernels.tile.matmul import matmul_kernel
from xopd_kernels.tile.softmax import gradient_kernel, logits_kernel, statistics_kernel
from xopd_kernels.validation import check_target_range


def forward(
    hidden: Tensor, head: Head, target: Tensor, ignore_index: int, needs_entropy: bool
) -> LinearLogprob:
    """Log-prob, lse and entropy of each row: hidden [N, D], target [N]. 1U, no logits."""
    live = DeviceRows.of(target != ignore_index, chunk=max(1, len(target)))
    pipeline = ChunkPipeline.of(hidden, head, target, live)
    rows = RowStatistics.zeros(pipeline.target_logit, needs_entropy)
    for part, live_count in live.parts():
        partial = pipeline.run_logits(part, live_count, None, needs_entropy)
        pipeline.run_statistics(partial, part, live_count, rows)
    entropy = rows.lse.new_empty(0) if rows.entropy is None else live.spread(rows.entropy)
    return LinearLogprob(live.spread(rows.logprob), live.spread(rows.lse), entropy)


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

    `entropy` comes from `forward`: with the logits to store, no registers are left for its moment.
    """
    chunk = chunk_rows(len(target), len(head.weight))
    live = DeviceRows.of(target != ignore_index, chunk)
    pipeline = ChunkPipeline.of(hidden, head, target, live)
    up = RowGradients.of(upstream, live)
    rows = RowStatistics.zeros(pipeline.target_logit, has_entropy=False)
    kept_entropy = None if up.entropy is None else live.take(entropy)
    logits = pipeline.empty_logits()
    gradient = GradientSum.of(pipeline, wanted)
    for part, live_count in live.parts():
        partial = pipeline.run_logits(part, live_count, logits, has_moment=False)
        pipeline.run_statistics(partial, part, live_count, rows)
        gradient.add(part, live_count, logits, rows._replace(entropy=kept_entropy), up)
    return gradient.result(live)


class DeviceRows(NamedTuple):
    """The live rows first, in their order; how many there are stays on the device."""

    order: Tensor  # [N] int64
    counts: Tensor  # [chunks] int32: live rows of each chunk
    chunk: int  # rows of a chunk

    @classmethod
    def of(cls, is_live: Tensor, chunk: int) -> "DeviceRows":
        order = torch.sort(is_live.logical_not().to(torch.int8), stable=True).indices
        chunk = max(1, chunk)
        begins = torch.arange(0, len(is_live), chunk, device=is_live.device)
        counts = (is_live.sum() - begins).clamp(0, chunk).to(torch.int32)
        return cls(order, counts, chunk)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's rows and the device tensor that holds its live count."""
        for index in range(len(self.counts)):
            begin = index * self.chunk
            yield slice(begin, min(begin + self.chunk, len(self.order))), self.counts[index]

    def take(self, values: Tensor) -> Tensor:
        """`values` [N, ...] in the order of the live rows."""
        return values.index_select(0, self.order)

    def spread(self, values: Tensor) -> Tensor:
        """`values` [N, ...] back in the order of the input."""
        return torch.empty_like(values).index_copy_(0, self.order, values)


class RowStatistics(NamedTuple):
    """Row statistics [N] fp32 in live order; dead rows are 0."""

    logprob: Tensor
    lse: Tensor
    maximum: Tensor
    total: Tensor  # sum of exp(logit - maximum)
    entropy: Tensor | None

    @classmethod
    def zeros(cls, like: Tensor, has_entropy: bool) -> "RowStatistics":
        """Zeros [N] of the dtype and device of `like` [N]."""
        logprob, lse, maximum, total, *entropy = like.new_zeros(4 + has_entropy, len(like))
        return cls(logprob, lse, maximum, total, entropy[0] if has_entropy else None)

    def part(self, rows: slice) -> "RowStatistics":
        """The fields of these rows."""
        entropy = None if self.entropy is None else self.entropy[rows]
        return RowStatistics(
            self.logprob[rows], self.lse[rows], self.maximum[rows], self.total[rows], entropy
        )


class RowGradients(NamedTuple):
    """Gradients with respect to row statistics: [N] fp32 in live order, None if absent."""

    logprob: Tensor
    lse: Tensor | None
    entropy: Tensor | None

    def part(self, rows: slice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three fields of these rows."""
        logprob, lse, entropy = (None if x is None else x[rows] for x in self)
        return logprob, lse, entropy

    @classmethod
    def of(cls, rows: LinearLogprob, live: DeviceRows) -> "RowGradients":
        has_entropy = rows.entropy.numel() > 0
        entropy = live.take(rows.entropy) if has_entropy else None
        return cls(live.take(rows.logprob), live.take(rows.lse), entropy)


class ChunkPipeline(NamedTuple):
    """The launches of one call: inputs in live order, and the scalars of the logits."""

    hidden: Tensor  # [N, D] in live order, contiguous
    weight: Tensor  # [V, D], unit stride along D
    bias: Tensor | None
    target: Tensor  # [N] in live order
    target_logit: Tensor  # [N] fp32; NaN until a program meets the target
    head: Head
    live: DeviceRows
    capability: int

    @classmethod
    def of(cls, hidden: Tensor, head: Head, target: Tensor, live: DeviceRows) -> "ChunkPipeline":
        """Gather the inputs; raises ValueError if a live CPU target is out of range."""
        weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        is_cuda = hidden.is_cuda
        target = live.take(target)
        if not is_cuda:
            check_target_range(target[: int(live.counts.sum())], len(weight))
        return cls(
            hidden.index_select(0, live.order),
            weight,
            None if head.bias is None else head.bias.contiguous(),
            target,
            hidden.new_full((len(target),), torch.nan, dtype=torch.float32),
            head,
            live,
            # The interpreter has no device; it runs the tiles of the oldest one.
            device_target.cuda_capability(hidden.device) if is_cuda else 80,
        )

    def tile(self, stage: Stage) -> TileConfig:
        """The tile of a GEMM for these inputs."""
        return select(stage, self.weight.dtype, self.capability)

    def empty_logits(self) -> Tensor:
        """The fp32 logits [chunk rows, V] of one chunk, reused by all."""
        shape = (min(self.live.chunk, len(self.target)), len(self.weight))
        return self.hidden.new_empty(shape, dtype=torch.float32)

    def run_logits(
        self, part: slice, live_count: Tensor, logits: Tensor | None, has_moment: bool
    ) -> Tensor:
        """GEMM 1 of a chunk: partial statistics [3, slabs, rows], target logits, logits."""
        rows, vocab_size = part.stop - part.start, len(self.weight)
        tile = self.tile(Stage.LOGITS)
        slabs = triton.cdiv(vocab_size, tile.columns * tile.slab_tiles)
        partial = self.target_logit.new_empty(3, slabs, rows)
        scale, cap = self.head.scale_and_cap
        with device_target.device_guard(self.hidden):
            logits_kernel[(triton.cdiv(rows, tile.rows) * slabs,)](
                self.hidden[part],
                self.weight,
                self.bias,
                self.target[part],
                live_count,
                logits,
                partial,
                self.target_logit[part],
                rows,
                vocab_size,
                self.hidden.shape[1],
                self.weight.stride(0),
                scale,
                cap,
                tile.rows,
                tile.columns,
                tile.inner,
                tile.slab_tiles,
                tile.group,
                has_moment,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        return partial

    def run_statistics(
        self, partial: Tensor, part: slice, live_count: Tensor, rows: RowStatistics
    ) -> None:
        """Merge the partial statistics of a chunk into its part of `rows`."""
        _, slabs, count = partial.shape
        with device_target.device_guard(partial):
            statistics_kernel[(triton.cdiv(count, ROWS_PER_PROGRAM),)](
                partial,
                self.target_logit[part],
                live_count,
                *rows.part(part),
                count,
                slabs,
                ROWS_PER_PROGRAM,
            )


class GradientSum(NamedTuple):
    """d_hidden, d_weight and d_bias, added up over row chunks in a fixed order."""

    pipeline: ChunkPipeline
    hidden: Tensor | None  # [N, D] in live order; dead rows stay 0
    weight: Tensor | None  # [V, D] fp32
    bias: Tensor | None  # [V] fp32

    @classmethod
    def of(cls, pipeline: ChunkPipeline, wanted: Wanted) -> "GradientSum":
        weight = pipeline.weight
        return cls(
            pipeline,
            torch.zeros_like(pipeline.hidden) if wanted.hidden else None,
            weight.new_zeros(weight.shape, dtype=torch.float32) if wanted.weight else None,
            weight.new_zeros(len(weight), dtype=torch.float32) if wanted.bias else None,
        )

    def add(
        self,
        part: slice,
        live_count: Tensor,
        logits: Tensor,
        rows: RowStatistics,
        upstream: RowGradients,
    ) -> None:
        """Turn the chunk's logits into their gradient and add what follows from it.

        `rows` are the statistics [N] and `upstream` the gradients of the loss with respect to
        them, both in live order; None for those without a gradient.
        """
        pipe, head = self.pipeline, self.pipeline.head
        count, vocab_size = part.stop - part.start, logits.shape[1]
        # fp16 would underflow: its gradient stays fp32, see tile.dot.tile_dot.
        kept = rows.part(part)
        is_narrow = pipe.weight.dtype == torch.bfloat16
        d_logit = logits.view(torch.bfloat16)[:, :vocab_size] if is_narrow else logits
        with device_target.device_guard(logits):
            gradient_kernel[(count,)](
                logits,
                d_logit,
                pipe.target[part],
                live_count,
                kept.logprob,
                kept.maximum,
                kept.total,
                kept.entropy,
                *upstream.part(part),
                vocab_size,
                d_logit.stride(0),
                head.slope,
                head.scale_and_cap[1],
                GRADIENT_BLOCK_V,
                num_warps=GRADIENT_WARPS,
                num_stages=1,
            )
            d_logit = d_logit[:count]
            if self.hidden is not None:
                self._multiply(Stage.D_HIDDEN, d_logit, pipe.weight, self.hidden[part], live_count)
            if self.weight is not None:
                hidden = pipe.hidden[part]
                self._multiply(Stage.D_WEIGHT, d_logit.t(), hidden, self.weight, live_count)
            if self.bias is not None:
                ones = pipe.hidden.new_ones(count, 1)
                self._multiply(Stage.D_WEIGHT, d_logit.t(), ones, self.bias[:, None], live_count)

    def _multiply(self, stage: Stage, a: Tensor, b: Tensor, c: Tensor, live_count: Tensor) -> None:
        """c = a @ b for its live rows (D_HIDDEN), or c += a @ b over the live rows (D_WEIGHT)."""
        tile = self.pipeline.tile(stage)
        m, k = a.shape
        n = b.shape[1]
        is_weight = stage is Stage.D_WEIGHT
        matmul_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
            a,
            b,
            c,
            live_count,
            m,
            n,
            k,
            a.stride(0),
            a.stride(1),
            b.stride(0),
            c.stride(0),
            is_weight,
            is_weight,
            tile.rows,
            tile.columns,
            tile.inner,
            tile.group,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def result(self, live: DeviceRows) -> HeadGradient:
        """The gradients in the dtypes of their tensors; [0] where not wanted."""
        dtype = self.pipeline.weight.dtype
        nothing = self.pipeline.hidden.new_empty
        return HeadGradient(
            nothing(0) if self.hidden is None else live.spread(self.hidden),
            nothing(0) if self.weight is None else self.weight.to(dtype),
            nothing(0) if self.bias is None else self.bias.to(dtype),
        )
