"""Sparse rows: lists of the few classes that hold a row's mass.

A row's list holds the classes of its highest levels, in class order; a level is a power of 2 of
e = exp(logit - maximum), so that a comparison of exponents decides and ties are never broken.
Sums run over blocks of classes in a fixed order.
"""

import triton
import triton.language as tl

from xopd_kernels.tile.divergence import capped
from xopd_kernels.tile.dot import tanh_slope
from xopd_kernels.tile.online_softmax import fold_tile

LEVELS = tl.constexpr(64)  # powers of 2 below a row's largest probability that a list may end at
FIRST_SHARE = tl.constexpr(16)  # the first sweep lists p >= 1 / (16 K): 16 K classes at most


@triton.jit
def level_of(e):
    """k with 2^-k <= e < 2^(1 - k), for e in [0, 1]; 127 where e is 0 or denormal."""
    return 127 - (e.to(tl.int32, bitcast=True) >> 23)


@triton.jit
def load_exponentials(logits_ptr, col, V, maximum, cap):
    """(x, logit - maximum, e = exp of that, whether it is a class) of a block of a row.

    A NaN is no class: its e is 0.
    """
    x = tl.load(logits_ptr + col, mask=col < V, other=float("nan"))
    shifted = capped(x, cap) - maximum
    is_class = shifted == shifted
    return x, shifted, tl.where(is_class, tl.exp(shifted), 0.0), is_class


@triton.jit
def list_sweep(
    logits_ptr,
    target,
    maximum,
    total,
    ids_ptr,
    p_ptr,
    slope_ptr,
    level,
    V,
    K,
    slope,
    cap,
    BLOCK_V: tl.constexpr,
):
    """List the classes of a row whose level is below `level`, and the target.

    Returns how many they are (only K are written), the sum of e over all others, and the sum of
    e * (logit - maximum) over all.
    """
    outside = tl.zeros((BLOCK_V,), tl.float32)
    moment = tl.zeros((BLOCK_V,), tl.float32)
    count = 0
    for first in range(0, V, BLOCK_V):
        col = first + tl.arange(0, BLOCK_V)
        x, shifted, e, is_class = load_exponentials(logits_ptr, col, V, maximum, cap)
        moment += tl.where(e == 0, 0.0, e * shifted)
        is_listed = is_class & ((level_of(e) < level) | (col == target))
        outside += tl.where(is_listed, 0.0, e)
        listed = is_listed.to(tl.int32)
        found = tl.sum(listed, 0)
        if found > 0:
            rank = count + tl.cumsum(listed, 0) - listed
            is_kept = is_listed & (rank < K)
            tl.store(ids_ptr + rank, col, mask=is_kept)
            tl.store(p_ptr + rank, e / total, mask=is_kept)
            if slope_ptr is not None:
                tl.store(slope_ptr + rank, slope * tanh_slope(x), mask=is_kept)
        count += found
    return count, tl.sum(outside, 0), tl.sum(moment, 0)


@triton.jit
def lowest_level(logits_ptr, target, maximum, V, K, cap, BLOCK_V: tl.constexpr):
    """The highest `level` for which `list_sweep` lists at most K classes, the target among them."""
    histogram = tl.zeros((LEVELS,), tl.int32)
    for first in range(0, V, BLOCK_V):
        col = first + tl.arange(0, BLOCK_V)
        _, _, e, is_class = load_exponentials(logits_ptr, col, V, maximum, cap)
        level = tl.maximum(tl.minimum(level_of(e), LEVELS - 1), 0)
        level = tl.where(is_class & (col != target), level, LEVELS - 1)
        histogram += tl.histogram(level, LEVELS)
    # The last level holds what counts nowhere.
    fits = (tl.cumsum(histogram, 0) < K) & (tl.arange(0, LEVELS) < LEVELS - 1)
    return tl.sum(fits.to(tl.int32), 0)


