"""Row chunks on a device: what every Backend.TRITON implementation is made of."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from xopd_kernels import target as device_target
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.config import (
    GRADIENT_BLOCK_V,
    GRADIENT_WARPS,
    ROWS_PER_PROGRAM,
    Stage,
    TileConfig,
    select,
)
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowGradients, RowStatistics
from xopd_kernels.records import GradientSink, HeadGradient
from xopd_kernels.tile.matmul import matmul_kernel
from xopd_kernels.tile.softmax import gradient_kernel, logits_kernel, statistics_kernel
from xopd_kernels.validation import check_target_range


class ChunkPipeline(NamedTuple):
    """The launches of one call for one head: tensors as the kernels read them."""

    call: Call
    live: DeviceRows
    weight: Tensor  # [V, D], unit stride along D
    bias: Tensor | None
    target: Tensor  # [N] local class in live order; -1 where another rank holds it
    target_logit: Tensor  # [N] fp32; NaN until a program meets the target
    capability: int

    @classmethod
    def of(cls, call: Call, target: Tensor, live: DeviceRows) -> "ChunkPipeline":
        """Order the targets; ValueError if a live CPU target is out of range, or V is too large."""
        head, shard = call.head, call.shard
        weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        # The interpreter has no device; it runs the tiles of the oldest one.
        capability = device_target.cuda_capability(weight.device) if weight.is_cuda else 80
        tile = select(Stage.LOGITS, weight.dtype, capability)
        if len(weight) * tile.rows >= 2**31:
            raise ValueError(
                f"weight has V={len(weight)} classes; TRITON counts the elements of a tile's rows "
                f"in 32 bits: at most {2**31 // tile.rows - 1}"
            )
        target = live.take(target)
        if not target.is_cuda:
            check_target_range(target[: int(live.counts.sum())], shard.classes)
        if shard.group is not None:
            local = target - shard.offset
            target = local.where((local >= 0) & (local < len(weight)), -1)
        target_logit = head.weight.new_full(target.shape, torch.nan, dtype=torch.float32)
        bias = None if head.bias is None else head.bias.contiguous()
        return cls(call, live, weight, bias, target, target_logit, capability)

    def tile(self, stage: Stage) -> TileConfig:
        """The tile of a GEMM for these inputs."""
        return select(stage, self.weight.dtype, self.capability)

    def empty_logits(self) -> Tensor:
        """The fp32 logits [chunk rows, V] of one chunk, reused by all."""
        return self.call.empty(min(self.call.step, len(self.target)))

    def gather(self, hidden: Tensor, part: slice) -> Tensor:
        """The rows `part`, in live order, of hidden [N, D]: a chunk's copy."""
        return hidden.index_select(0, self.live.order[part])

    def run_logits(
        self,
        hidden: Tensor,
        part: slice,
        live_count: Tensor,
        logits: Tensor | None,
        has_moment: bool,
    ) -> Tensor:
        """GEMM 1 of `hidden` [rows, D]: partial statistics [3, slabs, rows], target logits, logits.

        The statistics are those of all ranks' classes.
        """
        rows, vocab_size = len(hidden), len(self.weight)
        tile = self.tile(Stage.LOGITS)
        slabs = triton.cdiv(vocab_size, tile.columns * tile.slab_tiles)
        partial = self.target_logit.new_empty(3, slabs, rows)
        scale, cap = self.call.head.scale_and_cap
        with device_target.device_guard(hidden):
            logits_kernel[(triton.cdiv(rows, tile.rows) * slabs,)](
                hidden,
                self.weight,
                self.bias,
                self.target[part],
                live_count,
                logits,
                partial,
                self.target_logit[part],
                rows,
                vocab_size,
                hidden.shape[1],
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
        return self.combine(partial, part)

    def combine(self, partial: Tensor, part: slice) -> Tensor:
        """The partial statistics over all ranks [3, 1, rows]; unchanged if nothing is sharded."""
        shard = self.call.shard
        if shard.group is None:
            return partial
        maximum, total, moment = partial
        base = shard.maximum_(maximum.amax(0))
        base = base.where(base != -torch.inf, 0.0)
        delta = (maximum - base).where(maximum != -torch.inf, 0.0)
        scale = (maximum - base).exp()
        sums = ((total * scale).sum(0), ((moment + delta * total) * scale).sum(0))
        found = self.target[part] >= 0
        at_target = self.target_logit[part].where(found, 0.0)
        total, moment, at_target, found = shard.sum_(torch.stack((*sums, at_target, found.float())))
        self.target_logit[part] = at_target.where(found > 0, torch.nan)
        return torch.stack((base, total, moment))[:, None]

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

    def run_gradient(
        self,
        logits: Tensor,
        part: slice,
        alive: Alive,
        rows: RowStatistics,
        upstream: RowGradients,
    ) -> Tensor:
        """The logits of the chunk's `alive` rows become d(loss)/d(linear output), in place.

        `rows` are the statistics [N] and `upstream` the gradients of the loss with respect to
        them, both in live order.
        """
        head, kept = self.call.head, rows.part(part)
        d_logit = narrow_view(logits, self.weight.dtype)
        with device_target.device_guard(logits):
            gradient_kernel[(part.stop - part.start,)](
                logits,
                d_logit,
                self.target[part],
                alive.rows,
                alive.live_count,
                kept.logprob,
                kept.maximum,
                kept.total,
                kept.entropy,
                *upstream.part(part),
                logits.shape[1],
                d_logit.stride(0),
                head.slope,
                head.scale_and_cap[1],
                GRADIENT_BLOCK_V,
                num_warps=GRADIENT_WARPS,
                num_stages=1,
            )
        return d_logit[: part.stop - part.start]


def narrow_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of the fp32 `logits` [rows, V] as the gradient that replaces them.

    bf16 for bf16 weights. fp16 would underflow: its gradient stays fp32, see tile.dot.tile_dot.
    """
    if dtype != torch.bfloat16:
        return logits
    return logits.view(torch.bfloat16)[:, : logits.shape[1]]


class GradientSum(NamedTuple):
    """d_hidden, d_weight and d_bias, added up over row chunks in a fixed order."""

    pipeline: ChunkPipeline
    hidden: Tensor | None  # [N, D]; dead rows stay 0
    weight: Tensor | None  # [V, D] as it is handed out, or main_grad
    total: Tensor | None  # [V, D] fp32 sum of the chunks; `weight` itself where that is fp32
    bias: Tensor | None  # [V] fp32
    sink: GradientSink
    out_dtype: torch.dtype  # of the gradients that are handed out

    @classmethod
    def of(
        cls,
        pipeline: ChunkPipeline,
        hidden: Tensor,
        sink: GradientSink,
    ) -> "GradientSum":
        """Buffers for what is wanted of `hidden` [N, D]."""
        out_dtype = pipeline.call.held_dtype
        main_grad, weight = sink.main_grad, pipeline.weight
        wanted, live = pipeline.call.wanted, pipeline.live
        out = total = None
        if wanted.weight:
            dtype = torch.float32 if sink.keeps_fp32 else out_dtype
            out = (
                main_grad if main_grad is not None else weight.new_empty(weight.shape, dtype=dtype)
            )
            if len(live.counts) == 0:
                out = out if main_grad is not None else out.zero_()
            elif out.dtype == torch.float32:
                total = out
            elif len(live.counts) > 1:
                total = weight.new_empty(weight.shape, dtype=torch.float32)
        return cls(
            pipeline,
            hidden.new_zeros(hidden.shape, dtype=out_dtype) if wanted.hidden else None,
            out,
            total,
            weight.new_zeros(len(weight), dtype=torch.float32) if wanted.bias else None,
            sink,
            out_dtype,
        )

    def add(self, part: slice, hidden: Tensor, d_logit: Tensor, alive: Alive) -> None:
        """Add a chunk: `hidden` [rows, D] as gathered, d(loss)/d(linear output) [rows, V]."""
        live = self.pipeline.live
        order = live.order[part]
        with device_target.device_guard(d_logit):
            if self.hidden is not None:
                out_row = order if alive.rows is None else order.index_select(0, alive.rows)
                self._add_hidden(d_logit, out_row, alive)
            if self.weight is not None:
                is_first, is_last = part.start == 0, part.stop == len(live.order)
                base = None if is_first and self.sink.main_grad is None else self.total
                out = self.weight if is_last or self.total is None else self.total
                self._multiply(Stage.D_WEIGHT, d_logit.t(), hidden, base, out, alive)
            if self.bias is not None:
                ones, bias = hidden.new_ones(len(hidden), 1), self.bias[:, None]
                self._multiply(Stage.D_WEIGHT, d_logit.t(), ones, bias, bias, alive)

    def _add_hidden(self, d_logit: Tensor, out_row: Tensor, alive: Alive) -> None:
        if self.hidden is None:
            raise RuntimeError("d_hidden is not wanted")
        pipe = self.pipeline
        if pipe.call.shard.group is None:
            self._multiply(Stage.D_HIDDEN, d_logit, pipe.weight, None, self.hidden, alive, out_row)
            return
        # A sum over ranks is rounded once, after it.
        partial = d_logit.new_zeros(len(d_logit), self.hidden.shape[1], dtype=torch.float32)
        self._multiply(Stage.D_HIDDEN, d_logit, pipe.weight, None, partial, alive)
        d_hidden = pipe.call.shard.sum_(partial).to(self.hidden.dtype)
        self.hidden.index_copy_(0, out_row, d_hidden)

    def _multiply(
        self,
        stage: Stage,
        a: Tensor,
        b: Tensor,
        base: Tensor | None,
        c: Tensor,
        alive: Alive,
        c_row: Tensor | None = None,
    ) -> None:
        """c = a @ b for the rows alive (D_HIDDEN), or c = base + a @ b over them (D_WEIGHT)."""
        tile = self.pipeline.tile(stage)
        m, k = a.shape
        n = b.shape[1]
        matmul_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
            a,
            b,
            base,
            c,
            alive.rows,
            c_row,
            alive.live_count,
            m,
            n,
            k,
            a.stride(0),
            a.stride(1),
            b.stride(0),
            c.stride(0),
            stage is Stage.D_WEIGHT,
            base is c,
            tile.rows,
            tile.columns,
            tile.inner,
            tile.group,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def result(self) -> HeadGradient:
        """The gradients in the dtypes of their tensors; [0] where not wanted or in main_grad."""
        nothing = self.pipeline.weight.new_empty(0, dtype=self.out_dtype)
        weight = None if self.sink.main_grad is not None else self.weight
        return HeadGradient(
            nothing.clone() if self.hidden is None else self.hidden,
            nothing.clone() if weight is None else weight,
            nothing if self.bias is None else self.bias.to(self.out_dtype),
        )
