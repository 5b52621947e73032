"""What is right: against fp64, on a fraction of the vocabulary and at full size."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from xopd_bench.cell import Job, Shape
from xopd_bench.clock import Clock
from xopd_bench.measure import Limits, Problems, Status, fractions, measure_cell
from xopd_bench.problem import IGNORED, Drawn
from xopd_bench.providers import providers
from xopd_bench.providers.provider import OUR_BUDGET, Provider, Where
from xopd_kernels.testing import Distribution

CPU = torch.device("cpu")
SHAPE = Shape(24, 16, 300)
LIMITS = Limits(rounds=3, limit_s=60.0, cell_s=60.0)
CLOCK = Clock(CPU)


def problem_of(job, classes):
    shape = dataclasses.replace(SHAPE, vocab_size=classes)
    drawn = Drawn.of(shape, torch.float32, Distribution.PEAKED, CPU, has_teacher=False)
    return drawn.problem(job, 50)


def problems(job):
    return Problems(*(problem_of(job, x) for x in (*fractions(300), 300)))


def eager(job):
    where = Where(CPU, torch.float32, is_interpreted=False)
    return next(x for x in providers(job, where) if x.name == "torch eager")


@pytest.mark.parametrize("result", ["logprob", "d_hidden", "d_weight"])
@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_a_wrong_provider_is_flagged_and_not_timed(result, value):
    right = eager(Job.POLICY_LOSS)

    def prepare(problem):
        def wrong():
            results = right.prepare(problem)()
            results[result].view(-1)[-1] *= value
            results[result].view(-1)[0] += 1e-3
            return results

        return wrong

    listed = [right, Provider("wrong", prepare)]
    good, bad = measure_cell(listed, problems(Job.POLICY_LOSS), LIMITS, CLOCK)
    assert good.status is Status.OK
    assert bad.status is Status.WRONG
    assert bad.median_ms is None
    assert "x its budget" in bad.reason


def test_what_is_wrong_at_full_size_alone_is_flagged():
    full = problems(Job.SCORING)
    small = problem_of(Job.SCORING, 64)
    right = eager(Job.SCORING)

    def prepare(problem):
        factor = 1.01 if len(problem.weight) == SHAPE.vocab_size else 1.0
        return lambda: {"logprob": right.prepare(problem)()["logprob"] * factor}

    (outcome,) = measure_cell(
        [Provider("wrong", prepare)], full._replace(small=small), LIMITS, CLOCK
    )
    assert outcome.status is Status.WRONG
    assert "at full size" in outcome.reason


def no_result(problem, results):
    return {}


def another_shape(problem, results):
    return results | {"logprob": results["logprob"][:1]}


def certain_tokens_have_no_gradient(problem, results):
    """3 % of the norm of d_hidden here, and half of the tokens."""
    is_certain = results["logprob"].exp() > 0.99
    assert is_certain.any()
    return results | {"d_hidden": results["d_hidden"].where(~is_certain[:, None], 0.0)}


def ignored_tokens_have_a_gradient(problem, results):
    ignored = 1e-9 * (problem.target == IGNORED)[:, None]
    return results | {"d_hidden": results["d_hidden"] + ignored}


def d_weight_is_off_at_full_size(problem, results):
    factor = 1.01 if len(problem.weight) == SHAPE.vocab_size else 1.0
    return results | {"d_weight": results["d_weight"] * factor}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_result, "returns no d_hidden, d_weight"),
        (another_shape, r"logprob is \[1\], not \[24\]"),
        (certain_tokens_have_no_gradient, "d_hidden: relative error"),
        (ignored_tokens_have_a_gradient, "ignored tokens have a gradient"),
        (d_weight_is_off_at_full_size, "at full size: d_weight"),
    ],
)
def test_what_a_norm_or_a_fraction_would_hide_is_found(damage, reason):
    right = eager(Job.POLICY_LOSS)

    def prepare(problem):
        run = right.prepare(problem)
        return lambda: damage(problem, run())

    given = problems(Job.POLICY_LOSS)
    small = problem_of(Job.POLICY_LOSS, 64)
    listed = [right, Provider("wrong", prepare, budget=OUR_BUDGET)]
    good, bad = measure_cell(listed, given._replace(small=small), LIMITS, CLOCK)
    assert good.status is Status.OK, good
    assert bad.status is Status.WRONG
    assert re.search(reason, bad.reason)


def test_a_mean_is_compared_with_the_gradient_of_the_mean():
    right = eager(Job.POLICY_LOSS)

    def prepare(problem):
        count = int(problem.is_live.sum())

        def mean():
            results = right.prepare(problem)()
            gradients = ("d_hidden", "d_weight")
            return results | {name: results[name] / count for name in gradients}

        return mean

    mean = Provider("mean", prepare, is_mean=True)
    listed = [mean, dataclasses.replace(mean, name="sum", is_mean=False)]
    good, bad = measure_cell(listed, problems(Job.POLICY_LOSS), LIMITS, CLOCK)
    assert (good.status, bad.status) == (Status.OK, Status.WRONG)
