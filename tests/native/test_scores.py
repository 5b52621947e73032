"""Logits and statistics of many bf16 tiles in one call, against the products and fp64 sums."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.formulas import EPSILON, Statistics, fresh, ids_of, logits_of, seeded
from tests.native.test_matmul import BF16, matrix, products  # noqa: F401
from tests.native.test_softmax import TRANSFORMS, check_sums
from xopd_kernels.native import Logits, Running
from xopd_kernels.native_matmul import Packed, pack, transposed_product
from xopd_kernels.native_scores import Outputs, Tiles, add_scores


class Head:
    """Random factors, and the linear outputs [rows, classes] of the product by itself."""

    def __init__(self, rows: int, classes: int, k: int, kind: str = "plain", gap: int = 0) -> None:
        has_bias, scale, cap = TRANSFORMS[kind]
        self.weight = matrix(classes, k, 1, gap)
        self.hidden = matrix(rows, k, 2) * 2 / k**0.5
        self.bias = torch.randn(classes, generator=seeded(3)) if has_bias else None
        self.scale, self.cap = scale, cap

    @property
    def packed(self) -> Packed:
        return pack(self.hidden, is_transposed=True)

    @property
    def x(self) -> Tensor:
        out = torch.empty(len(self.hidden), len(self.weight))
        return transposed_product(self.weight, self.packed, out)

    @property
    def logits(self) -> Logits:
        return Logits(self.x, self.bias, self.scale, self.cap)

    def tiles(self, tile: int, first: int = 0, tiles: int = 1) -> Tiles:
        """`tiles` of them lie side by side where they are kept."""
        return Tiles(self.weight, tile, tiles * tile, first, self.bias, self.scale, self.cap)

    def run(
        self,
        ids: Tensor,
        tile: int,
        out: Outputs | None = None,
        first: int = 0,
        has_moment: bool = True,
        tiles: int = 1,
    ) -> Running:
        running = fresh(len(ids), ids.shape[1], has_moment)
        add_scores(self.tiles(tile, first, tiles), self.packed, out, ids, running)
        return running


def check(head: Head, ids: Tensor, running: Running, first: int = 0) -> None:
    z = logits_of(head.logits)
    expected = Statistics.of(z.scatter(1, ids - first, -torch.inf))
    at_ids = z.gather(1, ids - first)
    units = 4 * EPSILON * (head.cap is not None)  # of tanh; else to the bit
    largest = expected.maximum
    assert (
        ((running.maximum - largest).abs() <= units * largest.abs())
        .logical_or(running.maximum == largest)
        .all()
    )
    assert (running.at_ids - at_ids).abs().le(units * at_ids.abs()).all()
    check_sums(running, expected, head.cap is not None)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 150),
    classes=st.integers(1, 200),
    half=st.integers(1, 40),
    tile=st.integers(1, 210),
    kind=st.sampled_from(list(TRANSFORMS)),
    count=st.integers(0, 5),
    first=st.sampled_from([0, 7, 10**12]),
)
def test_statistics(
    rows: int,
    classes: int,
    half: int,
    tile: int,
    kind: str,
    count: int,
    first: int,
) -> None:
    """Every size of a block, a last tile that is shorter, more ids than one in a block."""
    head = Head(rows, classes, 2 * half, kind, gap=half % 6)
    ids = ids_of(rows, classes, min(count, classes - 1)) + first
    check(head, ids, head.run(ids, tile, first=first), first)


@pytest.mark.parametrize("has_moment", [False, True])
def test_what_stands_beside_a_maximum_of_1(has_moment: bool) -> None:
    """Other classes of the maximum's block, 2e-9 to 1e-3 in all: to six digits."""
    rows, classes = 64, 120
    head = Head(rows, classes, 64)
    head.bias = 2 * torch.randn(classes, generator=seeded(5)) - 16
    head.bias[62] = 8.0
    head.hidden *= 0.01
    no_ids = torch.empty(rows, 0, dtype=torch.int64)
    running = head.run(no_ids, tile=classes, has_moment=has_moment)
    z = logits_of(head.logits)
    others = (z - running.maximum.double()[:, None]).exp().scatter(1, z.argmax(1)[:, None], 0.0)
    others = others.sum(1)
    assert 0 < others.max() < 1e-6
    assert ((running.total - 1.0 - others).abs() <= 1e-6 * others).all()


