"""Times candidate tiles of the Triton kernels and prints new rows for chunk/config.py.

Each candidate takes the place of its row, is verified against fp64, and takes turns on the clock
with the row that is committed, those nearest to it first. The best three are timed again; one wins
if it is faster by more than 2 percent then.

examples:
  python -m benchmarks.tune --output tune.jsonl        on a GPU; goes on where it stopped
  python -m benchmarks.tune --smoke                    in Triton's interpreter: no times
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xopd_bench.cell import Job, Shape
from xopd_bench.cli import parse_shape

_SHAPE, _SMOKE_SHAPE = "4096x2048x152064", "32x32x200"
_GAIN = 0.98  # of the committed row's time: what is slower than this is noise


@dataclass(frozen=True)
class Row:
    """A row of a table in chunk/config.py, and the job whose time depends on it."""

    table: str  # its name in the module
    key: tuple[Any, ...]
    job: Job
    candidates: tuple[Any, ...]

    @property
    def name(self) -> str:
        """As it stands in the module."""
        parts = (
            str(x) if not hasattr(x, "name") else f"{type(x).__name__}.{x.name}" for x in self.key
        )
        return f"{self.table}[{', '.join(parts)}]"


def rows(capability: int, dtype: torch.dtype, is_smoke: bool) -> Iterator[Row]:
    """Every row that the device would take, with what may replace it."""
    from xopd_kernels.chunk import config

    size = dtype.itemsize
    for stage in config.Stage:
        arch = _newest(config.TABLE, capability, (size, stage))
        if arch is not None:
            key = (arch, size, stage)
            yield Row("TABLE", key, Job.POLICY_LOSS, tuple(_tiles(config.TABLE[key], is_smoke)))
    arch = _newest(config.SCORING_TABLE, capability, (size,))
    if arch is not None:
        variants = (config.Scoring.TILED,) if is_smoke else tuple(config.Scoring)
        yield Row("SCORING_TABLE", (arch, size), Job.SCORING, variants)
    arch = _newest(config.PERSISTENT_TABLE, capability, (size,))
    if arch is not None and not is_smoke:
        tiles = tuple(_tiles(config.PERSISTENT_TABLE[arch, size], is_smoke))
        yield Row("PERSISTENT_TABLE", (arch, size), Job.SCORING, tiles)


def _newest(table: Any, capability: int, rest: tuple[Any, ...]) -> int | None:
    return max((x[0] for x in table if x[1:] == rest and x[0] <= capability), default=None)


def _tiles(committed: Any, is_smoke: bool) -> Iterator[Any]:
    """The committed tile and others, those that differ in fewer fields first."""
    if is_smoke:
        yield committed
        yield dataclasses.replace(committed, inner=16)
        return
    names = [field.name for field in dataclasses.fields(committed)]

    def differences(tile: Any) -> int:
        return sum(getattr(tile, name) != getattr(committed, name) for name in names)

    yield from sorted({committed, *_fitting(committed)}, key=lambda x: (differences(x), repr(x)))


def _fitting(committed: Any) -> Iterator[Any]:
    """Tiles that other GEMMs were found to like; what does not fit after all, fails."""
    sizes = itertools.product((64, 128, 256), (64, 128, 256), (32, 64, 128))
    for height, width, inner in sizes:
        # Registers: an fp32 accumulator of more than 256 x 128 spills.
        if not 64 * 64 <= height * width <= 256 * 128:
            continue
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            shared = (height + width) * inner * 2 * stages
            if shared <= 220 * 1024 and height * width // warps >= 1024:
                yield dataclasses.replace(
                    committed, rows=height, columns=width, inner=inner, warps=warps, stages=stages
                )


class Tuner:
    """Puts candidates into a table, and the committed row back."""

    def __init__(self, shape: Shape, device: torch.device, is_smoke: bool) -> None:
        from xopd_bench.clock import Clock
        from xopd_bench.measure import Problems, fractions
        from xopd_bench.problem import Drawn
        from xopd_bench.verify import Truth
        from xopd_kernels.testing import Distribution

        self._device, self._clock, self._is_smoke = device, Clock(device), is_smoke
        self._dtype = torch.float32 if is_smoke else torch.bfloat16
        sizes = (*fractions(shape.vocab_size), shape.vocab_size)
        drawn = [
            Drawn.of(
                dataclasses.replace(shape, vocab_size=classes),
                self._dtype,
                Distribution.RANDOM,
                device,
                has_teacher=False,
            )
            for classes in sizes
        ]
        jobs = (Job.POLICY_LOSS, Job.SCORING)
        self._problems = {job: Problems(*(x.problem(job, 0) for x in drawn)) for job in jobs}
        self._truths = {job: Truth.of(self._problems[job]) for job in jobs}

    def try_candidate(self, row: Row, candidate: Any, rounds: int) -> dict[str, Any]:
        """Times of the candidate and of the committed row, in turns; or why it does not run."""
        from triton.runtime.errors import OutOfResources

        from xopd_bench.verify import WrongError
        from xopd_kernels.chunk import config

        table: MutableMapping[Any, Any] = getattr(config, row.table)
        committed, ours = table[row.key], self._ours(row.job)
        times_ms: dict[str, list[float]] = {"candidate": [], "committed": []}
        problems, truth = self._problems[row.job], self._truths[row.job]
        run = ours.prepare(problems.full)
        try:
            table[row.key] = candidate
            truth.check_small(ours.prepare(problems.small)(), ours, problems.small)
            truth.check_full(run(), ours, problems.full)
            if self._is_smoke:
                return {"verified": True}
            for _ in range(rounds):
                for name, value in (("candidate", candidate), ("committed", committed)):
                    table[row.key] = value
                    times_ms[name].append(self._clock.milliseconds(run))
        except (OutOfResources, WrongError, RuntimeError, ValueError) as error:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        finally:
            table[row.key] = committed
        return {f"{name}_ms": statistics.median(values) for name, values in times_ms.items()}

    def _ours(self, job: Job) -> Any:
        """Our operator on TRITON, as the benchmark has it."""
        from xopd_bench.providers.ours import TRITON, providers
        from xopd_bench.providers.provider import Where

        where = Where(self._device, self._dtype, self._is_smoke)
        (ours,) = (x for x in providers(job, where) if x.name == TRITON)
        if ours.prepare is None:
            raise RuntimeError(f"TRITON does not run here: {ours.absent}")
        return ours


class Notes:
    """What was tried, as JSON lines; the same origin, shape and candidate is not tried again."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        from xopd_bench import record

        self._record, self._path, self._about = record, path, about
        lines = [] if path is None else record.read(path, frozenset({"candidate"}))
        self._known = {self._key(line): line for line in lines}

    def _key(self, line: dict[str, Any]) -> str:
        same = {name: line.get(name) for name in self._about if name != "date"}
        return json.dumps([same, line["candidate"]], sort_keys=True)

    def found(self, candidate: str) -> dict[str, Any] | None:
        """The line of an earlier run."""
        return self._known.get(self._key({**self._about, "candidate": candidate}))

    def keep(self, candidate: str, result: dict[str, Any]) -> None:
        """Add a line."""
        if self._path is not None:
            self._record.append(self._path, {**self._about, "candidate": candidate, **result})
        shown = ("candidate_ms", "committed_ms", "failed", "verified")
        line = {"candidate": candidate, **{x: result[x] for x in shown if x in result}}
        print(json.dumps(line), file=sys.stderr, flush=True)


