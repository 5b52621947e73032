"""Scoring without gradient: three ways to the same partial statistics, chosen by a table.

Each returns partial [3, slabs, rows] fp32 (maximum, total, moment of each row over a slab of
classes) for the live rows of a chunk and fills their target logits. A row's log-prob depends on
that row alone, to the bit with TILED and PERSISTENT.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xopd_kernels import target as device_target
from xopd_kernels.chunk.config import (
    FOLD_BLOCK_V,
    FOLD_WARPS,
    TMA_ALIGNMENT_BYTES,
    Scoring,
    TileConfig,
    l2_tile,
    select_persistent,
    select_scoring,
)
from xopd_kernels.chunk.triton import ChunkPipeline
from xopd_kernels.tile.scoring import fold_kernel, persistent_kernel


def run_scoring(
    pipeline: ChunkPipeline, hidden: Tensor, part: slice, live_count: Tensor, has_moment: bool
) -> Tensor:
    """Partial statistics of a chunk by the variant that the table names for these inputs.

    Args:
        pipeline: the launches of the call; its target_logit [N] is filled for `part`.
        hidden: [rows, D], the chunk as `pipeline.gather` gives it.
        part: the chunk's rows, in live order.
        live_count: int32 on the device, how many of them count.
        has_moment: whether the moment, which the entropy needs, is computed; 0 if not.
    """
    aligned = is_aligned(hidden, pipeline.weight)
    scoring = select_scoring(pipeline.weight.dtype, pipeline.capability, aligned)
    return run_variant(scoring, pipeline, hidden, part, live_count, has_moment)


def run_variant(
    scoring: Scoring,
    pipeline: ChunkPipeline,
    hidden: Tensor,
    part: slice,
    live_count: Tensor,
    has_moment: bool,
) -> Tensor:
    """`run_scoring` by one variant; all but TILED need a CUDA device.

    Raises:
        ValueError: PERSISTENT on inputs that TMA cannot read, or without a tile for them.
    """
    if scoring is Scoring.TILED:
        return pipeline.run_logits(hidden, part, live_count, None, has_moment)
    sizes = device_target.device_sizes(hidden.device)
    if scoring is Scoring.PERSISTENT:
        tile = select_persistent(pipeline.weight.dtype, pipeline.capability)
        return run_persistent(
            pipeline, hidden, part, live_count, has_moment, tile, sizes.processors
        )
    return run_l2_tile(pipeline, hidden, part, live_count, has_moment, l2_tile(*sizes))


def is_aligned(*matrices: Tensor) -> bool:
    """Whether TMA can read them: address and row stride multiples of 16 bytes, unit stride."""
    return all(
        x.stride(1) == 1
        and x.data_ptr() % TMA_ALIGNMENT_BYTES == 0
        and x.stride(0) * x.element_size() % TMA_ALIGNMENT_BYTES == 0
        for x in matrices
    )


def run_persistent(
    pipeline: ChunkPipeline,
    hidden: Tensor,
    part: slice,
    live_count: Tensor,
    has_moment: bool,
    tile: TileConfig,
    processors: int,
) -> Tensor:
    """A persistent GEMM with the online softmax in its epilogue; dead rows cost nothing.

    Raises:
        ValueError: hidden or weight is not aligned.
    """
    weight = pipeline.weight
    if not is_aligned(hidden, weight):
        raise ValueError(
            "hidden and weight must start at a multiple of 16 bytes and have row strides of such, "
            f"got strides {hidden.stride()} and {weight.stride()} of {weight.dtype}; use "
            "Scoring.TILED"
        )
    rows, vocab_size = len(hidden), len(weight)
    slabs = triton.cdiv(vocab_size, tile.columns * tile.slab_tiles)
    partial = pipeline.target_logit.new_empty(3, slabs, rows)
    scale, cap = pipeline.call.head.scale_and_cap
    programs = min(processors, triton.cdiv(rows, tile.rows) * slabs)
    with device_target.device_guard(hidden):
        persistent_kernel[(programs,)](
            TensorDescriptor.from_tensor(hidden, [tile.rows, tile.inner]),
            TensorDescriptor.from_tensor(weight, [tile.columns, tile.inner]),
            pipeline.bias,
            pipeline.target[part],
            live_count,
            partial,
            pipeline.target_logit[part],
            rows,
            vocab_size,
            hidden.shape[1],
            slabs,
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
    return pipeline.combine(partial, part)


def run_l2_tile(
    pipeline: ChunkPipeline,
    hidden: Tensor,
    part: slice,
    live_count: Tensor,
    has_moment: bool,
    shape: tuple[int, int],
) -> Tensor:
    """torch.mm into one fp32 buffer of `shape` (rows, columns), folded tile by tile.

    cuBLAS needs its sizes on the host: dead rows cost their share of the GEMM (the fold skips
    them), and its choice of algorithm may depend on the number of rows. fp32 inputs multiply as
    torch.backends.cuda.matmul says.
    """
    weight = pipeline.weight
    rows, vocab_size = len(hidden), len(weight)
    partial = pipeline.target_logit.new_empty(3, 1, rows)
    scale, cap = pipeline.call.head.scale_and_cap
    buffer = partial.new_empty(min(shape[0], rows) * min(shape[1], vocab_size))
    with device_target.device_guard(hidden):
        for first_row in range(0, rows, shape[0]):
            a = hidden[first_row : first_row + shape[0]]
            for first_col in range(0, vocab_size, shape[1]):
                b = weight[first_col : first_col + shape[1]]
                product = buffer[: len(a) * len(b)].view(len(a), len(b))
                _multiply(a, b, product)
                fold_kernel[(len(a),)](
                    product,
                    pipeline.bias,
                    pipeline.target[part],
                    live_count,
                    partial,
                    pipeline.target_logit[part],
                    rows,
                    first_row,
                    first_col,
                    len(b),
                    scale,
                    cap,
                    FOLD_BLOCK_V,
                    has_moment,
                    num_warps=FOLD_WARPS,
                )
    return pipeline.combine(partial, part)


def _multiply(a: Tensor, b: Tensor, product: Tensor) -> None:
    """product [M, N] fp32 = a [M, K] @ b [N, K].T, summed in fp32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        # A CPU has no product with a wider result.
        torch.mm(a.float(), b.float().t(), out=product)
    else:
        torch.mm(a, b.t(), out_dtype=torch.float32, out=product)