def test_a_maximum_that_is_found_late_is_exactly_1() -> None:
    """Of the sums that no class is left out of: beside it, one of 1e-7 is still to be seen."""
    rows, classes, k = 64, 120, 64
    head = Head(rows, classes, k)
    # Two classes: the second one, in another block, has its logit 12 to 15.9 above the first one.
    head.bias = torch.full((classes,), -torch.inf)
    head.bias[[0, -1]] = 0.0
    height = torch.linspace(12.0, 15.9, rows).to(BF16)
    head.weight.zero_()
    head.hidden.zero_()
    head.weight[-1, 0], head.hidden[:, 0] = 1.0, height
    no_ids = torch.empty(rows, 0, dtype=torch.int64)
    running = head.run(no_ids, tile=classes, has_moment=False)
    assert torch.equal(running.maximum, height.float())
    other = (-height.double()).exp()
    assert ((running.total - 1.0 - other).abs() <= 1e-6 * other).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 140),
    classes=st.integers(1, 150),
    tile=st.integers(1, 160),
    tiles=st.integers(1, 3),
    used=st.integers(0, 9),
    spare=st.integers(0, 9),
)
def test_outputs(rows: int, classes: int, tile: int, tiles: int, used: int, spare: int) -> None:
    """Tile by tile where they belong, the bits of the product, and nothing else is written."""
    head, width = Head(rows, classes, 24), used + rows + spare
    words = torch.full((classes * width + 5,), torch.nan)
    ids = ids_of(rows, classes, 1)
    kept = head.run(ids, tile, out=Outputs(words, width, used), tiles=tiles)
    x, written = head.x, torch.zeros_like(words, dtype=torch.bool)
    for begin in range(0, classes, tiles * tile):
        count = min(tiles * tile, classes - begin)
        place = slice(begin * width + used * count, begin * width + (used + rows) * count)
        assert words[place].view(rows, count).equal(x[:, begin : begin + count])
        written[place] = True
    assert words[~written].isnan().all()
    for one, other in zip(kept, head.run(ids, tile), strict=True):
        assert one is not None and other is not None and one.equal(other)


@pytest.mark.parametrize("has_moment", [False, True])
def test_a_row_depends_on_nothing_else(has_moment: bool) -> None:
    """Alone, among others at another place, and with more threads: the same bits."""
    head = Head(131, 500, 32, "bias and scale")
    ids = ids_of(131, 500, 2)
    whole = head.run(ids, 96, has_moment=has_moment)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = head.run(ids, 96, has_moment=has_moment)
    finally:
        torch.set_num_threads(threads)
    rows = torch.tensor([130, 64, 3, 77])
    head.hidden = head.hidden[rows]
    few = head.run(ids[rows], 96, has_moment=has_moment)
    for all_of, same, some in zip(whole, again, few, strict=True):
        assert (all_of is None) == (not has_moment and same is None)
        if all_of is not None and same is not None and some is not None:
            assert all_of.equal(same) and all_of[rows].equal(some)


@pytest.mark.parametrize("has_moment", [False, True])
@pytest.mark.parametrize("order", ["rising", "falling", "steep"])
def test_a_maximum_that_rises(order: str, has_moment: bool) -> None:
    """Logits from -100 to 100 in 300 classes: sums about another reference again and again."""
    k, classes = 2, 300
    values = torch.linspace(-100, 100, classes)
    values = values.flip(0) if order == "falling" else values
    values = torch.where(values > 0, 80.0, -90.0) if order == "steep" else values
    head = Head(70, classes, k)
    head.weight = torch.stack((values, torch.zeros(classes)), 1).to(BF16)
    head.hidden = torch.tensor([[1.0, 0.0]]).repeat(70, 1).to(BF16)
    ids = ids_of(70, classes, 1)
    running = head.run(ids, 64, has_moment=has_moment)
    z = logits_of(head.logits).scatter(1, ids, -torch.inf)
    total = (z - running.maximum.double()[:, None]).exp().sum(1)
    assert running.maximum.equal(z.amax(1).float())
    assert (running.total / total - 1).abs().max() < 12 * EPSILON
    if has_moment:
        check(head, ids, running)


