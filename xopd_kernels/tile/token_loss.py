"""Per-token losses: a log-prob in, the loss and its derivative out."""

import triton
import triton.language as tl

from xopd_kernels.tile.online_softmax import merge_partials


@triton.jit
def clipped_surrogate(logprob, advantage, old_logprob, weight, low, high, HAS_OLD: tl.constexpr):
    """(ratio, is_clipped, loss, d loss / d logprob) of PPO's clipped surrogate; all [N] fp32.

    Written with comparisons, not with min, max or clamp: on a GPU those drop a NaN.
    """
    ratio = tl.full(logprob.shape, 1.0, tl.float32)
    if HAS_OLD:
        ratio = tl.exp(logprob - old_logprob)
    is_high = (advantage > 0) & (ratio > high)
    is_low = (advantage < 0) & (ratio < low)
    # An advantage of 0 has no loss, whatever the ratio: 0 * inf would be NaN.
    product = tl.where(advantage == 0, 0.0, ratio * advantage)
    surrogate = tl.where(is_high, high * advantage, tl.where(is_low, low * advantage, product))
    is_clipped = is_high | is_low
    derivative = tl.where(is_clipped, 0.0, product)
    return ratio, is_clipped, -weight * surrogate, -weight * derivative


@triton.jit
def clamped_difference(teacher_logprob, logprob, bound):
    """clamp(teacher_logprob - logprob, -bound, bound) that keeps a NaN."""
    difference = teacher_logprob - logprob
    difference = tl.where(difference > bound, bound, difference)
    return tl.where(difference < -bound, -bound, difference)


@triton.jit
def policy_kernel(
    partial_ptr,
    target_logit_ptr,
    live_ptr,
    teacher_logprob_ptr,
    advantage_ptr,
    old_logprob_ptr,
    weight_ptr,
    out_ptr,
    stride_out,
    rows,
    slabs,
    low,
    high,
    bound,
    BLOCK_N: tl.constexpr,
):
    """Merge the slabs of [rows]; write linear_policy_loss.triton.TokenRows to out_ptr.

    The fields lie `stride_out` elements apart.
    """
    live = tl.load(live_ptr)
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < live
    maximum, total, _ = merge_partials(partial_ptr, row, is_row, rows, slabs, BLOCK_N)
    log_total = tl.log(total)
    logprob = (tl.load(target_logit_ptr + row, mask=is_row, other=0.0) - maximum) - log_total
    if teacher_logprob_ptr is not None:
        teacher_logprob = tl.load(teacher_logprob_ptr + row, mask=is_row, other=0.0)
        advantage = clamped_difference(teacher_logprob, logprob, bound)
    else:
        advantage = tl.load(advantage_ptr + row, mask=is_row, other=0.0)
    if old_logprob_ptr is not None:
        old_logprob = tl.load(old_logprob_ptr + row, mask=is_row, other=0.0)
    else:
        old_logprob = logprob
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row, mask=is_row, other=0.0)
    ratio, is_clipped, loss, coefficient = clipped_surrogate(
        logprob, advantage, old_logprob, weight, low, high, old_logprob_ptr is not None
    )
    plane = tl.cast(stride_out, tl.int64)
    tl.store(out_ptr + row, loss, mask=is_row)
    tl.store(out_ptr + plane + row, logprob, mask=is_row)
    tl.store(out_ptr + 2 * plane + row, maximum + log_total, mask=is_row)
    tl.store(out_ptr + 3 * plane + row, advantage, mask=is_row)
    tl.store(out_ptr + 4 * plane + row, ratio, mask=is_row)
    tl.store(out_ptr + 5 * plane + row, is_clipped.to(tl.float32), mask=is_row)
    tl.store(out_ptr + 6 * plane + row, coefficient, mask=is_row)
    tl.store(out_ptr + 7 * plane + row, maximum, mask=is_row)
    tl.store(out_ptr + 8 * plane + row, total, mask=is_row)
