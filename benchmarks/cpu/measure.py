"""Probe, verify, time: one cell of the table.

A bf16 GEMM on a CPU without instructions for it takes hours at these sizes. Each provider is
therefore run first on two fractions of the vocabulary, and one whose single pass would take longer
than the limit, or more memory than there is, is reported with the estimate and not run.
"""

import dataclasses
import enum
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.cpu.memory import Peak, available_bytes, peak, recorded
from benchmarks.cpu.problem import Job, Problem, Results, solve
from benchmarks.cpu.providers import Budget, Provider, Run
from benchmarks.harness import quantile

LEAST_ROUNDS = 3
# Tokens whose results are verified at the full vocabulary.
_SLICE_ROWS = 32
# Of the limit of a pass: what a probe may take.
_PROBE_SHARE = 0.25
# A smaller problem than this is not split further; its time would be that of the calls alone.
_TINY_CLASSES, _SMALL_CLASSES = 16, 2048


class Status(enum.Enum):
    """What became of a provider."""

    OK = "ok"
    ABSENT = "absent"
    OVER_LIMIT = "over limit"
    TOO_LARGE = "too large"
    WRONG = "wrong"
    FAILED = "failed"


class Limits(NamedTuple):
    """How long a cell may take."""

    rounds: int
    limit_s: float  # one pass of one provider
    cell_s: float  # after LEAST_ROUNDS no round begins later than this


@dataclass(frozen=True)
class Outcome:
    """A provider's row in a cell; times and memory only with Status.OK."""

    provider: str
    status: Status
    reason: str = ""
    is_floor: bool = False
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    extra_bytes: int | None = None  # beside inputs, gradients and one fp32 d_weight
    peak_bytes: int | None = None  # of all allocations
    relative_error: float | None = None  # the worst result's, against fp64
    budget_used: float | None = None  # the worst result's error / what it may be
    estimate_s: float | None = None  # of one pass; Status.OVER_LIMIT only


class Problems(NamedTuple):
    """The same job at two fractions of the vocabulary and in full."""

    tiny: Problem
    small: Problem
    full: Problem


