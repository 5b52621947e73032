"""A matrix product whose row count lives on the device: dead rows cost nothing, and no host sync.

cuBLAS needs its sizes on the host; reading the number of live rows there would stall it until
the device has caught up, and would break CUDA graphs.
"""

import triton
import triton.language as tl

from xopd_kernels.tile.dot import narrow, tile_dot
from xopd_kernels.tile.schedule import grouped_tile


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    base_ptr,
    c_ptr,
    row_ptr,
    c_row_ptr,
    live_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_cm,
    IS_K_LIVE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """c [M, N] = base + a [M, K] @ b [K, N] over the first *live_ptr of K (IS_K_LIVE) or of M.

    row_ptr: which rows those are, of a and b (IS_K_LIVE) or of a; c_row_ptr: where c's rows go.
    IN_PLACE: base is c, so nothing is written where no row is live. base has the strides of c.
    """
    live = tl.load(live_ptr)
    block_m, block_n = grouped_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP
    )
    if IS_K_LIVE:
        inner = live
        if IN_PLACE and inner == 0:
            return
    else:
        inner = K
        if block_m * BLOCK_M >= live:
            return
    m = tl.cast(block_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.cast(block_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_m = m < (M if IS_K_LIVE else live)
    is_n = n < N
    a_row = m
    if row_ptr is not None and not IS_K_LIVE:
        a_row = tl.load(row_ptr + m, mask=is_m, other=0)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inner, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        is_k = k < inner
        if row_ptr is not None and IS_K_LIVE:
            k = tl.load(row_ptr + k, mask=is_k, other=0)
        a = tl.load(
            a_ptr + a_row[:, None] * stride_am + k[None, :] * stride_ak,
            mask=is_m[:, None] & is_k[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + k[:, None] * stride_bk + n[None, :],
            mask=is_k[:, None] & is_n[None, :],
            other=0.0,
        )
        accumulator = tile_dot(a, b, accumulator)
    if c_row_ptr is not None:
        m = tl.load(c_row_ptr + m, mask=is_m, other=0)
    c_offset = m[:, None] * stride_cm + n[None, :]
    is_c = is_m[:, None] & is_n[None, :]
    if base_ptr is not None:
        accumulator += tl.load(base_ptr + c_offset, mask=is_c, other=0.0)
    tl.store(c_ptr + c_offset, narrow(accumulator, c_ptr.dtype.element_ty), mask=is_c)