@triton.jit
def list_kernel(
    logits_ptr,
    target_ptr,
    live_ptr,
    maximum_ptr,
    total_ptr,
    enough_ptr,
    ids_ptr,
    p_ptr,
    slope_ptr,
    count_ptr,
    outside_ptr,
    entropy_ptr,
    V,
    K,
    stride,
    slope,
    cap,
    BLOCK_V: tl.constexpr,
):
    """A list of each row of logits [rows, V]: ids, p and, if wanted, d(logit)/d(linear output).

    At most K - 1 classes and the target, in class order; the lists lie `stride` elements apart.
    outside [rows] is the mass of the other classes. One sweep where the first guess leaves no more
    than enough [rows] outside; else one that counts, and one with the lowest level that fits.
    entropy_ptr: None, or where the entropy [rows] goes.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    if row >= tl.load(live_ptr):
        return
    target = -1
    if target_ptr is not None:
        target = tl.load(target_ptr + row).to(tl.int32)
    maximum = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    logits_ptr += row * V
    ids_ptr += row * stride
    p_ptr += row * stride
    if slope_ptr is not None:
        slope_ptr += row * stride
    level = tl.minimum(level_of(total / (FIRST_SHARE * K)) + 1, LEVELS - 1)
    count, outside, moment = list_sweep(
        logits_ptr, target, maximum, total, ids_ptr, p_ptr, slope_ptr, level, V, K, slope, cap,
        BLOCK_V,
    )  # fmt: skip
    if entropy_ptr is not None:
        # Both terms are >= 0: nothing cancels.
        tl.store(entropy_ptr + row, tl.log(total) - moment / total)
    if (count > K) | (outside > tl.load(enough_ptr + row) * total):
        lowest = lowest_level(logits_ptr, target, maximum, V, K, cap, BLOCK_V)
        if (count > K) | (lowest > level):
            # The list of the first sweep is overwritten: its stores come first.
            tl.debug_barrier()
            count, outside, moment = list_sweep(
                logits_ptr, target, maximum, total, ids_ptr, p_ptr, slope_ptr, lowest, V, K, slope,
                cap, BLOCK_V,
            )  # fmt: skip
    tl.store(count_ptr + row, tl.minimum(count, K))
    tl.store(outside_ptr + row, outside / total)


@triton.jit
def rest_kernel(
    logits_ptr,
    ids_ptr,
    live_ptr,
    top_ptr,
    rest_ptr,
    V,
    K,
    cap,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of all classes but the ids [rows, K]: the largest logit, and the sum of exp(logit - that).

    The ids, no two of a row alike, become NaN in the logits [rows, V]. Without other classes: -inf
    and 0; the sum is NaN where another class is.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    if row >= tl.load(live_ptr):
        return
    logits_ptr += row * V
    for first in range(0, K, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + row * K + slot, mask=slot < K, other=0)
        tl.store(logits_ptr + ids, tl.full((BLOCK_K,), float("nan"), tl.float32), mask=slot < K)
    tl.debug_barrier()
    maximum = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    marks = 0
    for first in range(0, V, BLOCK_V):
        col = first + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + col, mask=col < V, other=float("nan"))
        z = tl.where(x == x, capped(x, cap), float("-inf"))[None, :]
        marks += tl.sum(((x != x) & (col < V)).to(tl.int32), 0)
        maximum, total, _ = fold_tile(maximum, total, 0.0, z, False)
    total = tl.where(marks > K, float("nan"), total)
    one = tl.arange(0, 1)
    tl.store(top_ptr + row + one, maximum)
    tl.store(rest_ptr + row + one, total)


@triton.jit
def keep_kernel(
    ids_ptr,
    p_ptr,
    slope_ptr,
    count_ptr,
    target_ptr,
    size_ptr,
    floor_ptr,
    factor_ptr,
    at_target_ptr,
    stride,
    slope,
    BLOCK_K: tl.constexpr,
):
    """Of the lists, in place: the target, and the classes with size [rows] * p > floor [rows].

    p becomes the value of the entry, factor [rows] * p, or at_target [rows], times the slope.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    count = tl.load(count_ptr + row)
    target = -1
    at_target = 0.0
    if target_ptr is not None:
        target = tl.load(target_ptr + row).to(tl.int32)
        at_target = tl.load(at_target_ptr + row)
    size = tl.load(size_ptr + row)
    floor = tl.load(floor_ptr + row)
    factor = tl.load(factor_ptr + row)
    kept = count * 0
    for first in range(0, count, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        is_slot = slot < count
        slot += row * stride
        ids = tl.load(ids_ptr + slot, mask=is_slot, other=-1)
        p = tl.load(p_ptr + slot, mask=is_slot, other=0.0)
        chain = slope
        if slope_ptr is not None:
            chain = tl.load(slope_ptr + slot, mask=is_slot, other=0.0)
        # What is kept moves to the front, over entries that have been read.
        tl.debug_barrier()
        is_target = ids == target
        is_kept = is_slot & (is_target | (size * p > floor))
        kept_one = is_kept.to(tl.int32)
        place = row * stride + kept + tl.cumsum(kept_one, 0) - kept_one
        tl.store(ids_ptr + place, ids, mask=is_kept)
        tl.store(p_ptr + place, tl.where(is_target, at_target, factor * p) * chain, mask=is_kept)
        kept += tl.sum(kept_one, 0)
    tl.store(count_ptr + row, kept)


@triton.jit
def left_out(logits_ptr, col, V, maximum, cap):
    """e of a block of classes, fp64; 0 where a NaN marks what is kept, and beyond V."""
    x = tl.load(logits_ptr + col, mask=col < V, other=float("nan"))
    shifted = tl.where(x == x, capped(x, cap) - maximum, float("-inf"))
    return tl.exp(shifted).to(tl.float64)


@triton.jit
def draw_kernel(
    logits_ptr,
    ids_ptr,
    value_ptr,
    count_ptr,
    uniform_ptr,
    factor_ptr,
    maximum_ptr,
    total_ptr,
    V,
    stride,
    slope,
    cap,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One more entry of each row that has any: a class that is left out, drawn in proportion to p.

    The first class, in their order, at which the running sum of their mass exceeds uniform [rows]
    times all of it; its value is factor [rows] * that mass * the slope. The row's kept classes
    are marked by a NaN in its logits, which nobody reads afterwards.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    count = tl.load(count_ptr + row)
    if count == 0:
        return
    maximum = tl.load(maximum_ptr + row)
    logits_ptr += row * V
    for first in range(0, count, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + row * stride + slot, mask=slot < count, other=0)
        mark = tl.full((BLOCK_K,), float("nan"), tl.float32)
        tl.store(logits_ptr + ids, mark, mask=slot < count)
    tl.debug_barrier()
    sums = tl.zeros((BLOCK_V,), tl.float64)
    for first in range(0, V, BLOCK_V):
        sums += left_out(logits_ptr, first + tl.arange(0, BLOCK_V), V, maximum, cap)
    rest = tl.sum(sums, 0)
    goal = tl.load(uniform_ptr + row) * rest
    drawn = tl.cast(V, tl.int32)
    last = -1
    running = rest * 0
    for first in range(0, V, BLOCK_V):
        col = first + tl.arange(0, BLOCK_V)
        e = left_out(logits_ptr, col, V, maximum, cap)
        is_past = (running + tl.cumsum(e, 0) > goal) & (e > 0)
        drawn = tl.minimum(drawn, tl.min(tl.where(is_past, col, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, col, -1), 0))
        running += tl.sum(e, 0)
    # The sum of the sums may exceed the running one by rounding.
    drawn = tl.where(drawn < V, drawn, last)
    if drawn >= 0:
        chain = slope
        if cap is not None:
            chain = slope * tanh_slope(tl.load(logits_ptr + drawn))
        value = tl.load(factor_ptr + row) * (rest.to(tl.float32) / tl.load(total_ptr + row)) * chain
        tl.store(ids_ptr + row * stride + count, drawn)
        tl.store(value_ptr + row * stride + count, value)
        tl.store(count_ptr + row, count + 1)
