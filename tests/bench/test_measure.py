"""What is measured: the wrong is not ranked, the slow not run, memory is what torch allocates."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch

from xopd_bench import measure
from xopd_bench.cell import Job, Shape
from xopd_bench.clock import Ceiling, Clock
from xopd_bench.errors import BrokenDeviceError
from xopd_bench.measure import (
    Limits,
    Outcome,
    Problems,
    Status,
    fractions,
    measure_cell,
    turns,
)
from xopd_bench.memory import peak, recorded
from xopd_bench.problem import IGNORED, Drawn, solve
from xopd_bench.providers import providers
from xopd_bench.providers.ours import REFERENCE
from xopd_bench.providers.provider import Provider, Where, advantage_of
from xopd_kernels.testing import Distribution

CPU = torch.device("cpu")
SHAPE = Shape(24, 16, 300)
LIMITS = Limits(rounds=3, limit_s=60.0, cell_s=60.0)
CLOCK = Clock(CPU)
DRAWN = functools.cache(
    lambda dtype, distribution, classes: Drawn.of(
        dataclasses.replace(SHAPE, vocab_size=classes), dtype, distribution, CPU, has_teacher=True
    )
)
# The compiled ones take seconds each: xopd bench --smoke has them.
COMPILED = ("torch.compile", "Liger GRPO chunked", "Liger JSD chunked")


def problems(job, dtype=torch.float32, distribution=Distribution.PEAKED, masked=50):
    sizes = (*fractions(SHAPE.vocab_size), SHAPE.vocab_size)
    return Problems(*(DRAWN(dtype, distribution, x).problem(job, masked) for x in sizes))


def listed_for(job, dtype=torch.float32):
    return providers(job, Where(CPU, dtype, is_interpreted=False))


def named(job, name, dtype=torch.float32):
    return next(x for x in listed_for(job, dtype) if x.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("job", Job)
def test_all_providers_but_the_compiled_are_right(job, dtype):
    listed = [x for x in listed_for(job, dtype) if x.name not in COMPILED]
    for outcome in measure_cell(listed, problems(job, dtype), LIMITS, CLOCK):
        assert outcome.status in (Status.OK, Status.ABSENT), outcome
        if outcome.status is Status.ABSENT:
            assert outcome.reason
            continue
        assert outcome.rounds == 3
        assert outcome.p20_ms <= outcome.median_ms <= outcome.p80_ms
        if not outcome.is_floor:
            assert outcome.budget_used <= 1.0
            assert 0 < outcome.extra_bytes <= outcome.beyond_bytes


@pytest.mark.parametrize("job", Job)
def test_every_peer_is_listed_for_every_job(job):
    names = [x.name for x in listed_for(job)]
    assert len(names) == len(set(names))
    for word in ("torch eager", "TRL", "Liger", "verl", "CCE", "QuACK", "FLA", "ours"):
        assert any(word in name for name in names), word
    assert all(x.absent for x in listed_for(job) if x.prepare is None)


def test_verl_needs_none_of_what_its_package_imports():
    """Its `__init__` needs ray and more; its two files do not."""
    chunked = named(Job.POLICY_LOSS, "verl chunked")
    if not chunked.version:
        pytest.skip("verl is not installed; pip install --no-deps verl is enough")
    assert chunked.prepare is not None, chunked.absent


def test_a_provider_that_this_torch_lacks_is_listed_with_its_reason(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    absent = named(Job.SCORING, "F.linear_cross_entropy chunked")
    assert absent.prepare is None
    assert "came with 2.13" in absent.absent
    (outcome,) = measure_cell([absent], problems(Job.SCORING), LIMITS, CLOCK)
    assert (outcome.status, outcome.reason) == (Status.ABSENT, absent.absent)


def test_an_interpreted_provider_is_verified_and_not_timed():
    right = named(Job.SCORING, REFERENCE)
    wrong = dataclasses.replace(
        right, name="wrong", prepare=lambda problem: lambda: {"logprob": torch.zeros(24)}
    )
    listed = [dataclasses.replace(x, is_interpreted=True) for x in (right, wrong)]
    good, bad = measure_cell(listed, problems(Job.SCORING), LIMITS, CLOCK)
    assert (good.status, good.median_ms) == (Status.INTERPRETED, None)
    assert "not timed" in good.reason
    assert bad.status is Status.WRONG


def test_the_ceilings_are_rates():
    ceiling = Ceiling.of(CPU, torch.float32, is_smoke=True)
    assert 1e-4 < ceiling.tflop_s < 100
    assert 0.1 < ceiling.gb_s < 10_000


def test_an_advantage_is_made_of_two_scorings():
    given = problems(Job.ADVANTAGE)
    scoring = named(Job.SCORING, "torch eager").prepare
    composed = Provider("composed", advantage_of(scoring))
    (outcome,) = measure_cell([composed], given, LIMITS, CLOCK)
    assert outcome.status is Status.OK, outcome


def test_a_first_pass_that_compiles_is_not_taken_for_the_time(monkeypatch):
    """The compiled one takes 100 s at its first pass of each shape, and 1 s then."""
    now, seen = 0.0, set()
    right = named(Job.SCORING, "torch eager")

    def prepare(problem):
        def run():
            nonlocal now
            now += 1.0 if len(problem.weight) in seen else 100.0
            seen.add(len(problem.weight))
            return right.prepare(problem)()

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    given = problems(Job.SCORING)
    small = DRAWN(torch.float32, Distribution.PEAKED, 64).problem(Job.SCORING, 50)
    listed = [Provider("compiled", prepare, compiles=True)]
    (outcome,) = measure_cell(listed, given._replace(small=small), LIMITS, CLOCK)
    assert outcome.status is Status.OK, outcome
    assert outcome.median_ms == 1000.0


def test_a_device_that_broke_ends_the_run(monkeypatch):
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def prepare(problem):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(BrokenDeviceError, match="--without 'breaking'"):
        measure_cell([Provider("breaking", prepare)], problems(Job.SCORING), LIMITS, CLOCK)


def test_each_round_has_an_order_of_its_own():
    order = []

    def listed(name):
        def run():
            order.append(name)
            return {}

        return Provider(name, lambda problem: run, is_floor=True)

    measure_cell([listed("a"), listed("b"), listed("c")], problems(Job.SCORING), LIMITS, CLOCK)
    rounds = [tuple(order[-9:][i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(names) == [*"abc"] for names in rounds)
    assert len(set(rounds)) > 1


def test_nobody_always_follows_the_same_neighbour():
    names = [*"abcdefg"]
    before = {name: set() for name in names}
    for number in range(7):
        order = turns(names, number)
        assert order == turns(names, number)
        for first, second in itertools.pairwise(order):
            before[second].add(first)
    assert all(len(neighbours) > 1 for neighbours in before.values())


@pytest.mark.parametrize("classes", [300, 32_000, 131_072, 151_936, 152_064])
def test_fractions_suit_kernels_that_want_multiples(classes):
    tiny, small = fractions(classes)
    assert 0 < tiny <= small <= classes
    if classes > 2048:
        assert tiny % 128 == small % 128 == 0
        assert classes / small > 40


def test_a_failing_provider_is_reported_and_the_others_run():
    def prepare(problem):
        raise RuntimeError("no such luck\nand a long trace")

    listed = [Provider("failing", prepare), named(Job.SCORING, REFERENCE)]
    failed, right = measure_cell(listed, problems(Job.SCORING), LIMITS, CLOCK)
    assert (failed.status, failed.reason) == (Status.FAILED, "RuntimeError: no such luck")
    assert right.status is Status.OK


def big_problems(monkeypatch, second_per_class, call_s=0.0, small=64):
    """Three vocabularies and a provider whose time and sizes a fake clock decides."""
    now = 0.0
    seen = []

    def prepare(problem):
        def timed():
            nonlocal now
            now += call_s + second_per_class * len(problem.weight)
            seen.append(len(problem.weight))
            return {}

        return timed

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    sizes = (16, small, 300)
    drawn = (DRAWN(torch.float32, Distribution.RANDOM, x) for x in sizes)
    return prepare, Problems(*(x.problem(Job.SCORING, 0) for x in drawn)), seen


def outcome_of(prepare, given) -> Outcome:
    return measure_cell([Provider("slow", prepare, is_floor=True)], given, LIMITS, CLOCK)[0]


def test_a_slow_provider_is_stopped_at_the_first_probe(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, second_per_class=1.0)
    outcome = outcome_of(prepare, given)
    assert outcome.status is Status.OVER_LIMIT
    assert outcome.reason == "over 60 s (estimated 300 s from V/19)"
    assert set(seen) == {16}


def test_a_slow_provider_is_stopped_at_the_second_probe(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, second_per_class=0.22)
    outcome = outcome_of(prepare, given)
    assert outcome.status is Status.OVER_LIMIT
    assert outcome.reason == "over 60 s (estimated 66 s from V/5)"
    assert set(seen) == {16, 64}


def test_what_each_call_costs_is_not_taken_for_what_each_class_costs(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, 0.05, call_s=6.0, small=32)
    assert outcome_of(prepare, given).status is Status.OK
    assert 300 in seen


def test_what_takes_longer_than_its_probes_said_is_stopped(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, second_per_class=0.1)
    right = named(Job.SCORING, "torch eager")

    def slow_at_last(problem):
        run = prepare(problem)
        at_last = len(problem.weight) == SHAPE.vocab_size

        def passes():
            for _ in range(5 if at_last else 1):
                run()
            return right.prepare(problem)()

        return passes

    (outcome,) = measure_cell([Provider("slow", slow_at_last)], given, LIMITS, CLOCK)
    assert outcome.status is Status.OVER_LIMIT
    assert outcome.reason == "over 60 s (its first pass took 150 s)"
    assert seen.count(300) == 5


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 10)
    prepare = named(Job.SCORING, REFERENCE).prepare
    (outcome,) = measure_cell([Provider("large", prepare)], problems(Job.SCORING), LIMITS, CLOCK)
    assert outcome.status is Status.TOO_LARGE
    assert "are free" in outcome.reason


def test_no_round_begins_after_the_time_of_a_cell(monkeypatch):
    prepare, given, _ = big_problems(monkeypatch, second_per_class=0.1)
    limits = Limits(rounds=9, limit_s=60.0, cell_s=100.0)
    (outcome,) = measure_cell([Provider("slow", prepare, is_floor=True)], given, limits, CLOCK)
    assert outcome.rounds == 4  # 30 s each


def test_half_of_the_tokens_are_masked_and_peaked_ones_are_peaked():
    drawn = Drawn.of(Shape(400, 1024, 2000), torch.float32, Distribution.PEAKED, CPU, False)
    assert drawn.problem(Job.SCORING, 0).is_live.all()
    half = drawn.problem(Job.SCORING, 50)
    assert (half.target == IGNORED).sum() == 200
    logprob = solve(drawn.problem(Job.SCORING, 0), is_exact=True)["logprob"]
    assert 0.4 < (logprob.exp() > 0.99).double().mean() < 0.6
    assert torch.equal(solve(half, is_exact=True)["logprob"] == 0, ~half.is_live)


def test_peak_counts_excluded_tensors_only_while_they_live():
    # 100 of workspace, released before the gradient of 100 is made and kept with 7 more.
    sizes = [40, 60, -40, -60, 100, 7]
    assert peak(sizes, {100: 1}, {100: 1}) == (107, 100, 100)
    assert peak([100, 7, 100, -7], {100: 1}, {100: 2}) == (207, 107, 7)
    assert peak([-8, 8, 8], {8: 1}, {8: 1}) == (8, 0, 0)


def test_an_allocation_is_recorded():
    result, sizes = recorded(lambda: torch.empty(1000).add(1), CPU)
    assert len(result) == 1000
    assert 8000 <= peak(sizes, {}, {}).total_bytes < 8100  # both, and what the operator needs
    assert sum(sizes) == 4000  # the result is left
