"""Kernels that score without logits in device memory: a persistent GEMM, and a fold of tiles.

Both leave partial statistics [3, slabs, rows] (maximum, total, moment) and target logits as
`tile.softmax.logits_kernel` does, for the same kernels to merge.
"""

import triton
import triton.language as tl

from xopd_kernels.tile.dot import tanh, tile_dot
from xopd_kernels.tile.online_softmax import fold_tile
from xopd_kernels.tile.schedule import grouped_tile


@triton.jit
def logits_of(z, bias_ptr, col, V, scale, cap):
    """The logits of z = hidden @ weight.T [N, columns]; -inf where col [columns] is beyond V."""
    is_col = col < V
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, mask=is_col, other=0.0).to(tl.float32)[None, :]
    z *= scale
    if cap is not None:
        z = tanh(z) * cap
    return tl.where(is_col[None, :], z, float("-inf"))


@triton.jit
def halves(z):
    """The left and the right half of the columns of z [N, columns]."""
    folded = tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2))
    return tl.split(tl.permute(folded, (0, 2, 1)))


@triton.jit
def persistent_kernel(
    hidden_desc,
    weight_desc,
    bias_ptr,
    target_ptr,
    live_ptr,
    partial_ptr,
    target_logit_ptr,
    rows,
    V,
    D,
    slabs,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLAB_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
):
    """Statistics of all live rows: a grid of resident programs walks (row block, slab) items.

    hidden_desc [rows, D] in blocks of [BLOCK_N, BLOCK_D] and weight_desc [V, D] in blocks of
    [BLOCK_V, BLOCK_D] are TMA descriptors: what lies outside reads as 0. Items, their tiles and
    the inner dimension are one flattened loop, so that the loads of a tile are in flight during
    the softmax of the tile before it. The tiles of the last slab that lie beyond V fold -inf.
    """
    tl.assume(D > 0)  # or the flattened loop is compiled a second time, without its inner one
    live = tl.load(live_ptr)
    row_blocks = tl.cdiv(live, BLOCK_N)
    programs = tl.num_programs(0)
    items = tl.cdiv(tl.maximum(row_blocks * slabs - tl.program_id(0), 0), programs)
    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    at_target = tl.zeros((BLOCK_N,), tl.float32)
    plane = tl.cast(slabs, tl.int64) * rows
    for step in tl.range(0, items * SLAB_TILES, flatten=True):
        item = tl.program_id(0) + step // SLAB_TILES * programs
        tile = step % SLAB_TILES
        row_block, slab = grouped_tile(item, row_blocks, slabs, GROUP)
        first_row = row_block * BLOCK_N
        first_col = (slab * SLAB_TILES + tile) * BLOCK_V
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            a = hidden_desc.load([first_row, d])
            b = weight_desc.load([first_col, d])
            z = tile_dot(a, tl.trans(b), z)
        row = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_N)
        is_row = row < live
        target = tl.load(target_ptr + row, mask=is_row, other=-1)
        target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        is_first = tile == 0
        maximum = tl.where(is_first, float("-inf"), maximum)
        total = tl.where(is_first, 0.0, total)
        moment = tl.where(is_first, 0.0, moment)
        at_target = tl.where(is_first, 0.0, at_target)
        # An eighth of the tile at a time: the softmax of all of it spills.
        left, right = halves(z)
        quarters = halves(left) + halves(right)
        low = halves(quarters[0]) + halves(quarters[1])
        eighths = low + halves(quarters[2]) + halves(quarters[3])
        col = first_col + tl.arange(0, BLOCK_V // 8)
        for part in tl.static_range(8):
            logits = logits_of(eighths[part], bias_ptr, col, V, scale, cap)
            at_target += tl.sum(tl.where(col[None, :] == target[:, None], logits, 0.0), 1)
            maximum, total, moment = fold_tile(maximum, total, moment, logits, HAS_MOMENT)
            col += BLOCK_V // 8
        # Masks in place of a branch: the loop stays one block for the pipeliner.
        is_done = is_row & (tile == SLAB_TILES - 1)
        part_ptr = partial_ptr + tl.cast(slab, tl.int64) * rows + row
        tl.store(part_ptr, maximum, mask=is_done)
        tl.store(part_ptr + plane, total, mask=is_done)
        tl.store(part_ptr + 2 * plane, moment, mask=is_done)
        slab_begin = slab * SLAB_TILES * BLOCK_V
        is_here = (target >= slab_begin) & (target < slab_begin + SLAB_TILES * BLOCK_V)
        tl.store(target_logit_ptr + row, at_target, mask=is_done & is_here)


@triton.jit
def fold_kernel(
    product_ptr,
    bias_ptr,
    target_ptr,
    live_ptr,
    partial_ptr,
    target_logit_ptr,
    rows,
    first_row,
    first_col,
    columns,
    scale,
    cap,
    BLOCK_V: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
):
    """Fold product [tile rows, columns] = hidden @ weight.T, fp32, into partial [3, 1, rows].

    One program a row; the tile's corner is (first_row, first_col) of the logits, and the tile
    with first_col = 0 starts the statistics.
    """
    tile_row = tl.cast(tl.program_id(0), tl.int64)
    row = first_row + tile_row
    if row >= tl.load(live_ptr):
        return
    target = tl.load(target_ptr + row)
    one = tl.arange(0, 1)
    part_ptr = partial_ptr + row + one
    plane = tl.cast(rows, tl.int64)
    is_begun = (first_col + one) > 0
    maximum = tl.load(part_ptr, mask=is_begun, other=float("-inf"))
    total = tl.load(part_ptr + plane, mask=is_begun, other=0.0)
    moment = tl.load(part_ptr + 2 * plane, mask=is_begun, other=0.0)
    at_target = tl.zeros((1,), tl.float32)
    for first in range(0, columns, BLOCK_V):
        inside = first + tl.arange(0, BLOCK_V)
        is_col = inside < columns
        z = tl.load(product_ptr + tile_row * columns + inside, mask=is_col, other=0.0)
        z = logits_of(z[None, :], bias_ptr, first_col + inside, first_col + columns, scale, cap)
        at_target += tl.sum(tl.where((first_col + inside)[None, :] == target, z, 0.0), 1)
        maximum, total, moment = fold_tile(maximum, total, moment, z, HAS_MOMENT)
    tl.store(part_ptr, maximum)
    tl.store(part_ptr + plane, total)
    tl.store(part_ptr + 2 * plane, moment)
    is_here = (target >= first_col) & (target < first_col + columns)
    tl.store(target_logit_ptr + row + one, at_target, mask=is_here)