class _StopError(Exception):
    """A provider is not timed; carries its status and the reason."""

    def __init__(self, status: Status, reason: str, estimate_s: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.estimate_s = status, estimate_s


class Check(NamedTuple):
    """The worst of some results."""

    relative_error: float
    budget_used: float


def fractions(vocab_size: int) -> tuple[int, int]:
    """Classes of the tiny and the small problem."""
    small = vocab_size if vocab_size <= _SMALL_CLASSES else vocab_size // 64
    return max(_TINY_CLASSES, min(vocab_size // 1024, small)), small


def measure_cell(
    listed: Sequence[Provider],
    problems: Problems,
    limits: Limits,
    slow_s: Mapping[str, float] | None = None,
) -> list[Outcome]:
    """Every provider's outcome: those that are right and fast enough take turns on the clock.

    `slow_s`: seconds of a pass of those that need not be tried, from a cell with other inputs.
    """
    truth = Truth.of(problems)
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, Run] = {}
    for provider in listed:
        outcome = Outcome(provider.name, Status.OK, is_floor=provider.is_floor)
        try:
            _refuse_known(provider, limits, slow_s or {})
            outcome, ready[provider.name] = _prepare(provider, problems, truth, limits, outcome)
        except _StopError as stop:
            outcome = dataclasses.replace(
                outcome, status=stop.status, reason=str(stop), estimate_s=stop.estimate_s
            )
        except (RuntimeError, TypeError, ValueError, MemoryError) as error:
            # One that fails must not end a run of hours: the table says so in its row.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome = dataclasses.replace(outcome, status=Status.FAILED, reason=reason)
        outcomes[provider.name] = outcome
    for name, times_ms in _timed(ready, limits).items():
        outcomes[name] = dataclasses.replace(
            outcomes[name],
            median_ms=round(statistics.median(times_ms), 4),
            p20_ms=round(quantile(sorted(times_ms), 0.2), 4),
            p80_ms=round(quantile(sorted(times_ms), 0.8), 4),
            rounds=len(times_ms),
        )
    return list(outcomes.values())


def _timed(ready: dict[str, Run], limits: Limits) -> dict[str, list[float]]:
    """Times of each in ms, in interleaved rounds."""
    times_ms: dict[str, list[float]] = {name: [] for name in ready}
    start = time.perf_counter()
    for number in range(limits.rounds if ready else 0):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > limits.cell_s:
            break
        for name, run in ready.items():
            times_ms[name].append(_seconds(run) * 1e3)
    return times_ms


def _prepare(
    provider: Provider, problems: Problems, truth: "Truth", limits: Limits, outcome: Outcome
) -> tuple[Outcome, Run]:
    """Memory and error of a provider, and what is to be timed; raises _StopError."""
    if provider.prepare is None:
        raise _StopError(Status.ABSENT, provider.absent)
    _probe(provider, problems, limits.limit_s)
    if provider.is_floor:
        run = provider.prepare(problems.full)
        run()
        return outcome, run
    checks = [check(provider.prepare(problems.small)(), *truth.small, provider.budget)]
    _refuse_wrong(checks[-1], "on a fraction of the vocabulary")
    run = provider.prepare(problems.full)
    start = time.perf_counter()
    results, full = _recorded(run, problems.full)
    _refuse_slow(time.perf_counter() - start, limits.limit_s)
    sliced = {name: results[name][truth.rows] for name in truth.full[0] if name in results}
    del results
    checks.append(check(sliced, *truth.full, provider.budget))
    _refuse_wrong(checks[-1], f"at {len(truth.rows)} tokens of the full problem")
    return dataclasses.replace(
        outcome,
        extra_bytes=full.extra_bytes,
        peak_bytes=full.total_bytes,
        relative_error=max(x.relative_error for x in checks),
        budget_used=max(x.budget_used for x in checks),
    ), run


def _probe(provider: Provider, problems: Problems, limit_s: float) -> None:
    """Raises _StopError if a pass at full size would take too long or too much memory."""
    prepare = provider.stand_in or provider.prepare
    if prepare is None:
        raise ValueError(f"{provider.name} has nothing to run")
    classes = [len(problem.weight) for problem in problems]
    seconds: list[float] = []
    bytes_at_peak: list[float] = []
    for i, problem in enumerate((problems.tiny, problems.small)):
        run = prepare(problem)
        # The first pass also loads libraries; the second counts, if there is time for it.
        elapsed = _seconds(run)
        seconds.append(elapsed if elapsed > limit_s * _PROBE_SHARE / 4 else _seconds(run))
        estimate = extrapolated(seconds, classes)
        is_last = i == 1
        following_s = seconds[i] / classes[i] * classes[i + 1]
        if following_s > limit_s * (1 if is_last else _PROBE_SHARE) and estimate > limit_s:
            share = f"V/{round(classes[-1] / classes[i])}"
            reason = f"over {limit_s:g} s (estimated {estimate:.0f} s from {share})"
            raise _StopError(Status.OVER_LIMIT, reason, estimate)
        bytes_at_peak.append(_recorded(run, problem)[1].total_bytes)
    need, free = extrapolated(bytes_at_peak, classes), available_bytes()
    if free is not None and need > free:
        reason = f"needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise _StopError(Status.TOO_LARGE, reason)


def extrapolated(values: Sequence[float], classes: Sequence[int]) -> float:
    """A value at the last of `classes`: from the first in proportion, from the first two by line.

    Two tell what each class costs apart from what each call costs.
    """
    if len(values) == 1 or classes[1] <= classes[0]:
        return values[-1] / classes[len(values) - 1] * classes[-1]
    slope = max(0.0, (values[1] - values[0]) / (classes[1] - classes[0]))
    return values[1] + slope * (classes[-1] - classes[1])


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    results = run()
    elapsed = time.perf_counter() - start
    del results  # releasing gigabytes is not the provider's time
    return elapsed


def _recorded(run: Run, problem: Problem) -> tuple[Results, Peak]:
    """The results, and the peak beside both gradients and one fp32 d_weight."""
    results, sizes = recorded(run)
    excluded: dict[int, int] = {}
    if problem.job is not Job.SCORING:
        gradients = (problem.hidden.nbytes, problem.weight.nbytes)
        for size in (*gradients, problem.weight.numel() * 4):
            excluded[size] = 1
    return results, peak(sizes, excluded)


class Truth(NamedTuple):
    """What is right and how far plain torch is from it: (in fp64, in plain torch)."""

    small: tuple[Results, Results]
    rows: torch.Tensor  # the tokens that are verified at full size
    full: tuple[Results, Results]  # of those tokens; the results that have a row for each token

    @classmethod
    def of(cls, problems: Problems) -> "Truth":
        """Solve the small problem, and some tokens of the full one."""
        live = problems.full.is_live.nonzero().squeeze(1)
        rows = live[:: max(1, len(live) // _SLICE_ROWS)][:_SLICE_ROWS]
        part = problems.full.of_rows(rows)
        small = (solve(problems.small, True), solve(problems.small, False))
        full = (solve(part, True, has_d_weight=False), solve(part, False, has_d_weight=False))
        for results in full:
            results.pop("loss", None)
        return cls(small, rows, full)


def check(results: Results, truth: Results, plain: Results, budget: Budget) -> Check:
    """The worst relative error against fp64, and the worst share of the error that is allowed.

    Allowed is the budget and one rounding of the result, in the 2-norm over a result. A
    loss is one number, in which plain torch's errors may cancel by luck: there it is the sum of
    their sizes.
    """
    worst = Check(0.0, 0.0)
    for name, value in results.items():
        expected = truth[name]
        error = (value.double() - expected).norm().item()
        size = max(expected.norm().item(), torch.finfo(torch.float64).tiny)
        key = "logprob" if name == "loss" else name
        off = plain[key].double() - truth[key]
        plain_error = off.abs().sum().item() if name == "loss" else off.norm().item()
        slack = budget.slack + torch.finfo(value.dtype).eps
        allowed = budget.factor * plain_error + slack * size
        if not error <= float("inf"):  # a NaN would lose every comparison
            return Check(float("inf"), float("inf"))
        worst = Check(
            max(worst.relative_error, error / size), max(worst.budget_used, error / allowed)
        )
    return worst


def _refuse_known(provider: Provider, limits: Limits, slow_s: Mapping[str, float]) -> None:
    """Of one that is far over the limit: with other inputs it will not be within."""
    if (estimate_s := slow_s.get(provider.name)) is not None:
        reason = f"over {limits.limit_s:g} s (about {estimate_s:.0f} s with other inputs)"
        raise _StopError(Status.OVER_LIMIT, reason, estimate_s)


def _refuse_slow(elapsed_s: float, limit_s: float) -> None:
    """Of one that takes longer than its probes said: it may cut a large vocabulary otherwise."""
    if elapsed_s > 2 * limit_s:  # the first pass also has its pages to fault in
        reason = f"over {limit_s:g} s (its first pass took {elapsed_s:.0f} s)"
        raise _StopError(Status.OVER_LIMIT, reason, elapsed_s)


def _refuse_wrong(found: Check, where: str) -> None:
    if not found.budget_used <= 1.0:
        error, used = found
        reason = f"{where}: relative error {error:.1e}, {used:.1f} x its budget"
        raise _StopError(Status.WRONG, reason)
