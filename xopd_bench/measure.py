"""Probe, verify, time: one cell of the table.

A bf16 GEMM on a CPU without instructions for it takes hours at these sizes, and eager torch more
memory than a GPU has. Each provider is therefore run first on two fractions of the vocabulary, and
one whose single pass would take longer than the limit, or more memory than there is, is reported
with the estimate and not run. What a first pass does once (compiling, tuning, loading) is never
taken for the time or the memory of a pass.
"""

import dataclasses
import enum
import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from xopd_bench.clock import Clock
from xopd_bench.errors import BrokenDeviceError
from xopd_bench.memory import Peak, available_bytes, peak, recorded
from xopd_bench.problem import Problem, Results
from xopd_bench.providers.provider import Provider, Run, first_line
from xopd_bench.verify import Check, Truth, WrongError

LEAST_ROUNDS = 3
# Of the limit of a pass: what a probe may take.
_PROBE_SHARE = 0.25
# Of the limit: what the first whole pass may take, which has its pages to fault in.
_FIRST_PASS = 1.25
# A smaller problem than this is not split further; its time would be that of the calls alone.
_SMALL_CLASSES = 2048
# Kernels of others want classes in multiples of this; a fraction that is none would exclude them.
_ALIGNED_CLASSES = 128


class Status(enum.Enum):
    """What became of a provider."""

    OK = "ok"
    ABSENT = "absent"
    OVER_LIMIT = "over limit"
    TOO_LARGE = "too large"
    WRONG = "wrong"
    FAILED = "failed"
    INTERPRETED = "verified only"  # right in Triton's interpreter, whose time says nothing


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
    version: str = ""
    is_floor: bool = False
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    beyond_bytes: int | None = None  # beside inputs and gradients
    extra_bytes: int | None = None  # beside one fp32 d_weight too
    relative_error: float | None = None  # the worst result's, against fp64
    budget_used: float | None = None  # the worst result's error / what it may be
    torch_ratio: float | None = None  # the worst gradient's error / that of plain torch
    logprob_error: float | None = None  # the largest, in nats; None where none are returned
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


