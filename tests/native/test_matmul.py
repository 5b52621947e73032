"""The bf16 products against fp64: every edge of their blocks, both packings, rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.formulas import seeded
from xopd_kernels import native_matmul
from xopd_kernels.native_matmul import (
    Packed,
    add_product,
    factors,
    pack,
    product,
    transposed_product,
)

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def products(library: object) -> None:
    if not native_matmul.is_available():
        pytest.skip("this object, or this CPU, has no bf16 dot products")


def matrix(rows: int, columns: int, seed: int, gap: int = 0) -> Tensor:
    """Random bf16 rows that lie apart; what is between them is NaN."""
    width = columns + columns % 2 + gap + gap % 2
    values = torch.full((rows, width), torch.nan, dtype=BF16)
    values[:, :columns] = torch.randn(rows, columns, generator=seeded(seed))
    values[:, columns : columns + columns % 2] = 0
    return values[:, :columns]


def check(out: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None) -> None:
    """Within the error of fp32 sums of exact products, and of one rounding to a bf16 `out`."""
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    if start is not None:
        exact, size = exact + start.double(), size + start.double().abs()
    bound = size * (a.shape[1] + 2) * 2.0**-24
    if out.dtype == BF16:
        bound = bound + exact.abs() * 2.0**-8
    assert ((out.double() - exact).abs() <= bound).all()


SIZES = st.integers(1, 150)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 5), st.booleans(), st.sampled_from(["new", "add", BF16]))
def test_product(
    m: int, n: int, k: int, gap: int, is_transposed: bool, kind: str | torch.dtype
) -> None:
    k += k % 2 * is_transposed
    a = matrix(m, k, 1, gap)
    b = matrix(n, k, 2, gap).t() if is_transposed else matrix(k, n, 2, gap)
    packed = pack(b.t() if is_transposed else b, is_transposed=is_transposed)
    assert (packed.k, packed.n) == (k, n)
    start = torch.randn(m, n + gap, generator=seeded(3))[:, :n]
    out = torch.empty(m, n + gap, dtype=BF16)[:, :n] if kind == BF16 else start.clone()
    product(a, packed, out, is_added=kind == "add")
    check(out, a, b, start if kind == "add" else None)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 5))
def test_transposed_product(m: int, n: int, k: int, gap: int) -> None:
    a, b = matrix(m, k, 1, gap), matrix(k, n, 2)
    memory = torch.full((n, m + gap), torch.nan)
    out = transposed_product(a, pack(b), memory[:, :m])
    assert torch.equal(out.t(), product(a, pack(b), torch.empty(m, n)))
    assert memory[:, m:].isnan().all()


@pytest.mark.parametrize("stride", [0, 3, 4, 5, 6, 9])
def test_rows_of_any_stride(stride: int) -> None:
    """Odd ones, overlapping ones, one row many times: `a` is only read."""
    memory = matrix(1, 8 * 9 + 6, 17)[0]
    a, b = memory.as_strided((8, 6), (stride, 1)), matrix(6, 70, 18)
    check(product(a, pack(b), torch.empty(8, 70)), a, b)


def test_a_long_inner_dimension() -> None:
    a, b = matrix(7, 9001, 4), matrix(9001, 65, 5)
    out = product(a, pack(b), torch.empty(7, 65))
    check(out, a, b)
    rounded = product(a, pack(b), torch.empty(7, 65, dtype=BF16))
    check(rounded, a, b)


def test_rows_and_columns_do_not_depend_on_each_other() -> None:
    a, b = matrix(401, 96, 6), matrix(96, 131, 7)
    whole = product(a, pack(b), torch.empty(401, 131))
    assert torch.equal(product(a[200:203], pack(b), torch.empty(3, 131)), whole[200:203])
    assert torch.equal(product(a, pack(b[:, 64:]), torch.empty(401, 67)), whole[:, 64:])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    a, b = matrix(300, 130, 8), matrix(130, 200, 9)
    expected = product(a, pack(b), torch.empty(300, 200))
    try:
        torch.set_num_threads(threads)
        assert torch.equal(product(a, pack(b), torch.empty(300, 200)), expected)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 5))
def test_product_of_what_is_not_packed(m: int, n: int, k: int, gap: int) -> None:
    a, b = matrix(m, k, 1, gap), matrix(k, n, 2, gap)
    start = torch.randn(m, n + gap, generator=seeded(3))
    out = start.clone()
    add_product(a, b, out[:, :n])
    check(out[:, :n], a, b, start[:, :n])
    assert out[:, n:].equal(start[:, n:])
    packed = product(a, pack(b), start[:, :n].clone(), is_added=True)
    assert out[:, :n].equal(packed)


def test_pieces_of_the_inner_dimension() -> None:
    """Of 1008 rows of b: several, the last one of an odd number, and more rows than a task."""
    a, b = matrix(401, 2 * 1008 + 7, 4), matrix(2 * 1008 + 7, 131, 5)
    out, expected = torch.ones(401, 131), torch.ones(401, 131)
    add_product(a, b, out)
    check(out, a, b, torch.ones(401, 131))
    for begin in range(0, len(b), 1008):
        part = slice(begin, begin + 1008)
        product(a[:, part], pack(b[part]), expected, is_added=True)
    assert out.equal(expected)
    threads = torch.get_num_threads()
    try:
        # Nine tasks, three of a block: 2 and 5 threads begin or end in the middle of one.
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert add_product(a, b, torch.ones(401, 131)).equal(out)
    finally:
        torch.set_num_threads(threads)
    few = add_product(a[200:203], b[:, 64:], torch.ones(3, 67))
    assert few.equal(out[200:203, 64:])


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(0, 3))
def test_left_factors(rows: int, columns: int, gap: int) -> None:
    values = torch.randn(rows, columns + gap, generator=seeded(rows)).to(BF16)[:, :columns]
    memory = [torch.full((22_800,), torch.nan, dtype=BF16) for _ in range(2)]
    straight, transposed = factors(values, *memory)
    assert straight is not None and transposed is not None
    assert torch.equal(straight, values)
    assert torch.equal(transposed, values.t())
    for result, count, length in ((straight, rows, columns), (transposed, columns, rows)):
        padded = torch.as_strided(result, (count, length + length % 2), result.stride())
        assert torch.equal(padded[:, length:], torch.zeros(count, length % 2, dtype=BF16))
    used = rows * (columns + columns % 2), columns * (rows + rows % 2)
    assert all(x[count:].isnan().all() for x, count in zip(memory, used, strict=True))


def test_one_left_factor() -> None:
    values = torch.randn(5, 7).to(BF16)
    straight, nothing = factors(values, torch.empty(100, dtype=BF16), None)
    assert nothing is None and straight is not None and torch.equal(straight, values)
    nothing, transposed = factors(values, None, torch.empty(100, dtype=BF16))
    assert nothing is None and transposed is not None
    assert torch.equal(transposed, values.t())


def test_nothing_beyond_the_numbers() -> None:
    """Infinity and NaN stay where they are: the padding is multiplied with zeros alone."""
    a, b = matrix(3, 5, 10), matrix(5, 3, 11)
    a[1, 4], b[2, 1] = torch.inf, torch.nan
    out = product(a, pack(b), torch.empty(3, 3))
    assert out[1, [0, 2]].isinf().all() and out[:, 1].isnan().all()
    assert out[[0, 2]][:, [0, 2]].isfinite().all()


def test_no_rows() -> None:
    b = pack(matrix(4, 6, 12))
    assert product(torch.empty(0, 4, dtype=BF16), b, torch.empty(0, 6)).shape == (0, 6)
    nothing = pack(torch.empty(0, 6, dtype=BF16))
    out = product(torch.empty(2, 0, dtype=BF16), nothing, torch.full((2, 6), torch.nan))
    assert torch.equal(out, torch.zeros(2, 6))


def test_wrong_input() -> None:
    a, b = matrix(3, 4, 13), pack(matrix(4, 6, 14))
    out = torch.empty(3, 6)
    with pytest.raises(ValueError, match="must fit"):
        product(a, b, torch.empty(3, 7))
    with pytest.raises(ValueError, match="must fit"):
        product(matrix(3, 6, 13), b, out)
    with pytest.raises(ValueError, match="added to"):
        product(a, b, torch.empty(3, 6, dtype=BF16), is_added=True)
    odd = pack(matrix(3, 6, 15))
    with pytest.raises(ValueError, match="a 0 after each row"):
        product(torch.zeros(3, 3, dtype=BF16), odd, out)
    with pytest.raises(ValueError, match="a 0 after each row"):
        product(torch.zeros(1, 3, dtype=BF16), odd, torch.empty(1, 6))
    with pytest.raises(ValueError, match="rows that lie apart"):
        product(a, b, torch.empty(1, 6).expand(3, 6))
    with pytest.raises(TypeError, match=r"^a must be"):
        product(a.float(), b, out)
    with pytest.raises(TypeError, match="out must be"):
        product(a, b, out.double())
    with pytest.raises(ValueError, match=r"b.words must be \[128\]"):
        product(a, Packed(b.words[:-1], 4, 6), out)
    with pytest.raises(ValueError, match="must fit"):
        transposed_product(a, b, out)
    with pytest.raises(TypeError, match="out must be"):
        transposed_product(a, b, torch.empty(6, 3, dtype=BF16))
    with pytest.raises(ValueError, match="even k"):
        pack(matrix(4, 3, 16), is_transposed=True)
    with pytest.raises(ValueError, match="straight must have 16 elements, got 15"):
        factors(matrix(4, 4, 16), torch.empty(15, dtype=BF16), None)
    with pytest.raises(TypeError, match="matrix must be"):
        factors(torch.zeros(4, 4), None, None)


def test_wrong_input_of_what_is_not_packed() -> None:
    a, b, out = matrix(3, 4, 13), matrix(4, 6, 14), torch.empty(3, 6)
    with pytest.raises(ValueError, match="must fit"):
        add_product(a, b, torch.empty(3, 7))
    with pytest.raises(ValueError, match="must fit"):
        add_product(a, matrix(5, 6, 14), out)
    with pytest.raises(ValueError, match="a 0 after each row"):
        add_product(torch.zeros(3, 3, dtype=BF16), matrix(3, 6, 15), out)
    with pytest.raises(ValueError, match="rows that lie apart"):
        add_product(a, b, torch.empty(1, 6).expand(3, 6))
    with pytest.raises(ValueError, match="b must be"):
        add_product(a, matrix(6, 4, 14).t(), out)
    with pytest.raises(TypeError, match="out must be"):
        add_product(a, b, out.to(BF16))
