"""Lists of the largest logits and the products with their entries, against float64 torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.formulas import (
    EPSILON,
    Statistics,
    block,
    ids_of,
    linear,
    logits_of,
    seeded,
    slope_of,
)
from xopd_kernels.native import Logits
from xopd_kernels.native_draw import Point, draw, insert
from xopd_kernels.native_sparse import (
    Bounds,
    Inside,
    Listed,
    Lists,
    add_to_lists,
    by_class,
    compact,
    finish_lists,
    gather,
    scatter,
)

pytestmark = pytest.mark.usefixtures("library")

FAR = 80.0  # a reach that drops nothing
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Found(NamedTuple):
    lists: Lists
    inside: Inside

    def row(self, row: int) -> tuple[list[int], Tensor]:
        """Classes and values of a list."""
        count = int(self.lists.counts[row])
        return self.lists.ids[row, :count].tolist(), self.lists.values[row, :count]


def cut(whole: Logits, tile: slice) -> Logits:
    bias = None if whole.bias is None else whole.bias[tile]
    return whole._replace(x=whole.x[:, tile], bias=bias)


def run(whole: Logits, ids: Tensor, bounds: Bounds, width: int, room: int = 40) -> Found:
    rows, classes = whole.x.shape
    capacity = bounds.limit + max(room, ids.shape[1])
    lists = Lists.empty(rows, capacity, ids.shape[1], whole.cap is not None, True)
    for begin in range(0, classes, width):
        tile = slice(begin, min(begin + width, classes))
        add_to_lists(cut(whole, tile), begin, ids, bounds, lists)
    return Found(lists, finish_lists(ids, bounds, lists))


def largest(z: Tensor, ids: Tensor, bounds: Bounds) -> list[int]:
    """The classes of a row [V] that belong on its list."""
    others = z.clone()
    others[ids] = -torch.inf
    floor = others.amax() - torch.tensor(bounds.reach, dtype=z.dtype)
    order = others.sort(descending=True, stable=True)
    kept = order.indices[: bounds.limit][order.values[: bounds.limit] > floor]
    return sorted(int(v) for v in kept if others[v] > -torch.inf)


def listed(rows: int, classes: int, count: int, seed: int = 0) -> Listed:
    """Random entries, some of value 0, and what must not be read behind them."""
    ids = ids_of(rows, classes, count, seed).int()
    values = torch.randn(rows, count, generator=seeded(seed + 1))
    values[torch.rand(rows, count, generator=seeded(seed + 2)) < 0.2] = 0.0
    counts = torch.randint(count + 1, (rows,), generator=seeded(seed + 3))
    ids[torch.arange(count) >= counts[:, None]] = -1
    return Listed(ids, values.masked_fill(ids < 0, torch.nan), counts)


def dense(entries: Listed, classes: int) -> Tensor:
    """The entries as a [rows, V] block of float64."""
    block = torch.zeros(len(entries.ids), classes, dtype=torch.float64)
    for row, count in enumerate(entries.counts.tolist()):
        ids = entries.ids[row, :count].long()
        block[row, ids] = entries.values[row, :count].double()
    return block


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 20),
    classes=st.one_of(st.integers(1, 140), st.integers(1000, 2500)),
    width=st.integers(30, 1100),
    limit=st.integers(1, 300),
    room=st.integers(16, 90),
    step=st.sampled_from([0.0, 0.5, 3.0]),
    reach=st.sampled_from([2.0, FAR]),
    seed=st.integers(0, 99),
)
def test_the_largest_are_listed(
    rows: int, classes: int, width: int, limit: int, room: int, step: float, reach: float, seed: int
) -> None:
    """Of any size and in any tiles; with a step many are equal, and the first ones are taken."""
    x = block(rows, classes, seed)
    x = (x / step).round() * step if step else x
    x[torch.rand(x.shape, generator=seeded(seed)) < 0.1] = -math.inf
    ids, bounds = ids_of(rows, classes, min(classes, seed % 4), seed), Bounds(limit, reach)
    found = run(linear(x), ids, bounds, width, room)
    z = x.double()
    outside = z.scatter(1, ids, -torch.inf)
    maximum = outside.amax(1)
    assert torch.equal(found.lists.maximum.double(), maximum)
    assert torch.equal(found.lists.at_ids, x.gather(1, ids))
    for row in range(rows):
        names, values = found.row(row)
        expected = largest(x[row], ids[row], bounds)
        assert names == sorted(expected + ids[row].tolist())
        assert [names[k] for k in found.inside.places[row]] == ids[row].tolist()
        assert values[found.inside.places[row]].eq(0).all()
        shifted = z[row, expected] - maximum[row]
        mine = values[[names.index(v) for v in expected]]
        bound = (4 - shifted) * EPSILON * shifted.exp() + 1e-37
        assert (mine - shifted.exp()).abs().le(bound).all()
        outside[row, expected] = -torch.inf
    inside = z.scatter(1, ids, -torch.inf).where(outside.isinf(), -torch.inf)
    about = maximum.where(maximum.isfinite(), 0.0)[:, None]
    for sums, moment, part in (
        (found.inside.total, found.inside.moment, inside - about),
        (found.lists.outside, found.lists.moment, outside - about),
    ):
        assert (sums - part.exp().sum(1)).abs().le(12 * EPSILON * part.exp().sum(1)).all()
        terms = part.exp() * part.clamp(min=-1000.0)
        assert moment is not None
        bound = 12 * EPSILON * (terms.abs().sum(1) + part.exp().sum(1))
        assert (moment - terms.sum(1)).abs().le(bound).all()
    behind = torch.arange(found.lists.ids.shape[1]) >= found.lists.counts[:, None]
    assert found.lists.ids[behind].eq(-1).all()
    assert found.lists.values[behind].eq(0).all()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_transform_and_its_slope(cap: float | None) -> None:
    bias = torch.randn(1500, generator=seeded(7))
    whole = Logits(block(5, 1500, gap=3), bias, 0.4, cap)
    ids, bounds = ids_of(5, 1500, 2), Bounds(33, FAR)
    found = run(whole, ids, bounds, 700)
    z, slope = logits_of(whole), slope_of(whole)
    sums = Statistics.of(z.scatter(1, ids, -torch.inf))
    total = found.inside.total + found.lists.outside
    shift = (sums.maximum - found.lists.maximum).exp()
    assert (total - sums.total * shift).abs().le(16 * EPSILON * total).all()
    for row in range(5):
        names, values = found.row(row)
        assert len(names) == 35
        e = (z[row, names] - found.lists.maximum[row].double()).exp()
        e[found.inside.places[row]] = 0.0
        assert (values - e).abs().le(24 * EPSILON * e).all()
        if found.lists.slope is not None:
            mine, exact = found.lists.slope[row, :35], slope[row, names]
            assert (mine - exact).abs().le(24 * EPSILON * exact + 1e-37).all()
    assert (found.lists.slope is None) == (cap is None)


@pytest.mark.parametrize("threads", [1, 2])
def test_lists_depend_on_their_row_alone(threads: int) -> None:
    x, bounds = (block(70, 3000) * 2).round() / 2, Bounds(20, 9.0)
    ids = ids_of(70, 3000, 3)
    whole = run(linear(x), ids, bounds, 3000)
    torch.set_num_threads(threads)
    for part in (slice(0, 70), slice(0, 1), slice(64, 70)):
        # A tile that is a whole number of pieces changes nothing, to the bit.
        one = run(linear(x[part]), ids[part].contiguous(), bounds, 1024)
        assert torch.equal(one.lists.ids, whole.lists.ids[part])
        assert torch.equal(one.lists.values, whole.lists.values[part])
        assert torch.equal(one.lists.outside, whole.lists.outside[part])
        assert torch.equal(one.inside.total, whole.inside.total[part])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1023, 1024, 2999])
def test_nan_and_infinity_are_never_lost(bad: float, place: int) -> None:
    x = block(3, 3000)
    x[0, place] = bad
    x[1] = -math.inf
    x[1, place] = bad
    found = run(linear(x), torch.empty(3, 0, dtype=torch.int64), Bounds(10, FAR), 1100)
    total = found.inside.total + found.lists.outside
    assert total.isnan().tolist() == [True, True, False]
    exact = Statistics.of(x[2:].double()).total
    assert (total[2:] - exact).abs().le(12 * EPSILON * exact).all()


def test_negative_zero_is_a_tie_of_zero() -> None:
    x = torch.tensor([[-0.0, 0.0] * 50])
    found = run(linear(x), torch.tensor([[3]]), Bounds(5, FAR), 100)
    assert found.row(0)[0] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [-math.inf, 1.0])
def test_rows_of_one_value(value: float) -> None:
    x = torch.full((2, 2000), value)
    found = run(linear(x), torch.tensor([[7], [1999]]), Bounds(4, FAR), 512)
    names = [[0, 1, 2, 3, 7], [0, 1, 2, 3, 1999]] if value == 1.0 else [[7], [1999]]
    assert [found.row(row)[0] for row in range(2)] == names
    total = found.inside.total + found.lists.outside
    assert total.tolist() == [1999.0 if value == 1.0 else 0.0] * 2


@pytest.mark.parametrize(("rows", "classes"), [(0, 50), (3, 0), (0, 0)])
def test_nothing(rows: int, classes: int) -> None:
    ids = torch.empty(rows, 0, dtype=torch.int64)
    lists = Lists.empty(rows, 30, 0, False, False)
    add_to_lists(linear(torch.empty(rows, classes)), 0, ids, Bounds(5, FAR), lists)
    inside = finish_lists(ids, Bounds(5, FAR), lists)
    assert inside.total.eq(0).all()
    entries = by_class(lists.entries, classes)
    assert entries.offsets.tolist() == [0] * (classes + 1)
    out = torch.ones(classes, 9, dtype=torch.bfloat16)
    scatter(entries, slice(0, classes), torch.ones(rows, 9), out, None, adds=False)
    assert out.eq(0).all()
    gather(lists.entries, classes, torch.arange(rows), out.float(), 0, torch.zeros(rows, 9))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 30),
    classes=st.integers(1, 90),
    dim=st.one_of(st.integers(1, 70), st.integers(2040, 2070)),
    gap=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_products(
    rows: int, classes: int, dim: int, gap: int, dtype: torch.dtype, seed: int
) -> None:
    """gather and scatter of any size, in any cut of the classes."""
    entries = listed(rows, classes, min(classes, 40), seed)
    matrix = dense(entries, classes)
    weight, hidden = (block(n, dim, seed, gap=gap).to(dtype) for n in (classes, rows))
    weight, hidden = (torch.nn.functional.pad(x, (0, gap))[:, :dim] for x in (weight, hidden))
    chosen = torch.randint(rows, (7,), generator=seeded(seed))
    out = torch.full((7, dim), 2.0)
    half = classes // 2
    gather(entries, classes, chosen, weight[:half], 0, out)
    gather(entries, classes, chosen, weight[half:], half, out)
    exact, size = matrix @ weight.double(), matrix.abs() @ weight.double().abs()
    bound = 48 * EPSILON * (size[chosen] + 2)
    assert (out - 2.0 - exact[chosen]).abs().le(bound).all()

    sorted_ = by_class(entries, classes)
    exact, size = matrix.t() @ hidden.double(), matrix.t().abs() @ hidden.double().abs()
    wide, bias = torch.full((classes, dim), 7.0), torch.full((classes,), 0.5)
    scatter(sorted_, slice(0, classes), hidden, wide, bias, adds=False)
    assert (wide - exact).abs().le(48 * EPSILON * size).all()
    sums, sizes = matrix.sum(0), matrix.abs().sum(0)
    assert (bias - 0.5 - sums).abs().le(EPSILON * (sizes + 1)).all()
    narrow = torch.full((classes, dim), 7.0, dtype=torch.bfloat16)
    added = torch.full((classes, dim), 3.0)
    for tile in (slice(half, classes), slice(0, half)):
        scatter(sorted_, tile, hidden, narrow[tile], None, adds=False)
        scatter(sorted_, tile, hidden, added[tile], None, adds=True)
    assert torch.equal(narrow, wide.bfloat16())
    assert (added - 3.0 - exact).abs().le(48 * EPSILON * (size + 3)).all()
    untouched = matrix.eq(0).all(0)
    assert wide[untouched].eq(0).all()
    assert added[untouched].eq(3.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All 2^16 of them: zeros, subnormal ones, infinities and NaN."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    weight = every.view(dtype)[None] if dtype != torch.float32 else every.float()[None]
    one = Listed(torch.zeros(1, 1).int(), torch.ones(1, 1), torch.ones(1).long())
    out = torch.zeros(1, 2**16)
    gather(one, 1, torch.zeros(1).long(), weight, 0, out)
    assert torch.equal(out.nan_to_num(), weight.float().nan_to_num())
    assert torch.equal(out.isnan(), weight.isnan())

    odd = torch.cat((every.float() * 1.000_003, torch.tensor([math.inf, -math.inf, math.nan])))
    rounded = torch.empty(1, len(odd), dtype=torch.bfloat16)
    scatter(by_class(one, 1), slice(0, 1), odd[None], rounded, None, adds=False)
    assert torch.equal(rounded[0, :-1], odd[:-1].bfloat16())
    assert rounded[0, -1].isnan()


def test_products_never_depend_on_threads() -> None:
    entries, weight = listed(40, 500, 60), block(500, 300)
    hidden, rows = block(40, 300, 1), torch.arange(40)

    def both() -> tuple[Tensor, Tensor]:
        d_hidden, d_weight = torch.zeros(40, 300), torch.empty(500, 300)
        gather(entries, 500, rows, weight, 0, d_hidden)
        scatter(by_class(entries, 500), slice(0, 500), hidden, d_weight, None, adds=False)
        return d_hidden, d_weight

    expected = both()
    torch.set_num_threads(2)
    assert all(map(torch.equal, both(), expected))


def test_a_nan_entry_reaches_its_row_and_class_alone() -> None:
    entries = Listed(
        torch.tensor([[1], [2]]).int(), torch.tensor([[math.nan], [1.0]]), torch.ones(2).long()
    )
    d_hidden, d_weight = torch.zeros(2, 5), torch.empty(4, 5)
    gather(entries, 4, torch.arange(2), torch.ones(4, 5), 0, d_hidden)
    scatter(by_class(entries, 4), slice(0, 4), torch.ones(2, 5), d_weight, None, adds=False)
    assert d_hidden.isnan().all(1).tolist() == [True, False]
    assert d_weight.isnan().all(1).tolist() == [False, True, False, False]


def test_gather_checks_the_lists_that_it_reads() -> None:
    """A caller asks for a few lists of many: the others cost nothing."""
    ids = torch.tensor([[3], [4], [-1]]).int()
    entries, out = Listed(ids, torch.ones(3, 1), torch.ones(3).long()), torch.zeros(1, 5)
    gather(entries, 4, torch.tensor([0]), torch.ones(4, 5), 0, out)
    assert out.eq(1.0).all()
    for wrong in (1, 2, 3, -1):  # a class too large, a negative one, no such list
        with pytest.raises(ValueError, match="out of range"):
            gather(entries, 4, torch.tensor([wrong]), torch.ones(4, 5), 0, out)


def test_compact_keeps_entries_and_places() -> None:
    ids = torch.tensor([[2, 5, 7, 9], [1, 3, 4, -1], [0, -1, -1, -1]]).int()
    values = torch.tensor([[0.0, 2.0, 0.0, 3.0], [4.0, 0.0, 0.0, 0.0], [0.0] * 4])
    entries, places = Listed(ids, values, torch.tensor([4, 3, 0])), torch.tensor([[0], [2], [0]])
    out_ids, out = torch.full((4, 3), 77), torch.full((4, 3), 7.0)
    compact(entries, 10, places, torch.tensor([3, 0, 1]), out_ids, out)
    assert out_ids.tolist() == [[1, 4, -1], [-1, -1, -1], [77, 77, 77], [2, 5, 9]]
    assert out.tolist() == [[4.0, 0.0, 0.0], [0.0] * 3, [7.0] * 3, [0.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match="out of range"):
        compact(
            entries,
            10,
            places,
            torch.tensor([3, 0, 1]),
            out_ids[:, :2].contiguous(),
            out[:, :2].contiguous(),
        )


def test_insert_keeps_the_order() -> None:
    ids = torch.tensor([[2, 5, -1], [1, 3, -1], [4, -1, -1], [-1, -1, -1]]).int()
    entries = Listed(ids, torch.ones(4, 3), torch.tensor([2, 2, 1, 0]))
    rows, added = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, -1, 8])
    insert(entries, rows, added, torch.tensor([9.0, 8.0, 7.0, 6.0]))
    assert entries.counts.tolist() == [3, 2, 1, 1]
    assert ids[0].tolist() == [2, 3, 5]
    assert entries.values[0].tolist() == [1.0, 9.0, 1.0]
    assert entries.values[1, :2].tolist() == [1.0, 8.0]
    assert (ids[3, 0], entries.values[3, 0]) == (8, 6.0)
    with pytest.raises(ValueError, match="out of range"):
        insert(entries, torch.tensor([0]), torch.tensor([4]), torch.ones(1))


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("width", [2500, 1024, 333])
def test_drawn_is_the_class_at_a_point_of_the_running_sum(cap: float | None, width: int) -> None:
    whole = Logits(block(4, 2500), None, 1.0, cap)
    ids = ids_of(4, 2500, 1)
    found = run(whole, ids, Bounds(20, FAR), 2500)
    lists, values = found.lists, found.lists.values
    values.scatter_(1, found.inside.places, 1.0)
    values[:, 3] = 0.0  # spared: may be drawn
    kept = lists.ids.long().clamp(min=0)
    e = (logits_of(whole) - lists.maximum[:, None].double()).exp()
    running = e.scatter(1, kept, e.gather(1, kept).where(values == 0, 0.0)).cumsum(1)
    rows = torch.arange(4).repeat(50)
    share = torch.linspace(0, 1.01, 200, dtype=torch.float64)
    point = Point.of(rows, running[rows, -1] * share, cap is not None)
    for begin in range(0, 2500, width):
        tile = slice(begin, min(begin + width, 2500))
        draw(cut(whole, tile), begin, lists, 2500, point)
    drawn = point.ids()
    low = running[rows, (drawn - 1).clamp(min=0)].where(drawn > 0, 0.0)
    high, total = running[rows, drawn], running[rows, -1]
    reached = point.point.minimum(total)
    assert (low <= reached + 1e-5 * total).all()
    assert (high >= reached - 1e-5 * total).all()
    assert (high > low).all()  # never an entry, nor a class without mass
    if point.slope is not None:
        exact = slope_of(whole)[rows, drawn]
        assert (point.slope - exact).abs().le(24 * EPSILON * exact).all()
