"""Row statistics and the gradient of their functions against float64 torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.formulas import (
    EPSILON,
    Statistics,
    block,
    fresh,
    ids_of,
    linear,
    logits_of,
    seeded,
    slope_of,
)
from xopd_kernels import native_library
from xopd_kernels.native import GradientTerms, Logits, Running, add_statistics, write_gradient

pytestmark = pytest.mark.usefixtures("library")

TRANSFORMS = {
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scale": (False, 0.37, None),
    "bias and scale": (True, 1 / 0.7, None),
    "cap": (True, 0.25, 3.0),
    "wide cap": (False, 1 / 30.0, 30.0),
}


def logits(kind: str, rows: int, classes: int, seed: int = 0, gap: int = 0) -> Logits:
    has_bias, scale, cap = TRANSFORMS[kind]
    bias = torch.randn(classes, generator=seeded(seed + 1)) if has_bias else None
    return Logits(block(rows, classes, seed, gap=gap), bias, scale, cap)


def cut(whole: Logits, tile: slice) -> Logits:
    bias = None if whole.bias is None else whole.bias[tile]
    return whole._replace(x=whole.x[:, tile], bias=bias)


def tiles(classes: int, width: int) -> list[slice]:
    return [slice(a, min(a + width, classes)) for a in range(0, classes, width)]


def run(whole: Logits, ids: Tensor, width: int) -> Running:
    running = fresh(len(ids), ids.shape[1])
    for tile in tiles(whole.x.shape[1], width):
        add_statistics(cut(whole, tile), tile.start, ids, running)
    return running


def check_sums(running: Running, expected: Statistics, has_cap: bool) -> None:
    """Against the sums about the maximum that `running` holds; a dozen roundings each.

    A capped logit is off by four of its own, and the exponential with it.
    """
    roundings = 12 + 4 * has_cap * expected.maximum.abs()
    shift = expected.maximum - running.maximum.double()
    factor = shift.exp()
    total = factor * expected.total
    assert running.moment is not None
    moment = factor * (expected.moment + shift * expected.total)
    assert (running.total - total).abs().le(roundings * EPSILON * total).all()
    spread = moment.abs() + total
    assert (running.moment - moment).abs().le(roundings * EPSILON * spread).all()


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_statistics(kind: str) -> None:
    whole, ids = logits(kind, 7, 1030, gap=5), ids_of(7, 1030, 4)
    running = run(whole, ids, 1030)
    z = logits_of(whole)
    at_ids = z.gather(1, ids)
    kept = z.scatter(1, ids, -torch.inf)
    if whole.cap is None:
        assert torch.equal(running.maximum, kept.amax(1).float())
        assert torch.equal(running.at_ids, at_ids.float())
    assert (running.maximum - kept.amax(1)).abs().le(4 * EPSILON * kept.amax(1).abs()).all()
    assert (running.at_ids - at_ids).abs().le(4 * EPSILON * at_ids.abs()).all()
    check_sums(running, Statistics.of(kept), whole.cap is not None)


@pytest.mark.parametrize("has_moment", [False, True])
def test_what_stands_beside_a_maximum_of_1(has_moment: bool) -> None:
    """1e-9 to 1e-3 in all, in the piece of the maximum and in others: to six digits."""
    x = torch.linspace(-30, -16, 40)[:, None] + torch.randn(40, 2100, generator=seeded(0))
    x[:, 700] = 0.0
    running = fresh(40, 0, has_moment)
    add_statistics(linear(x), 0, torch.empty(40, 0, dtype=torch.int64), running)
    others = x.double().exp().sum(1) - 1.0
    assert others.min() < 1e-8 and others.max() > 1e-4
    assert ((running.total - 1.0 - others).abs() <= 1e-6 * others + 2.0**-51).all()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 70),
    classes=st.one_of(st.integers(1, 140), st.integers(1000, 1030)),
    width=st.integers(1, 1100),
    gap=st.integers(0, 9),
    kind=st.sampled_from(sorted(TRANSFORMS)),
    seed=st.integers(0, 99),
)
def test_ragged_sizes_and_tiles(
    rows: int,
    classes: int,
    width: int,
    gap: int,
    kind: str,
    seed: int,
) -> None:
    whole = logits(kind, rows, classes, seed, gap)
    ids = ids_of(rows, classes, min(classes - 1, seed % 5), seed)
    running = run(whole, ids, width if width * 20 > classes else classes)
    z = logits_of(whole)
    assert (running.at_ids - z.gather(1, ids)).abs().le(4 * EPSILON * z.gather(1, ids).abs()).all()
    kept = Statistics.of(z.scatter(1, ids, -torch.inf))
    check_sums(running, kept, whole.cap is not None)


@pytest.mark.parametrize("position", [0, 1, 255, 256, 1023, 1024, 1025, 1499])
def test_ids_at_the_edges_of_tiles_and_pieces(position: int) -> None:
    x, ids = block(2, 1500), torch.tensor([[-7, position, 1500], [-1, -1, position]])
    z = x.double()
    z[:, position] = -torch.inf
    for width in (1500, 256, 1025):
        running = run(linear(x), ids, width)
        assert running.at_ids[0, 1] == x[0, position]
        assert running.at_ids[1, 2] == x[1, position]
        assert int(running.at_ids.isnan().sum()) == 4
        check_sums(running, Statistics.of(z), has_cap=False)


def test_a_single_class_is_excluded() -> None:
    running = run(linear(block(2, 1)), torch.zeros(2, 1, dtype=torch.int64), 1)
    assert running.maximum.eq(-torch.inf).all()
    assert running.total.eq(0).all()


@pytest.mark.parametrize("width", [1, 7, 64, 2100])
def test_minus_infinity(width: int) -> None:
    """It has no mass, and a row of it alone no maximum; later tiles start it as if it were new."""
    x = torch.full((3, 2100), -torch.inf)
    x[1, 2099] = 3.0
    x[2, 5] = -1e30
    running = run(linear(x), torch.tensor([[0], [2098], [0]]), width)
    assert running.moment is not None
    assert running.maximum.tolist() == [-math.inf, 3.0, torch.tensor(-1e30).item()]
    assert running.total.tolist() == [0.0, 1.0, 1.0]
    assert running.moment.tolist() == [0.0, 0.0, 0.0]
    assert running.at_ids.flatten().tolist() == [-math.inf] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("others", ["finite", "-inf", "falling", "rising"])
@pytest.mark.parametrize("width", [16, 500])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_nan_and_infinity_are_never_lost(
    bad: float, others: str, width: int, cap: float | None
) -> None:
    if cap is not None and bad == math.inf:
        return  # the cap makes it finite
    x = block(4, 500)
    if others == "-inf":
        x = torch.full((4, 500), -torch.inf)
    elif others != "finite":
        x = torch.linspace(-1e4, 1e4, 500).expand(4, 500).contiguous()
        x = x if others == "rising" else x.flip(1)
    clean = run(Logits(x, None, 1.0, cap), torch.zeros(4, 0, dtype=torch.int64), width)
    x[0, 0] = x[1, 250] = x[2, 499] = bad
    running = run(Logits(x, None, 1.0, cap), torch.zeros(4, 0, dtype=torch.int64), width)
    assert running.total[:3].isnan().all()
    assert running.moment is not None
    assert running.moment[:3].isnan().all()
    assert torch.equal(running.total[3:], clean.total[3:])


def test_a_rising_maximum_rescales_what_came_before() -> None:
    x = torch.tensor([[-3000.0, -2000.0, -1.0, 0.0, 0.5]])
    running = run(linear(x), torch.zeros(1, 0, dtype=torch.int64), 1)
    check_sums(running, Statistics.of(x.double()), has_cap=False)


def test_small_arguments_of_the_cap_keep_their_digits() -> None:
    x = torch.cat((torch.logspace(-30, 1.5, 400), -torch.logspace(-30, 1.5, 400)))[None]
    ids = torch.arange(800)[None]
    running = run(Logits(x, None, 1.0, 1.0), ids, 800)
    expected = x.double().tanh()
    assert ((running.at_ids - expected) / expected).abs().max() <= 2 * EPSILON


def terms(
    running_maximum: Tensor, seed: int, has_gamma: bool, ids: Tensor | None = None
) -> GradientTerms:
    rows = len(running_maximum)
    if ids is None:
        ids = torch.zeros(rows, 0, dtype=torch.int64)
    at_ids = torch.randn(ids.shape, generator=seeded(seed + 2))
    alpha, gamma = torch.randn(2, rows, generator=seeded(seed + 3))
    return GradientTerms(running_maximum, alpha, gamma if has_gamma else None, ids, at_ids)


def expected_gradient(
    whole: Logits, given_terms: GradientTerms, z: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient by x, how far a dozen roundings of its parts may lead)."""
    shifted = z - given_terms.maximum.double()[:, None]
    e, gamma = shifted.exp(), given_terms.gamma
    parts = [given_terms.alpha.double()[:, None] * e]
    if gamma is not None:
        parts.append(gamma.double()[:, None] * e * shifted.clamp(min=-1000.0))
    d_z = sum(parts, torch.zeros_like(z)).scatter(1, given_terms.ids, given_terms.at_ids.double())
    size = sum((part.abs() for part in parts), d_z.abs())
    # Each logit is rounded once when the maximum is subtracted, and e is relative to that.
    slope = slope_of(whole)
    return slope * d_z, slope * size * EPSILON * (8 + shifted.abs().clamp(max=200.0))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 70),
    classes=st.one_of(st.integers(1, 140), st.integers(1000, 1030)),
    gap=st.integers(0, 9),
    kind=st.sampled_from(sorted(TRANSFORMS)),
    has_gamma=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradient(rows: int, classes: int, gap: int, kind: str, has_gamma: bool, seed: int) -> None:
    whole = logits(kind, rows, classes, seed, gap)
    ids = ids_of(rows, classes, min(classes, seed % 5), seed)
    # z to the bit, so that only the gradient's own roundings are measured.
    every = torch.arange(classes).expand(rows, classes).contiguous()
    z = run(whole, every, classes).at_ids.double()
    given_terms = terms(z.amax(1).float(), seed, has_gamma, ids)
    out = torch.full((rows, classes + gap), 7.0)
    write_gradient(whole, 0, None, given_terms, out[:, :classes])
    expected, bound = expected_gradient(whole, given_terms, z)
    assert (out[:, :classes] - expected).abs().le(bound + 1e-37).all()
    assert out[:, classes:].eq(7.0).all()


