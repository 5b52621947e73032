"""Products over the entries of sparse rows: sums in a fixed order, without atomics."""

import triton
import triton.language as tl

from xopd_kernels.tile.dot import narrow


@triton.jit
def entry_hidden_kernel(
    ids_ptr,
    value_ptr,
    count_ptr,
    weight_ptr,
    tail_ptr,
    out_row_ptr,
    out_ptr,
    D,
    stride,
    stride_w,
    stride_out,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[out_row[row]] = tail[row] + the sum over a row's entries of value * weight[class].

    Rows without entries: nothing. `tail` [rows, D] fp32, None for 0. One program for a row and
    BLOCK_D columns.
    """
    blocks = tl.cdiv(D, BLOCK_D)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    count = tl.load(count_ptr + row)
    if count == 0:
        return
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, count, BLOCK_E):
        slot = first + tl.arange(0, BLOCK_E)
        is_slot = slot < count
        ids = tl.load(ids_ptr + row * stride + slot, mask=is_slot, other=0).to(tl.int64)
        value = tl.load(value_ptr + row * stride + slot, mask=is_slot, other=0.0)
        weight = tl.load(
            weight_ptr + ids[:, None] * stride_w + d[None, :],
            mask=is_slot[:, None] & (d < D)[None, :],
            other=0.0,
        )
        sums += tl.sum(weight.to(tl.float32) * value[:, None], 0)
    if tail_ptr is not None:
        sums += tl.load(tail_ptr + row * D + d, mask=d < D, other=0.0)
    out_row = tl.load(out_row_ptr + row)
    rounded = narrow(sums, out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row * stride_out + d, rounded, mask=d < D)


@triton.jit
def entry_weight_kernel(
    begin_ptr,
    place_ptr,
    value_ptr,
    hidden_ptr,
    out_ptr,
    V,
    D,
    stride,
    stride_h,
    stride_out,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[class] += sum over the class's entries of value * hidden[row], fp32, in row order.

    Entries sorted by class: those of a class are begin[class] to begin[class + 1]; place holds
    row * stride + slot of each. One program for GROUP classes and BLOCK_D columns: most classes
    have no entry, and a group without one costs two loads.
    """
    blocks = tl.cdiv(D, BLOCK_D)
    first_class = tl.cast(tl.program_id(0) // blocks, tl.int64) * GROUP
    end_class = tl.minimum(first_class + GROUP, V)
    if tl.load(begin_ptr + first_class) == tl.load(begin_ptr + end_class):
        return
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    for class_ in range(first_class, end_class):
        begin = tl.load(begin_ptr + class_)
        end = tl.load(begin_ptr + class_ + 1)
        if begin < end:
            out = out_ptr + class_ * stride_out + d
            sums = tl.load(out, mask=d < D, other=0.0)
            for first in range(begin, end, BLOCK_E):
                at = first + tl.arange(0, BLOCK_E)
                place = tl.load(place_ptr + at, mask=at < end, other=0)
                value = tl.load(value_ptr + place, mask=at < end, other=0.0)
                hidden = tl.load(
                    hidden_ptr + (place // stride)[:, None] * stride_h + d[None, :],
                    mask=(at < end)[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                sums += tl.sum(hidden.to(tl.float32) * value[:, None], 0)
            tl.store(out, sums, mask=d < D)
