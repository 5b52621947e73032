"""d(loss)/d(linear output) rounded as it is written: the fp32 numbers both ways, and their sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.formulas import block, ids_of, linear, seeded
from tests.native.test_matmul import BF16, products  # noqa: F401
from xopd_kernels.native import (
    SUMMED_ROWS,
    DivergenceTerms,
    GradientTerms,
    Rounded,
    Side,
    write_divergence_gradient,
    write_gradient,
)

GUARD = 64  # elements behind each result


def memory(rows: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
    """[rows, columns] with a guard behind it, all NaN."""
    return torch.full((rows * columns + GUARD,), torch.nan, dtype=dtype)


def rounded(rows: int, classes: int) -> tuple[Rounded, list[Tensor]]:
    """A place for a tile, and the memory it is in."""
    sizes = [
        (rows, classes + classes % 2, BF16),
        (classes, rows + rows % 2, BF16),
        (-(-rows // SUMMED_ROWS), classes, torch.float32),
    ]
    behind = [memory(*size) for size in sizes]
    views = [x[: a * b].view(a, b) for x, (a, b, _) in zip(behind, sizes, strict=True)]
    return Rounded(*views), behind


def check(out: Rounded, behind: list[Tensor], expected: Tensor) -> None:
    """`expected` [rows, classes] fp32 to the bit; what is beside it is 0, what is behind NaN."""
    rows, classes = expected.shape
    straight, transposed, sums = out
    assert straight is not None and transposed is not None and sums is not None
    assert straight[:, :classes].equal(expected.to(BF16))
    assert transposed[:, :rows].equal(expected.to(BF16).t())
    assert straight[:, classes:].eq(0).all() and transposed[:, rows:].eq(0).all()
    groups = expected.split(SUMMED_ROWS)
    exact = torch.stack([x.double().sum(0) for x in groups])
    size = torch.stack([x.double().abs().sum(0) for x in groups])
    assert ((sums - exact).abs() <= SUMMED_ROWS * 2.0**-24 * size).all()
    assert all(x[-GUARD:].isnan().all() for x in behind)


def softmax_terms(rows: int, classes: int, first: int) -> GradientTerms:
    given = torch.randn(3, rows, generator=seeded(1))
    ids = ids_of(rows, classes, min(2, classes)) + first
    return GradientTerms(given[0].abs() + 9, given[1], given[2], ids, given[:2].t().contiguous())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 100),
    classes=st.one_of(st.integers(2, 150), st.integers(1000, 2100)),
    gap=st.integers(0, 5),
    is_chosen=st.booleans(),
)
def test_softmax(rows: int, classes: int, gap: int, is_chosen: bool) -> None:
    logits, first = linear(block(rows + 3, classes, gap=gap)), 7
    chosen = torch.randint(rows + 3, (rows,), generator=seeded(2)) if is_chosen else None
    if not is_chosen:
        logits = logits._replace(x=logits.x[:rows])
    terms, expected = softmax_terms(rows, classes, first), torch.empty(rows, classes)
    write_gradient(logits, first, chosen, terms, expected)
    out, behind = rounded(rows, classes)
    write_gradient(logits, first, chosen, terms, out)
    check(out, behind, expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 80),
    classes=st.one_of(st.integers(2, 150), st.integers(1000, 2100)),
    beta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_divergence(rows: int, classes: int, beta: float) -> None:
    sides = []
    for seed in (3, 4):
        x = block(rows, classes, seed)
        top = x.amax(1)
        sides.append(Side(linear(x), top, (x - top[:, None]).logsumexp(1)))
    row = torch.rand(5, rows, generator=seeded(5))
    terms = DivergenceTerms(*(x.contiguous() for x in row))
    expected = torch.empty(rows, classes)
    write_divergence_gradient(*sides, beta, terms, expected)
    out, behind = rounded(rows, classes)
    write_divergence_gradient(*sides, beta, terms, out)
    check(out, behind, expected)


@pytest.mark.parametrize("name", ["straight", "transposed", "sums"])
def test_one_of_them_and_threads(name: str) -> None:
    """Each alone, and with more threads: the same bits."""
    rows, classes = 131, 1500
    logits, terms = linear(block(rows, classes)), softmax_terms(rows, classes, 0)
    every, _ = rounded(rows, classes)
    write_gradient(logits, 0, None, terms, every)
    alone, _ = rounded(rows, classes)
    one = getattr(alone, name)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        write_gradient(logits, 0, None, terms, Rounded(None, None, None)._replace(**{name: one}))
    finally:
        torch.set_num_threads(threads)
    assert one.equal(getattr(every, name))
    others = (x for x in alone if x is not one and x is not None)
    assert all(x.isnan().all() for x in others)


def test_no_rows() -> None:
    nothing = linear(torch.zeros(0, 5))
    terms = GradientTerms(
        torch.zeros(0), torch.zeros(0), None, torch.zeros(0, 0).long(), torch.zeros(0, 0)
    )
    out, behind = rounded(0, 5)
    write_gradient(nothing, 0, None, terms, out)
    assert all(x.isnan().all() for x in behind)


def test_errors_name_the_argument() -> None:
    rows, classes = 6, 10
    x = block(rows, classes)
    terms = softmax_terms(rows, classes, 0)
    out, _ = rounded(rows, classes)
    cases = [
        ("straight", torch.empty(rows, classes), TypeError),
        ("straight", torch.empty(rows, classes + 1, dtype=BF16), ValueError),
        ("transposed", torch.empty(rows, classes, dtype=BF16), ValueError),
        ("transposed", torch.empty(rows, classes, dtype=BF16).t(), ValueError),
        ("sums", torch.empty(2, classes), ValueError),
        ("sums", x[:1], ValueError),  # overlaps
    ]
    for name, wrong, error in cases:
        with pytest.raises(error, match=rf"out\.{name} must"):
            write_gradient(linear(x), 0, None, terms, out._replace(**{name: wrong}))