def test_gradient_of_chosen_rows_and_of_ids_in_a_later_tile() -> None:
    whole, rows = logits("cap", 9, 300), torch.tensor([8, 0, 3, 3])
    ids = torch.tensor([[1, 999, 1000], [1000, 1299, 1300], [-1, 1150, 2000], [-5, -4, 999]])
    given_terms = terms(torch.full((4,), 3.0), 0, True, ids)
    out = torch.empty(4, 300)
    write_gradient(whole, 1000, rows, given_terms, out)
    chosen = whole._replace(x=whole.x[rows])
    assert chosen.bias is not None
    everything = terms(torch.full((4,), 3.0), 0, True)
    expected, bound = expected_gradient(chosen, everything, logits_of(chosen))
    slope = slope_of(chosen)
    for row, at, k in ((0, 0, 2), (1, 0, 0), (1, 299, 1), (2, 150, 1)):
        expected[row, at] = slope[row, at] * given_terms.at_ids[row, k]
        bound[row, at] = 12 * EPSILON * expected[row, at].abs()
    assert (out - expected).abs().le(4 * bound).all()


def test_exp_is_right_to_one_unit_in_the_last_place() -> None:
    x = torch.linspace(-87.3, 0.0, 100_000)[None]
    ids = torch.zeros(1, 0, dtype=torch.int64)
    out = torch.empty_like(x)
    given_terms = GradientTerms(torch.zeros(1), torch.ones(1), None, ids, torch.zeros(1, 0))
    write_gradient(linear(x), 0, None, given_terms, out)
    expected = x.double().exp()
    assert ((out - expected) / expected).abs().max() <= EPSILON


