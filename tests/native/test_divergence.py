"""Divergences of two models and their gradient against `row_divergence` in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.formulas import EPSILON, block, linear, logits_of, seeded, slope_of
from xopd_kernels.chunk.kl import Divergence, row_divergence
from xopd_kernels.native import (
    DivergenceSums,
    DivergenceTerms,
    Logits,
    Side,
    add_divergence,
    write_divergence_gradient,
)

pytestmark = pytest.mark.usefixtures("library")

BETAS = (0.0, 1.0, 0.5, 0.1, 0.97)


def side(logits: Logits) -> Side:
    z = logits_of(logits)
    maximum = z.amax(1)
    log_total = (z.logsumexp(1) - maximum).float()
    return Side(logits, maximum.float(), log_total)


def pair(rows: int, classes: int, seed: int, distance: float, gap: int = 0) -> tuple[Side, Side]:
    x = block(rows, classes, seed, gap=gap)
    other = x + distance * torch.randn(x.shape, generator=seeded(seed + 1))
    return side(linear(x)), side(linear(other))


def logprob_of(model: Side) -> Tensor:
    """log p in float64 of the statistics that the pass is given, rounded as fp32 rounds it."""
    z = logits_of(model.logits).float()
    return ((z - model.maximum[:, None]) - model.log_total[:, None]).double()


def cut(model: Side, classes: slice, rows: slice = slice(None)) -> Side:
    logits = model.logits._replace(x=model.logits.x[rows, classes])
    return Side(logits, model.maximum[rows], model.log_total[rows])


def empty(rows: int) -> DivergenceSums:
    """Sums from which no class stands apart."""
    return DivergenceSums(
        torch.full((rows,), torch.inf), *torch.zeros(3, rows, dtype=torch.float64)
    )


def run(student: Side, teacher: Side, beta: float, width: int) -> tuple[Tensor, Tensor]:
    rows, classes = student.logits.x.shape
    sums = empty(rows)
    for begin in range(0, classes, width):
        tile = slice(begin, min(begin + width, classes))
        add_divergence(cut(student, tile), cut(teacher, tile), beta, sums)
    assert sums.slope_top.eq(0).all()
    return sums.value, sums.slope_others


def write(
    student: Side, teacher: Side, beta: float, slope_sum: Tensor, weight: Tensor, out: Tensor
) -> None:
    nothing = torch.full_like(weight, torch.nan)  # is not read where no class stands apart
    terms = DivergenceTerms(torch.full_like(weight, torch.inf), slope_sum, nothing, nothing, weight)
    write_divergence_gradient(student, teacher, beta, terms, out)


def reference(student: Side, teacher: Side, beta: float) -> tuple[Divergence, Divergence]:
    """In float64 of the same log-probs; and of the absolute terms, for the bounds."""
    log_p, log_q = logprob_of(student), logprob_of(teacher)
    exact = row_divergence(log_p, log_q, beta)
    return exact, Divergence(exact.value.abs(), exact.slope.abs())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 70),
    classes=st.one_of(st.integers(1, 140), st.integers(1000, 1030)),
    width=st.integers(20, 1100),
    gap=st.integers(0, 9),
    beta=st.sampled_from(BETAS),
    distance=st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_divergence_and_gradient(
    rows: int, classes: int, width: int, gap: int, beta: float, distance: float, seed: int
) -> None:
    student, teacher = pair(rows, classes, seed, distance, gap)
    exact, size = reference(student, teacher, beta)
    value, slope_sum = run(student, teacher, beta, width)
    # log q - log p is rounded once; every term is a product of a few factors of it.
    assert (value - exact.value).abs().le(24 * EPSILON * exact.value + 1e-37).all()
    bound = 24 * EPSILON * size.slope.sum(1) + 1e-37
    assert (slope_sum - exact.slope.sum(1)).abs().le(bound).all()

    rounded, weight = slope_sum.float(), torch.rand(rows, generator=seeded(seed))
    out = torch.full((rows, classes + gap), 7.0)
    write(student, teacher, beta, rounded, weight, out[:, :classes])
    p = logprob_of(student).exp()
    parts = exact.slope, p * rounded[:, None]
    expected = weight[:, None] * (parts[0] - parts[1])
    bound = 24 * EPSILON * weight[:, None] * (parts[0].abs() + parts[1].abs()) + 1e-37
    assert (out[:, :classes] - expected).abs().le(bound).all()
    assert out[:, classes:].eq(7.0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("distance", [1e-6, 0.02, 0.24, 0.26, 0.9, 1.1, 5.0, 40.0])
def test_every_branch_of_the_terms(beta: float, distance: float) -> None:
    """Log-probs that are a given distance apart, whether or not they are normalised."""
    log_q = -torch.rand(64, 1030, generator=seeded(3)) * 30
    log_p = log_q + distance * torch.randn(log_q.shape, generator=seeded(4)).sign()
    zero = torch.zeros(64)
    student, teacher = Side(linear(log_p), zero, zero), Side(linear(log_q), zero, zero)
    value, slope_sum = run(student, teacher, beta, 1030)
    exact, size = reference(student, teacher, beta)
    assert (value - exact.value).abs().le(8 * EPSILON * exact.value).all()
    assert (slope_sum - exact.slope.sum(1)).abs().le(8 * EPSILON * size.slope.sum(1)).all()


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence(beta: float) -> None:
    student, _ = pair(5, 333, 0, 0.0)
    value, slope_sum = run(student, student, beta, 333)
    assert value.eq(0).all()
    out = torch.empty(5, 333)
    write(student, student, beta, slope_sum.float(), torch.ones(5), out)
    assert out.abs().max() <= 4 * EPSILON


@pytest.mark.parametrize("beta", BETAS)
def test_classes_without_mass(beta: float) -> None:
    """-inf on either side and on both: as in float64, inf where that is inf, and never NaN."""
    x, other = block(4, 100), block(4, 100, seed=1)
    x[0, 3] = x[1, :90] = other[2, 7] = -math.inf
    x[3, 99] = other[3, 99] = -math.inf
    student, teacher = side(linear(x)), side(linear(other))
    exact, _ = reference(student, teacher, beta)
    value, slope_sum = run(student, teacher, beta, 64)
    assert torch.allclose(value, exact.value, rtol=1e-5)
    slopes = exact.slope.sum(1)
    assert torch.allclose(slope_sum, slopes, rtol=1e-5, atol=1e-6)
    out = torch.empty_like(x)
    finite = slope_sum.float().where(slopes.isfinite(), 0.0)
    write(student, teacher, beta, finite, torch.ones(4), out)
    expected = exact.slope - logprob_of(student).exp() * finite[:, None]
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_a_nan_of_either_model_is_never_lost(beta: float) -> None:
    student, teacher = pair(3, 200, 0, 1.0)
    clean, _ = run(student, teacher, beta, 200)
    student.logits.x[0, 199] = math.nan
    teacher.logits.x[1, 0] = math.nan
    value, _ = run(student, teacher, beta, 77)
    assert value[:2].isnan().all()
    assert (value[2] - clean[2]).abs() <= 8 * EPSILON * clean[2]


@pytest.mark.parametrize("beta", BETAS)
def test_caps_scales_and_biases_of_both_models(beta: float) -> None:
    bias = torch.randn(500, generator=seeded(9))
    student = side(Logits(block(6, 500, 1), bias, 0.3, 4.0))
    teacher = side(Logits(block(6, 500, 2), None, 0.8, None))
    exact, _ = reference(student, teacher, beta)
    value, slope_sum = run_whole(student, teacher, beta)
    # A capped logit of 4 and more is off by a few roundings itself.
    assert (value - exact.value).abs().le(64 * EPSILON * exact.value).all()
    out, weight = torch.empty(6, 500), torch.rand(6, generator=seeded(5))
    write(student, teacher, beta, slope_sum.float(), weight, out)
    p = logprob_of(student).exp()
    parts = exact.slope, p * slope_sum[:, None]
    factor = slope_of(student.logits) * weight[:, None]
    bound = 64 * EPSILON * factor * (parts[0].abs() + parts[1].abs() + p)
    assert (out - factor * (parts[0] - parts[1])).abs().le(bound).all()


def run_whole(student: Side, teacher: Side, beta: float) -> tuple[Tensor, Tensor]:
    sums = empty(len(student.maximum))
    add_divergence(student, teacher, beta, sums)
    return sums.value, sums.slope_others


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("at", [0, 15, 500, 1029])
def test_a_class_that_stands_apart(beta: float, at: int) -> None:
    """Its gradient has all digits, those of the others are what they were."""
    x = torch.linspace(-30, -16, 40)[:, None] + torch.randn(40, 1030, generator=seeded(0))
    x[:, at] = 0.0
    other = x + 0.5 * torch.randn(x.shape, generator=seeded(1))
    student, teacher = side(linear(x)), side(linear(other))
    sums = empty(40)._replace(bound=torch.full((40,), 0.5))
    for tile in (slice(0, 400), slice(400, 1030)):
        add_divergence(cut(student, tile), cut(teacher, tile), beta, sums)
    p = logprob_of(student).exp()
    slope = row_divergence(logprob_of(student), logprob_of(teacher), beta).slope
    others = torch.arange(1030) != at
    top, rests, sizes = slope[:, at], slope[:, others].sum(1), slope[:, others].abs().sum(1)
    assert (sums.slope_top - top).abs().le(24 * EPSILON * top.abs()).all()
    assert (sums.slope_others - rests).abs().le(24 * EPSILON * sizes).all()
    rest, whole = p[:, others].sum(1), sums.slope_top + sums.slope_others
    terms = (whole.float(), sums.slope_others.float(), rest.float(), torch.ones(40))
    out = torch.empty_like(x)
    gradient_terms = DivergenceTerms(sums.bound, *terms)
    write_divergence_gradient(student, teacher, beta, gradient_terms, out)
    bound = 24 * EPSILON * (top.abs() * rest + p[:, at] * sizes)
    assert (out[:, at] - (top * rest - p[:, at] * rests)).abs().le(bound).all()
    plain = torch.empty_like(x)
    write(student, teacher, beta, whole.float(), torch.ones(40), plain)
    assert out[:, others].equal(plain[:, others])


@pytest.mark.parametrize("beta", BETAS)
def test_a_row_depends_on_itself_alone_and_never_on_threads(beta: float) -> None:
    def both(student: Side, teacher: Side) -> tuple[Tensor, Tensor, Tensor]:
        value, slope_sum = run(student, teacher, beta, 700)
        out = torch.empty(student.logits.x.shape)
        weight = torch.full_like(student.maximum, 0.7)
        write(student, teacher, beta, slope_sum.float(), weight, out)
        return value, slope_sum, out

    student, teacher = pair(67, 1030, 0, 0.3, gap=3)
    expected = both(student, teacher)
    torch.set_num_threads(2)
    assert all(map(torch.equal, both(student, teacher), expected))
    for rows in (slice(0, 1), slice(5, 9), slice(66, 67)):
        every = slice(0, 1030)
        part = both(cut(student, every, rows), cut(teacher, every, rows))
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, expected, strict=True))
