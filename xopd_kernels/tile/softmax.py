"""The three kernels of a softmax over a linear head: logits, row statistics, gradient.

Every kernel takes the number of live rows from the device (live_ptr) and leaves rows beyond it
alone. Row offsets are int64: 14,000 rows of 152,000 classes pass 2^31 elements.
"""

import triton
import triton.language as tl

from xopd_kernels.tile.dot import narrow, one_minus_exp, tanh, tanh_slope, tile_dot
from xopd_kernels.tile.online_softmax import fold_tile, merge_partials
from xopd_kernels.tile.schedule import grouped_tile


@triton.jit
def logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    live_ptr,
    logits_ptr,
    partial_ptr,
    target_logit_ptr,
    rows,
    V,
    D,
    stride_wv,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLAB_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
):
    """Logits of BLOCK_N rows and a slab of SLAB_TILES * BLOCK_V classes: their statistics.

    Writes partial [3, slabs, rows] and the target logit [rows] (by the one program that meets
    it). logit = x or, if cap is given, tanh(x) * cap, with x = (hidden @ weight + bias) * scale;
    if logits_ptr is given, x goes there [rows, V]: the slope of tanh(x) needs x, near 1 the value
    has lost it.
    """
    live = tl.load(live_ptr)
    slabs = tl.cdiv(V, SLAB_TILES * BLOCK_V)
    row_block, slab = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_N), slabs, GROUP)
    if row_block * BLOCK_N >= live:
        return
    row = tl.cast(row_block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < live
    target = tl.load(target_ptr + row, mask=is_row, other=-1)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    at_target = tl.zeros((BLOCK_N,), tl.float32)
    slab_begin = slab * SLAB_TILES * BLOCK_V
    slab_end = tl.minimum(slab_begin + SLAB_TILES * BLOCK_V, V)
    for first in range(slab_begin, slab_end, BLOCK_V):
        col = first + tl.arange(0, BLOCK_V)
        is_col = col < V
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            k = d + tl.arange(0, BLOCK_D)
            a = tl.load(
                hidden_ptr + row[:, None] * D + k[None, :],
                mask=is_row[:, None] & (k < D)[None, :],
                other=0.0,
            )
            b = tl.load(
                weight_ptr + col[:, None].to(tl.int64) * stride_wv + k[None, :],
                mask=is_col[:, None] & (k < D)[None, :],
                other=0.0,
            )
            z = tile_dot(a, tl.trans(b), z)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + col, mask=is_col, other=0.0).to(tl.float32)[None, :]
        z *= scale
        if logits_ptr is not None:
            # int64 up to the tile, int32 inside it: a pointer for each element would spill.
            z_ptr = logits_ptr + tl.cast(row_block, tl.int64) * BLOCK_N * V + first
            inside = tl.arange(0, BLOCK_N)[:, None] * V + tl.arange(0, BLOCK_V)[None, :]
            tl.store(z_ptr + inside, z, mask=is_row[:, None] & is_col[None, :])
        if cap is not None:
            z = tanh(z) * cap
        z = tl.where(is_col[None, :], z, float("-inf"))
        maximum, total, moment = fold_tile(maximum, total, moment, z, HAS_MOMENT)
        at_target += tl.sum(tl.where(col[None, :] == target[:, None], z, 0.0), 1)
    part_ptr = partial_ptr + tl.cast(slab, tl.int64) * rows + row
    plane = tl.cast(slabs, tl.int64) * rows
    tl.store(part_ptr, maximum, mask=is_row)
    tl.store(part_ptr + plane, total, mask=is_row)
    tl.store(part_ptr + 2 * plane, moment, mask=is_row)
    is_here = is_row & (target >= slab_begin) & (target < slab_end)
    tl.store(target_logit_ptr + row, at_target, mask=is_here)


@triton.jit
def statistics_kernel(
    partial_ptr,
    target_logit_ptr,
    live_ptr,
    logprob_ptr,
    lse_ptr,
    maximum_ptr,
    total_ptr,
    entropy_ptr,
    rows,
    slabs,
    BLOCK_N: tl.constexpr,
):
    """Merge the slabs: the fields of linear_logprob.triton.RowStatistics, each [rows]."""
    live = tl.load(live_ptr)
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < live
    maximum, total, moment = merge_partials(partial_ptr, row, is_row, rows, slabs, BLOCK_N)
    log_total = tl.log(total)
    at_target = tl.load(target_logit_ptr + row, mask=is_row, other=0.0)
    tl.store(logprob_ptr + row, (at_target - maximum) - log_total, mask=is_row)
    tl.store(lse_ptr + row, maximum + log_total, mask=is_row)
    tl.store(maximum_ptr + row, maximum, mask=is_row)
    tl.store(total_ptr + row, total, mask=is_row)
    if entropy_ptr is not None:
        # Both terms are >= 0: nothing cancels.
        tl.store(entropy_ptr + row, log_total - moment / total, mask=is_row)


@triton.jit
def gradient_kernel(
    logits_ptr,
    gradient_ptr,
    target_ptr,
    row_ptr,
    live_ptr,
    logprob_ptr,
    maximum_ptr,
    total_ptr,
    entropy_ptr,
    d_logprob_ptr,
    d_lse_ptr,
    d_entropy_ptr,
    V,
    stride_g,
    slope,
    cap,
    BLOCK_V: tl.constexpr,
):
    """Replace a row of logits by its gradient d(loss)/d(linear output), in place.

    The first *live_ptr of row_ptr, or of all rows without it.

    gradient_ptr is the same memory, in the dtype of the GEMM. A narrower gradient ends before
    the logits that are still to be read; the barrier keeps a tile's store behind its loads.
    p = exp(z - maximum) / total: exp(z - lse) would lose the digits that lse loses by rounding
    where it is far from 0.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    if row >= tl.load(live_ptr):
        return
    if row_ptr is not None:
        row = tl.load(row_ptr + row)
    target = tl.load(target_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    d_logprob = tl.load(d_logprob_ptr + row)
    coefficient = -d_logprob
    # 0 * log(0) must be 0: exp(-1000) is 0 in fp32.
    log_p_target = tl.maximum(tl.load(logprob_ptr + row), -1000.0)
    p_target = tl.exp(log_p_target)
    at_target = d_logprob * one_minus_exp(log_p_target)
    if d_lse_ptr is not None:
        d_lse = tl.load(d_lse_ptr + row)
        coefficient += d_lse
        at_target += d_lse * p_target
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        at_target -= d_entropy * p_target * (log_p_target + entropy)
        # log p + entropy = (z - maximum) - mean.
        mean = tl.log(total) - entropy
        d_entropy /= total
    coefficient /= total
    for first in range(0, V, BLOCK_V):
        col = first + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + row * V + col, mask=col < V, other=0.0)
        tl.debug_barrier()
        chain = slope
        if cap is not None:
            chain = slope * tanh_slope(z)
            z = tanh(z) * cap
        shifted = z - maximum
        e = tl.exp(shifted)
        gradient = e * coefficient
        if d_entropy_ptr is not None:
            shifted = tl.where(shifted < -1000.0, -1000.0, shifted)
            gradient -= e * d_entropy * (shifted - mean)
        gradient = tl.where(col == target, at_target, gradient)
        gradient = narrow(gradient * chain, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * stride_g + col, gradient, mask=col < V)