def test_values_that_are_not_finite() -> None:
    """-inf adds nothing; a row of them has no maximum; NaN and +inf make the sum NaN."""
    head = Head(6, 100, 2)
    head.weight = torch.zeros(100, 2, dtype=BF16)
    head.weight[:, 0] = torch.randn(100, generator=seeded(4)).abs() + 0.5
    first = torch.tensor([1.0, -torch.inf, torch.inf, torch.nan, 3.0, 0.0])
    head.hidden = torch.stack((first, torch.zeros(6)), 1).to(BF16)
    running = head.run(ids_of(6, 100, 0), 40)
    assert running.moment is not None
    assert running.total[[2, 3]].isnan().all()
    assert running.total[[0, 4, 5]].isfinite().all() and running.total[1] == 0
    assert running.maximum[1] == -torch.inf and running.maximum[2] == torch.inf
    assert running.moment[1] == 0
    assert running.total[5] == 100 and running.maximum[5] == 0


def test_calls_that_follow_each_other() -> None:
    """The classes in two calls are those of one, and ids of the other call are passed over."""
    head, ids = Head(20, 300, 16), ids_of(20, 300, 6)
    whole, running = head.run(ids, 50), fresh(20, 6)
    for part in (slice(0, 100), slice(100, 300)):
        tiles = head.tiles(50, part.start)._replace(weight=head.weight[part])
        add_scores(tiles, head.packed, None, ids, running)
    for one, other in zip(whole, running, strict=True):
        assert one is not None and other is not None and one.equal(other)


HEAD = Head(5, 20, 8)
IDS = ids_of(5, 20, 2)


TILES = HEAD.tiles(8)
WORDS = torch.zeros(20 * 6)
CASES = [
    ("weight", TypeError, lambda: {"tiles": TILES._replace(weight=HEAD.weight.float())}),
    ("weight", ValueError, lambda: {"tiles": TILES._replace(weight=HEAD.weight[:, :6])}),
    ("weight", ValueError, lambda: {"tiles": TILES._replace(weight=HEAD.weight[:, :7])}),
    ("tile", ValueError, lambda: {"tiles": TILES._replace(tile=0)}),
    ("out_tile", ValueError, lambda: {"tiles": TILES._replace(out_tile=12)}),
    ("out_tile", ValueError, lambda: {"tiles": TILES._replace(out_tile=0)}),
    ("bias", ValueError, lambda: {"tiles": TILES._replace(bias=torch.zeros(3))}),
    ("cap", ValueError, lambda: {"tiles": TILES._replace(cap=0.0)}),
    ("first_class", ValueError, lambda: {"tiles": TILES._replace(first_class=-1)}),
    ("out", ValueError, lambda: {"out": Outputs(WORDS, 6, 2)}),
    ("out", ValueError, lambda: {"out": Outputs(WORDS, 6, -1)}),
    ("out", ValueError, lambda: {"out": Outputs(WORDS[1:], 6, 0)}),
    ("out.words", TypeError, lambda: {"out": Outputs(WORDS.double(), 6, 0)}),
    ("ids", TypeError, lambda: {"ids": IDS.int()}),
    ("ids", ValueError, lambda: {"ids": IDS[:4]}),
    ("running.total", TypeError, lambda: {"running": fresh(5, 2)._replace(total=torch.zeros(5))}),
    ("running.at_ids", ValueError, lambda: {"running": fresh(5, 1)}),
]


@pytest.mark.parametrize(("name", "error", "given"), CASES)
def test_errors_name_the_argument(
    name: str, error: type[Exception], given: Callable[[], dict[str, Any]]
) -> None:
    right = {"tiles": TILES, "out": None, "ids": IDS, "running": fresh(5, 2)}
    for arguments in (right, right | given()):
        raises = pytest.raises(error, match=name) if arguments is not right else nullcontext()
        with raises:
            add_scores(hidden=HEAD.packed, **arguments)