def test_the_slope_keeps_its_digits_near_saturation() -> None:
    x = torch.linspace(-43.0, 43.0, 1000)[None]
    ids = torch.arange(1000)[None]
    given_terms = GradientTerms(torch.zeros(1), torch.ones(1), None, ids, torch.ones(1, 1000))
    out = torch.empty_like(x)
    write_gradient(Logits(x, None, 1.0, 1.0), 0, None, given_terms, out)
    expected = x.double().cosh().square().reciprocal()
    assert ((out - expected) / expected).abs().max() <= 4 * EPSILON


def test_gradient_of_minus_infinity_and_nan() -> None:
    x = torch.tensor([[0.0, -math.inf, -2000.0, math.nan], [-math.inf] * 4])
    ids = torch.zeros(2, 0, dtype=torch.int64)
    ones = torch.ones(2)
    out = torch.empty_like(x)
    given_terms = GradientTerms(torch.zeros(2), ones, ones, ids, torch.zeros(2, 0))
    write_gradient(linear(x), 0, None, given_terms, out)
    assert out[0, :3].tolist() == [1.0, 0.0, 0.0]
    assert out[0, 3].isnan()
    assert out[1].eq(0).all()


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_rows_out_of_range_are_refused_before_anything_is_read(row: int) -> None:
    given_terms, out = terms(torch.zeros(2), 0, True), torch.full((2, 9), 7.0)
    with pytest.raises(ValueError, match=r"rows must be row numbers of the logits"):
        write_gradient(linear(block(3, 9)), 0, torch.tensor([0, row]), given_terms, out)
    assert out.eq(7.0).all()


