"""The rule of what is left out, as a function of masses: shares, order, ties, rounding, draws."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xopd_kernels.chunk.reference_sparse import Drawn, Lists
from xopd_kernels.chunk.sparse import (
    RowMass,
    bound_in_fp32,
    choose_row_entries,
    choose_rows,
    gradient_error,
    raised_mass,
    rounding_of,
    row_uniform,
)
from xopd_kernels.records import Sparsity

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def rows_of(count, length, seed, dtype=torch.float64):
    """Rows of c (1[y] - p) with random lists; masses over many orders of magnitude."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        exponent = torch.randint(-12, 1, shape, generator=rng)
        return torch.rand(shape, generator=rng, dtype=torch.float64) * 10.0**exponent

    listed, outside, scale = drawn(count, length), drawn(count), drawn(count)
    whole = listed.sum(1) + outside + drawn(count)  # the last one: the target
    listed, outside = (listed / whole[:, None]).to(dtype), outside / whole
    outside = raised_mass(outside, outside, dtype)
    rest = listed.double().sum(1) + outside
    scale = scale.masked_fill(torch.rand(count, generator=rng) < 0.2, 0.0)
    return RowMass(scale, 2 * scale * rest, rest, outside, listed)


def sparse(max_error, mode="sparse"):
    return Sparsity(mode, max_error, 0)


def lost(rows, choice, times=1):
    """The sum of what is left out, as a fraction."""
    total = Fraction(0)
    spared = choice.is_spared(rows)
    for i in range(len(rows.scale)):
        if choice.is_whole[i]:
            total += Fraction(rows.norm[i].item())
        elif choice.is_sparse[i]:
            dropped = Fraction(rows.outside[i].item())
            dropped += sum(Fraction(p) for p in rows.listed[i][spared[i]].double().tolist())
            total += times * Fraction(rows.scale[i].item()) * dropped
    return total


@DTYPES
@pytest.mark.parametrize("mode", ["sparse", "unbiased"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 30),
    length=st.integers(0, 12),
    seed=st.integers(0, 10_000),
    max_error=st.sampled_from([0.0, 1e-12, 1e-5, 0.01, 0.1, 0.3, 1.0, 16.0, 1e6]),
)
def test_what_is_lost_is_at_most_what_is_reported(dtype, mode, count, length, seed, max_error):
    rows = rows_of(count, length, seed, dtype)
    choice = choose_rows(rows, sparse(max_error, mode))
    missing = lost(rows, choice, times=2 if mode == "unbiased" else 1)
    norm = sum((Fraction(x) for x in rows.norm.tolist()), Fraction(0))
    assert missing <= Fraction(choice.error.item()) * (1 + Fraction(1, 2**50))
    assert missing <= Fraction(max_error) * norm
    reported = gradient_error(choice.error, choice.norm, sparse(max_error, mode))
    assert reported.dtype == torch.float32
    assert missing <= Fraction(reported.item()) * norm
    assert reported.item() <= max_error
    assert not (choice.is_whole & choice.is_sparse).any()
    if mode == "unbiased":
        assert torch.equal(choice.is_whole, rows.norm == 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    max_error=st.sampled_from([1e-6, 1e-3, 0.05, 0.5, 4.0]),
)
def test_rows_are_taken_in_ascending_order_while_their_share_lasts(count, seed, max_error):
    rows = rows_of(count, 4, seed)
    choice = choose_rows(rows, sparse(max_error))
    allowance = bound_in_fp32(max_error) * rows.norm.sum().item()
    for cost, is_taken, among, share in (
        (rows.norm, choice.is_whole, torch.ones(count, dtype=torch.bool), 1 / 16),
        (rows.scale * rows.outside, choice.is_sparse, ~choice.is_whole, 14 / 16),
    ):
        cost, is_taken = cost[among], is_taken[among]
        dearest = cost[is_taken].max().item() if is_taken.any() else 0.0
        assert (cost[~is_taken] >= dearest).all()
        spent = cost[is_taken].sum().item()
        assert spent <= share * allowance
        if not is_taken.all():  # the next one does not fit, but for the rounding of the sums
            assert spent + cost[~is_taken].min().item() > share * allowance * (1 - 1e-9)


def test_ties_go_to_the_lower_row():
    equal = torch.full((8,), 0.25, dtype=torch.float64)
    rows = RowMass(equal, 2 * equal, equal, equal / 100, torch.full((8, 3), 0.07).double())
    # 16 * 1/16 of the allowance are two and a half rows, left out whole.
    choice = choose_rows(rows, sparse(16 * 2.5 / 8))
    assert choice.is_whole.tolist() == [True] * 2 + [False] * 6
    # Of the sparse ones all fit.
    assert choice.is_sparse.tolist() == [False] * 2 + [True] * 6