class OutOfTimeError(Exception):
    """No candidate begins any more."""


def tuned(row: Row, tuner: Tuner, notes: Notes, rounds: int, end_s: float) -> str:
    """The row as it should be, with its share of the committed row's time.

    All candidates, then the best three once more with three times the rounds: the best of a hundred
    medians is partly luck. OutOfTimeError carries the row as far as it is known.
    """

    def gains(candidates: Sequence[Any], count: int, suffix: str = "") -> list[tuple[float, Any]]:
        found = []
        for candidate in candidates:
            name = f"{row.name} = {candidate}{suffix}"
            result = notes.found(name)
            if result is None:
                if time.monotonic() > end_s:
                    raise OutOfTimeError(_shown(row, found, "so far"))
                result = tuner.try_candidate(row, candidate, count)
                notes.keep(name, result)
            if result.get("committed_ms"):
                found.append((result["candidate_ms"] / result["committed_ms"], candidate))
        return sorted(found, key=lambda x: x[0])

    best = [candidate for _, candidate in gains(row.candidates, rounds)[:3]]
    return _shown(row, gains(best, 3 * rounds, ", again"), "")


def _shown(row: Row, found: Sequence[tuple[float, Any]], remark: str) -> str:
    gain, chosen = min(found, key=lambda x: x[0], default=(1.0, None))
    if chosen is None or gain >= _GAIN:
        return f"{row.name}: as it is {remark}".rstrip()
    return f"{row.name} = {chosen}  # {gain:.3f} of the committed row's time {remark}".rstrip()


def main() -> int:
    """Tune every row; 3 if the time was not enough."""
    given = _parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.smoke else "cpu")
    if device.type == "cpu" and not given.smoke:
        sys.exit("tune: torch sees no CUDA device; --smoke runs in Triton's interpreter")
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from xopd_bench.measure import Limits
    from xopd_bench.record import origin

    shape = parse_shape(_SMOKE_SHAPE) if given.smoke else given.shape
    about = origin(device, Limits(given.rounds, 0.0, 0.0), given.commit)
    notes = Notes(given.output, {**about, "shape": shape.name})
    end_s = time.monotonic() + (given.stop_after_s or float("inf"))
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    tuner = Tuner(shape, device, given.smoke)
    dtype = torch.float32 if given.smoke else torch.bfloat16
    for row in rows(10 * major + minor, dtype, given.smoke):
        try:
            print(tuned(row, tuner, notes, given.rounds, end_s), flush=True)
        except OutOfTimeError as error:
            print(error)
            print(f"stopped after {given.stop_after_s:g} s", file=sys.stderr)
            return 3
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="two candidates a row in Triton's interpreter")
    add("--shape", type=parse_shape, default=parse_shape(_SHAPE), metavar="NxDxV")
    add("--rounds", type=int, default=10, help="timed rounds (default: %(default)s)")
    add("--stop-after-s", type=float, metavar="S", help="begin no candidate later; the status is 3")
    add("--output", type=Path, metavar="FILE", help="JSON lines; what is there is not timed again")
    add("--commit", default="", metavar="ID", help="of sources without their repository")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