def fractions(vocab_size: int) -> tuple[int, int]:
    """Classes of the tiny and the small problem."""
    if vocab_size <= _SMALL_CLASSES:
        return min(_ALIGNED_CLASSES, vocab_size), vocab_size
    return _aligned(vocab_size // 1024), _aligned(vocab_size // 64)


def _aligned(classes: int) -> int:
    return max(1, -(-classes // _ALIGNED_CLASSES)) * _ALIGNED_CLASSES


def measure_cell(
    listed: Sequence[Provider],
    problems: Problems,
    limits: Limits,
    clock: Clock,
    slow_s: Mapping[str, float] | None = None,
    at_work: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:
    """Every provider's outcome: those that are right and fast enough take turns on the clock.

    `slow_s`: seconds of a pass of those that need not be tried, from a cell with other inputs.
    `at_work` is told who is tried next. Raises BrokenDeviceError, and OutOfMemoryError where not
    even the truth fits.
    """
    at_work("solving in fp64")
    truth = Truth.of(problems)
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, Run] = {}
    for provider in listed:
        at_work(provider.name)
        outcome = Outcome(
            provider.name, Status.OK, version=provider.version, is_floor=provider.is_floor
        )
        try:
            _refuse_known(provider, limits, slow_s or {})
            outcome, run = _prepare(provider, problems, truth, limits, outcome)
            if run is not None:
                ready[provider.name] = run
        except _StopError as stop:
            outcome = dataclasses.replace(
                outcome, status=stop.status, reason=str(stop), estimate_s=stop.estimate_s
            )
        except WrongError as error:
            outcome = dataclasses.replace(outcome, status=Status.WRONG, reason=str(error))
        except torch.OutOfMemoryError as error:
            stopped = Status.TOO_LARGE
            outcome = dataclasses.replace(outcome, status=stopped, reason=first_line(error))
            _release()
        except Exception as error:
            # Whatever code of others raises: a run of hours goes on, and the table says so.
            failed = Status.FAILED
            outcome = dataclasses.replace(outcome, status=failed, reason=first_line(error))
            _check_device(provider.name, error)
        outcomes[provider.name] = outcome
    _release()
    at_work("timing")
    timed = _timed(dict(ready), limits, clock)
    for name in ready.keys() - timed.keys():
        reason = "ran out of memory beside the others"
        outcomes[name] = dataclasses.replace(outcomes[name], status=Status.TOO_LARGE, reason=reason)
    for name, times_ms in timed.items():
        outcomes[name] = dataclasses.replace(
            outcomes[name],
            median_ms=round(statistics.median(times_ms), 4),
            p20_ms=round(quantile(sorted(times_ms), 0.2), 4),
            p80_ms=round(quantile(sorted(times_ms), 0.8), 4),
            rounds=len(times_ms),
        )
    return list(outcomes.values())


def _release() -> None:
    """Give back what failed runs held: else the allocator tidies up inside a timed pass."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_device(name: str, error: Exception) -> None:
    """After an illegal access every later call fails, of whomever: then nothing can be said."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as broken:
        raise BrokenDeviceError(
            f"{name} left the device unusable ({first_line(error)}); run again with "
            f"--without {name!r}"
        ) from broken


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which that fraction of the ordered ones lies."""
    return ordered[round(fraction * (len(ordered) - 1))]


def turns(names: Iterable[str], number: int) -> list[str]:
    """The order of round `number`: drawn anew for each, as what ran before leaves its mark.

    Caches, the clock rate and the pages that were handed back differ after a long fp32 product and
    after a short pass; in one circular order everybody would always follow the same neighbour.
    """
    waiting = list(names)
    return random.Random(number).sample(waiting, len(waiting))


def _timed(ready: dict[str, Run], limits: Limits, clock: Clock) -> dict[str, list[float]]:
    """Times of each in ms, in interleaved rounds, each in an order of its own."""
    times_ms: dict[str, list[float]] = {name: [] for name in ready}
    start = time.perf_counter()
    for number in range(limits.rounds if ready else 0):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > limits.cell_s:
            break
        for name in turns(ready, number):
            try:
                times_ms[name].append(clock.milliseconds(ready[name]))
            except torch.OutOfMemoryError:
                # It fitted when it ran alone; others hold memory now, and go on.
                del ready[name], times_ms[name]
                _release()
    return times_ms


def _prepare(
    provider: Provider, problems: Problems, truth: Truth, limits: Limits, outcome: Outcome
) -> tuple[Outcome, Run | None]:
    """Memory and error of a provider, and what is to be timed; raises _StopError, WrongError."""
    if provider.prepare is None:
        raise _StopError(Status.ABSENT, provider.absent)
    if provider.is_interpreted:
        run = provider.prepare(problems.small)
        found = truth.check_small(run(), provider, problems.small)
        reason = "in Triton's interpreter, not timed"
        return _with_errors(outcome, found, status=Status.INTERPRETED, reason=reason), None
    _probe(provider, problems, limits.limit_s)
    if provider.is_floor:
        run = provider.prepare(problems.full)
        run()
        return outcome, run
    small = provider.prepare(problems.small)()
    found = truth.check_small(small, provider, problems.small)
    del small
    run = provider.prepare(problems.full)
    if _warms_up(provider, problems.full):
        run()
    start = time.perf_counter()
    results, full = _recorded(run, problems.full)
    _refuse_slow(time.perf_counter() - start, limits.limit_s)
    found = found.worst(truth.check_full(results, provider, problems.full))
    outcome = dataclasses.replace(
        outcome, beyond_bytes=full.beyond_bytes, extra_bytes=full.extra_bytes
    )
    return _with_errors(outcome, found), run


def _with_errors(
    outcome: Outcome, found: Check, status: Status = Status.OK, reason: str = ""
) -> Outcome:
    return dataclasses.replace(
        outcome,
        status=status,
        reason=reason,
        relative_error=found.relative_error,
        budget_used=found.budget_used,
        torch_ratio=found.torch_ratio or None,
        logprob_error=found.logprob_error or None,
    )


def _warms_up(provider: Provider, problem: Problem) -> bool:
    """Whether a first pass of a shape compiles or tunes; on a CPU a pass may take many seconds."""
    return provider.compiles or problem.hidden.is_cuda


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
        first_s = _seconds(run)  # with what is loaded, compiled and tuned
        is_long = first_s > limit_s * _PROBE_SHARE / 4 and not _warms_up(provider, problem)
        seconds.append(first_s if is_long else _seconds(run))
        estimate = extrapolated(seconds, classes)
        is_last = i == 1
        following_s = seconds[i] / classes[i] * classes[i + 1]
        if following_s > limit_s * (1 if is_last else _PROBE_SHARE) and estimate > limit_s:
            share = f"V/{round(classes[-1] / classes[i])}"
            reason = f"over {limit_s:g} s (estimated {estimate:.0f} s from {share})"
            raise _StopError(Status.OVER_LIMIT, reason, estimate)
        bytes_at_peak.append(_recorded(run, problem)[1].total_bytes)
    free = available_bytes(problems.full.hidden.device)
    need = extrapolated(bytes_at_peak, classes)
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
    """A rough time, with compilation and launches."""
    start = time.perf_counter()
    results = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del results  # releasing gigabytes is not the provider's time
    return elapsed


def _recorded(run: Run, problem: Problem) -> tuple[Results, Peak]:
    """The results, and the peak beside the gradients, with and without one fp32 d_weight."""
    results, sizes = recorded(run, problem.hidden.device)
    gradients: Counter[int] = Counter()
    if problem.job.has_gradient:
        gradients[problem.hidden.nbytes] += 1
    if problem.job.has_d_weight:
        gradients[problem.weight.nbytes] += 1
    accumulated = gradients.copy()
    if problem.job.has_d_weight and problem.weight.dtype != torch.float32:
        accumulated[4 * problem.weight.numel()] += 1
    return results, peak(sizes, gradients, accumulated)


def _refuse_known(provider: Provider, limits: Limits, slow_s: Mapping[str, float]) -> None:
    """Of one that is far over the limit: with other inputs it will not be within."""
    if (estimate_s := slow_s.get(provider.name)) is not None:
        reason = f"over {limits.limit_s:g} s (about {estimate_s:.0f} s with other inputs)"
        raise _StopError(Status.OVER_LIMIT, reason, estimate_s)


def _refuse_slow(elapsed_s: float, limit_s: float) -> None:
    """Of one that takes longer than its probes said: it may cut a large vocabulary otherwise."""
    if elapsed_s > _FIRST_PASS * limit_s:
        reason = f"over {limit_s:g} s (its first pass took {elapsed_s:.0f} s)"
        raise _StopError(Status.OVER_LIMIT, reason, elapsed_s)