def test_the_order_of_the_rows_does_not_matter():
    rows = rows_of(40, 6, 0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    choice = choose_rows(rows, sparse(0.05))
    other = choose_rows(RowMass(*(x[order] for x in rows)), sparse(0.05))
    assert torch.equal(choice.is_whole[order], other.is_whole)
    assert torch.equal(choice.is_sparse[order], other.is_sparse)


def test_rows_without_a_gradient_cost_nothing():
    rows = rows_of(40, 6, 3)
    without = rows.scale == 0
    assert 0 < without.sum() < 40
    choice = choose_rows(rows, sparse(0.0))
    assert torch.equal(choice.is_whole, without)
    assert not choice.is_sparse.any()
    assert not choice.dropped_mass.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["sparse", "unbiased"])
def test_rows_that_are_not_finite_are_dense_and_do_not_count(value, mode):
    rows = rows_of(20, 6, 1)
    for field in (rows.scale, rows.norm, rows.outside):
        field[::4] = value
    rows.listed[::4] = value
    choice = choose_rows(rows, sparse(0.1, mode))
    assert not (choice.is_whole | choice.is_sparse)[::4].any()
    kept = torch.arange(20).fmod(4) != 0
    few = RowMass(*(x[kept] for x in rows))
    expected = choose_rows(few, sparse(0.1, mode))
    assert torch.equal(choice.is_sparse[kept], expected.is_sparse)
    assert torch.equal(choice.is_whole[kept], expected.is_whole)
    for one, other in zip(choice[3:], expected[3:], strict=True):
        torch.testing.assert_close(one[kept] if one.ndim else one, other)
    per_row = choose_row_entries(rows, sparse(0.5))
    assert not per_row.is_sparse[::4].any()
    assert per_row.error.isfinite()


@DTYPES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 20),
    length=st.integers(0, 12),
    seed=st.integers(0, 10_000),
    max_error=st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 0.5, 10.0]),
)
def test_each_row_by_itself(dtype, count, length, seed, max_error):
    rows = rows_of(count, length, seed, dtype)
    rows = rows._replace(scale=torch.ones(count), norm=2 * rows.rest)
    choice = choose_row_entries(rows, sparse(max_error))
    reported = gradient_error(choice.error, choice.norm, sparse(max_error))
    assert reported.item() <= max_error
    spared = choice.is_spared(rows)
    for i in range(count):
        if choice.is_sparse[i]:
            dropped = Fraction(rows.outside[i].item())
            dropped += sum(Fraction(p) for p in rows.listed[i][spared[i]].double().tolist())
            assert dropped <= Fraction(reported.item()) * Fraction(rows.norm[i].item())
            assert dropped <= Fraction(choice.dropped_mass[i].item()) * (1 + Fraction(1, 2**50))
        else:
            assert choice.dropped_mass[i] == 0
            assert rows.outside[i] > (15 / 16 - 1e-4) * max_error * rows.norm[i]


def test_small_entries_are_spared():
    """Of a long list most entries go for the last 16th of the allowance."""
    p = 0.5 ** torch.arange(1, 25, dtype=torch.float64)
    rows = RowMass(*(torch.ones(1, dtype=torch.float64) for _ in range(4)), p[None])
    rows = rows._replace(outside=torch.zeros(1, dtype=torch.float64), norm=torch.full((1,), 2.0))
    choice = choose_rows(rows, sparse(1e-3))
    spared = p[choice.is_spared(rows)[0]]
    assert 2e-3 / 16 / 4 <= spared.sum() <= 2e-3 / 16
    assert len(spared) == 11
    assert choice.dropped_mass.item() == pytest.approx(spared.sum().item())


@pytest.mark.parametrize("value", [0.0, 1e-50, 1e-40, 0.01, 0.1, 1 / 3, 1.0, 123.456, 1e300])
def test_the_bound_in_fp32_is_not_above(value):
    bound = bound_in_fp32(value)
    assert bound <= value
    assert float(torch.tensor(bound)) == bound
    above = torch.nextafter(torch.tensor(bound), torch.tensor(math.inf)).item()
    assert above > value


def splitmix(seed):
    """The generator as its authors write it, from `seed` on."""
    mask, state = (1 << 64) - 1, seed & ((1 << 64) - 1)
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        yield mixed(state)


def mixed(z):
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_published_numbers_of_splitmix():
    generator = splitmix(1234567)
    assert [next(generator) for _ in range(2)] == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_row_uniform_is_splitmix(seed):
    generator = splitmix(mixed(seed & ((1 << 64) - 1)))
    expected = [(next(generator) >> 11) * 2.0**-53 for _ in range(100)]
    rows = torch.arange(100)
    assert row_uniform(seed, rows).tolist() == expected
    some = torch.tensor([99, 3, 50])
    assert row_uniform(seed, some).tolist() == [expected[i] for i in some]


