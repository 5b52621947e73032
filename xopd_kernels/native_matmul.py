"""bf16 x bf16 -> fp32 matrix products of the compiled CPU kernels, where the processor has them.

torch has no such product on a CPU: its bf16 one rounds the result, and its fp32 one, of upcast
factors, is several times slower on processors with bf16 dot products (AVX-512 BF16).
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.native_library import address, block, call, has, pointers, sizes

BLOCK = 64  # columns that csrc/matmul keeps side by side


class _Pack(ctypes.Structure):
    _fields_ = (
        *pointers("source"),
        *sizes("rows", "columns", "row_stride", "is_transposed"),
        *pointers("to"),
    )


class _Factors(ctypes.Structure):
    _fields_ = (
        *pointers("source"),
        *sizes("rows", "columns", "row_stride"),
        *pointers("straight", "transposed"),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *pointers("a"),
        *sizes("a_stride"),
        *pointers("b"),
        *sizes("m", "n", "k"),
        *pointers("out", "rounded"),
        *sizes("out_stride", "is_added", "is_transposed"),
    )


class _Unpacked(ctypes.Structure):
    _fields_ = (
        *pointers("a"),
        *sizes("a_stride"),
        *pointers("b"),
        *sizes("b_stride", "m", "n", "k"),
        *pointers("out"),
        *sizes("out_stride"),
    )


def is_available() -> bool:
    """Whether the library is there and this processor has bf16 dot products."""
    return has("xopd_has_matmul")


def multiplies(dtype: torch.dtype, dim: int) -> bool:
    """Whether a head of `dim` is multiplied here; an odd number of bf16 has no whole pairs."""
    return dtype == torch.bfloat16 and dim > 0 and dim % 2 == 0 and is_available()


def whole(size: int) -> int:
    """`size` filled up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


class Packed(NamedTuple):
    """The right factor [k, n] of a product, as it is read."""

    words: Tensor  # [ceil(n / 64), ceil(k / 2), 64] int32: pairs of bf16 along k
    k: int
    n: int


def packed_size(k: int, n: int) -> int:
    """Words of a right factor [k, n]."""
    return whole(n) * -(-k // 2)


def pack(matrix: Tensor, is_transposed: bool = False) -> Packed:
    """`matrix` [k, n] bf16, or its transpose [n, k] (k even), as a right factor.

    Raises TypeError/ValueError for a tensor that does not fit, RuntimeError without the products.
    """
    rows, columns = matrix.shape
    k, n = (columns, rows) if is_transposed else (rows, columns)
    if is_transposed and k % 2:
        raise ValueError(f"a transposed matrix must have an even k, got {list(matrix.shape)}")
    words = torch.empty(packed_size(k, n), dtype=torch.int32)
    source, to = block("matrix", matrix, torch.bfloat16), words.data_ptr()
    call("xopd_run_pack", _Pack(source, rows, columns, matrix.stride(0), is_transposed, to))
    return Packed(words, k, n)


def factors(
    matrix: Tensor, straight: Tensor | None, transposed: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`matrix` [rows, columns] bf16 as left factors: as it stands, and transposed.

    `straight`, `transposed`: flat bf16 memory for them, None where one is not wanted. They come
    back as [rows, columns] and [columns, rows], with a 0 after each row of an odd length. Raises
    TypeError/ValueError for a tensor that does not fit, RuntimeError without the products.
    """
    rows, columns = matrix.shape
    source = block("matrix", matrix, torch.bfloat16)
    results: list[Tensor | None] = []
    for name, to, height, width in (
        ("straight", straight, rows, columns),
        ("transposed", transposed, columns, rows),
    ):
        even = width + width % 2
        if to is not None and to.numel() < height * even:
            raise ValueError(f"{name} must have {height * even} elements, got {to.numel()}")
        result = None if to is None else to[: height * even].view(height, even)
        if result is not None:
            address(name, result, torch.bfloat16, (height, even))
        results.append(result)
    addresses = (None if x is None else x.data_ptr() for x in results)
    call("xopd_run_factors", _Factors(source, rows, columns, matrix.stride(0), *addresses))
    first, second = results
    return (
        None if first is None else first[:, :columns],
        None if second is None else second[:, :rows],
    )


def product(a: Tensor, b: Packed, out: Tensor, is_added: bool = False) -> Tensor:
    """``out = a b`` or, with `is_added`, ``out + a b``: a [m, k] bf16, out [m, n] fp32 or bf16.

    Products are exact and summed in fp32 in an order that depends on k alone; numbers below
    1.2e-38 count as 0. A bf16 `out` is rounded to once, and cannot be added to. If k is odd, a 0
    must follow each row of `a` in memory. Raises TypeError/ValueError for a tensor that
    does not fit, RuntimeError without the products.
    """
    if is_added and out.dtype == torch.bfloat16:
        raise ValueError("out must be fp32 if it is added to, got bf16")
    _check_fit(a, b.k, b.n, out.shape)
    _run(a, b, out, is_added, is_transposed=False)
    return out


def add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out += a b``, b [k, n] bf16 read where it lies; otherwise as `product`.

    For a `b` that is multiplied once: each thread packs the columns that it multiplies.
    """
    k, n = b.shape
    _check_fit(a, k, n, out.shape)
    left, right = block("a", a, torch.bfloat16), block("b", b, torch.bfloat16)
    to = _rows_apart(out, torch.float32)
    sizes_of = (a.stride(0), right, b.stride(0), a.shape[0], n, k)
    call("xopd_run_unpacked", _Unpacked(left, *sizes_of, to, out.stride(0)))
    return out


def transposed_product(a: Tensor, b: Packed, out: Tensor) -> Tensor:
    """``out = (a b).T``, [n, m] fp32; otherwise as `product`.

    For an `a` that is read where it is, and not packed, because it is the longer one.
    """
    _check_fit(a, b.k, b.n, out.shape[::-1])
    _run(a, b, out, is_added=False, is_transposed=True)
    return out


def _check_fit(a: Tensor, inner: int, columns: int, shape: tuple[int, ...]) -> None:
    m, k = a.shape
    if k != inner or shape != (m, columns):
        raise ValueError(
            f"a [m, k], b [k, n] and the product [m, n] must fit, got {list(a.shape)}, "
            f"{[inner, columns]} and {list(shape)}"
        )
    elements = a.untyped_storage().nbytes() // 2
    after = a.storage_offset() + max(0, m - 1) * a.stride(0) + k
    if m > 0 and k % 2 and ((m > 1 and a.stride(0) <= k) or after >= elements):
        raise ValueError(f"a must have a 0 after each row of odd length, got strides {a.stride()}")


def _run(a: Tensor, b: Packed, out: Tensor, is_added: bool, is_transposed: bool) -> None:
    left = block("a", a, torch.bfloat16)
    is_rounded = out.dtype == torch.bfloat16 and not is_transposed
    to = _rows_apart(out, torch.bfloat16 if is_rounded else torch.float32)
    places = (None, to) if is_rounded else (to, None)
    right = address("b.words", b.words, torch.int32, (packed_size(b.k, b.n),))
    sizes_of = (a.stride(0), right, a.shape[0], b.n, b.k)
    how = (out.stride(0), is_added, is_transposed)
    call("xopd_run_product", _Product(left, *sizes_of, *places, *how))


def _rows_apart(out: Tensor, dtype: torch.dtype) -> int:
    """Where `out` begins, a block that is written to."""
    to = block("out", out, dtype)
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"out must have rows that lie apart, got strides {out.stride()}")
    return to