def test_ids_that_do_not_ascend_lead_nowhere() -> None:
    """They break the contract and may be passed over, but no memory is touched for them."""
    ids = torch.tensor([[2**62, 3], [-(2**62), 9], [4, 0], [-1, 2**62], [9, -(2**62)]])
    add_statistics(linear(block(5, 5)), 0, ids, fresh(5, 2))
    write_gradient(
        linear(block(5, 5)), 0, None, terms(torch.zeros(5), 0, True, ids), torch.empty(5, 5)
    )


def test_no_rows_and_no_ids() -> None:
    nothing, ids = linear(torch.zeros(0, 5)), torch.zeros(0, 0, dtype=torch.int64)
    add_statistics(nothing, 0, ids, fresh(0, 0))
    write_gradient(nothing, 0, None, terms(torch.zeros(0), 0, False), torch.zeros(0, 5))


def both(whole: Logits, ids: Tensor) -> tuple[Tensor, ...]:
    """Every output of both passes."""
    running = run(whole, ids, 600)
    out = torch.empty(whole.x.shape)
    given_terms = terms(torch.zeros(len(ids)), 0, True, ids)
    # The same terms in each row: a row's result is compared wherever the row lies.
    given_terms = given_terms._replace(
        alpha=torch.full_like(given_terms.alpha, 0.3),
        gamma=torch.full_like(given_terms.alpha, -0.2),
        at_ids=torch.full_like(given_terms.at_ids, 0.5),
    )
    write_gradient(whole, 0, None, given_terms, out)
    assert running.moment is not None
    return running.maximum, running.total, running.moment, running.at_ids, out


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_row_depends_on_itself_alone_and_never_on_threads(kind: str) -> None:
    whole, ids = logits(kind, 67, 1030, gap=3), ids_of(67, 1030, 3)
    expected = both(whole, ids)
    torch.set_num_threads(2)
    assert all(map(torch.equal, both(whole, ids), expected))
    for rows in (slice(0, 1), slice(5, 9), slice(66, 67)):
        part = both(whole._replace(x=whole.x[rows].contiguous()), ids[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, expected, strict=True))


def test_the_library_is_the_one_that_was_named(library: Path) -> None:
    loaded = native_library._library()
    assert not isinstance(loaded, str)
    assert loaded.kernels._name == str(library)