def test_row_uniform_is_uniform():
    """Chi-square of 64 cells, for rows of one seed and for seeds of one row: 5 standard errors."""
    rows = row_uniform(7, torch.arange(64_000))
    seeds = torch.cat([row_uniform(seed, torch.arange(1)) for seed in range(16_000)])
    for numbers in (rows, seeds):
        assert (numbers >= 0).all()
        assert (numbers < 1).all()
        counts = (numbers * 64).long().bincount(minlength=64).double()
        mean = len(numbers) / 64
        chi_square = float(((counts - mean) ** 2 / mean).sum())
        assert abs(chi_square - 63) <= 5 * math.sqrt(2 * 63)


@DTYPES
def test_a_class_is_drawn_as_often_as_its_mass(dtype):
    """Of M equally spaced numbers a class gets M * p / sum p, to one of them."""
    classes, numbers = 50, 4000
    rng = torch.Generator().manual_seed(0)
    e = torch.rand(1, classes, generator=rng, dtype=torch.float64).to(dtype)
    e[0, 7:12] = 0.0
    e[0, -1] = 0.0
    kept = torch.tensor([[20]])
    lists = Lists.of(e, e.sum(1), kept, 10, 1)
    spared = torch.arange(10)[None] % 3 == 0
    left = e[0].clone()
    left[20] = 0.0
    left[lists.ids[0][~spared[0]]] = 0.0
    many = (x.expand(numbers, *x.shape[1:]) for x in lists)
    uniform = (torch.arange(numbers).double() + 0.5) / numbers
    row = torch.arange(numbers)
    repeated = (e.expand(numbers, classes), kept.expand(numbers, 1), Lists(*many))
    drawn = Drawn.of(*repeated, spared.expand(numbers, 10), row, uniform)
    counts = drawn.ids.bincount(minlength=classes).double()
    expected = numbers * left.double() / left.double().sum()
    assert ((counts - expected).abs() <= 1.0).all()
    assert (counts[left == 0] == 0).all()
    torch.testing.assert_close(drawn.value[0], left.sum())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_draw_classes_with_mass(uniform):
    e = torch.tensor([[0.0, 0.3, 0.1, 0.5, 0.0]])
    lists = Lists.of(e, e.sum(1), torch.tensor([[3]]), 0, 1)
    nothing = torch.zeros(1, 0, dtype=torch.bool)
    row, number = torch.tensor([0]), torch.tensor([uniform], dtype=torch.float64)
    drawn = Drawn.of(e, torch.tensor([[3]]), lists, nothing, row, number)
    assert drawn.ids.item() == (1 if uniform == 0 else 2)
    certain = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    drawn = Drawn.of(certain, torch.tensor([[3]]), lists, nothing, row, number)
    assert len(drawn.ids) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(1, 40),
    length=st.integers(0, 40),
    step=st.integers(1, 10),
    seed=st.integers(0, 10_000),
)
def test_lists_are_the_largest_classes_and_of_equal_ones_the_first(
    rows, classes, length, step, seed
):
    rng = torch.Generator().manual_seed(seed)
    e = torch.randint(0, 6, (rows, classes), generator=rng).double()
    e[:, 0] += 1.0
    kept = torch.randint(classes, (rows, 1), generator=rng)
    lists = Lists.of(e, e.sum(1), kept, length, step)
    for i in range(rows):
        others = [v for v in range(classes) if v != kept[i]]
        best = sorted(others, key=lambda v: (-e[i, v].item(), v))[:length]
        assert lists.ids[i].tolist() == sorted(best)
        assert torch.equal(lists.p[i], e[i, lists.ids[i]] / e[i].sum())
        outside = sum(e[i, v].item() for v in others if v not in best) / e[i].sum().item()
        assert outside <= lists.outside[i].item() <= outside * (1 + 2 * rounding_of(e.dtype))
        whole = sum(e[i, v].item() for v in others) / e[i].sum().item()
        assert lists.rest[i].item() == pytest.approx(whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["sparse", "unbiased"])
def test_a_device_decides_the_same_and_nothing_is_read_from_it(mode):
    rows = rows_of(200, 12, 0)
    on_device = RowMass(*(x.cuda() for x in rows))
    numbers = torch.arange(200, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        choice = choose_rows(on_device, sparse(0.05, mode))
        by_row = choose_row_entries(on_device, sparse(0.05, mode))
        spared = choice.is_spared(on_device)
        error = gradient_error(choice.error, choice.norm, sparse(0.05, mode))
        uniform = row_uniform(7, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = choose_rows(rows, sparse(0.05, mode))
    assert torch.equal(spared.cpu(), expected.is_spared(rows))
    assert torch.equal(uniform.cpu(), row_uniform(7, torch.arange(200)))
    assert error.item() <= 0.05
    pairs = (choice, expected), (by_row, choose_row_entries(rows, sparse(0.05, mode)))
    for one, other in pairs:
        for value, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(value.cpu(), wanted)
