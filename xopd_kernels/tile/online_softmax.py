"""Running row statistics of a softmax: (maximum, total, moment), safe where logits are -inf.

total = sum exp(z - maximum); moment = sum exp(z - maximum) * (z - maximum), for the entropy.
Maxima start at -inf: a start at 0 underflows where all logits are far below 0.
"""

import triton
import triton.language as tl


@triton.jit
def fold_tile(maximum, total, moment, z, HAS_MOMENT: tl.constexpr):
    """Fold the logits z [N, V] into the statistics [N]."""
    new_maximum = tl.maximum(maximum, tl.max(z, 1))
    base = _finite(new_maximum)
    shifted = z - base[:, None]
    e = tl.exp(shifted)
    scale, rebased = _rebase(maximum, total, moment, base)
    if HAS_MOMENT:
        # 0 * -inf would be NaN where a logit is -inf.
        moment = rebased + tl.sum(tl.where(shifted == float("-inf"), 0.0, e * shifted), 1)
    return new_maximum, total * scale + tl.sum(e, 1), moment


@triton.jit
def merge(maximum, total, moment, other_maximum, other_total, other_moment):
    """The statistics of two sets of classes together, each [N]."""
    new_maximum = tl.maximum(maximum, other_maximum)
    base = _finite(new_maximum)
    scale, rebased = _rebase(maximum, total, moment, base)
    other_scale, other_rebased = _rebase(other_maximum, other_total, other_moment, base)
    return new_maximum, total * scale + other_total * other_scale, rebased + other_rebased


@triton.jit
def merge_partials(partial_ptr, row, is_row, rows, slabs, BLOCK_N: tl.constexpr):
    """Merge partial [3, slabs, rows] over the slabs, always in the same order."""
    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    plane = tl.cast(slabs, tl.int64) * rows
    for slab in range(slabs):
        part_ptr = partial_ptr + tl.cast(slab, tl.int64) * rows + row
        maximum, total, moment = merge(
            maximum,
            total,
            moment,
            tl.load(part_ptr, mask=is_row, other=0.0),
            tl.load(part_ptr + plane, mask=is_row, other=0.0),
            tl.load(part_ptr + 2 * plane, mask=is_row, other=0.0),
        )
    return _finite(maximum), total, moment


@triton.jit
def _finite(maximum):
    """0 in place of -inf: exp(-inf - 0) is 0, exp(-inf - -inf) is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _rebase(maximum, total, moment, base):
    """exp(maximum - base), and the moment relative to base (total is 0 where maximum is -inf)."""
    scale = tl.exp(maximum - base)
    delta = tl.where(maximum == float("-inf"), 0.0, maximum - base)
    return scale, scale * (moment + delta * total)
