"""The loop over cells: what is in the output already is not measured again."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xopd_bench import record
from xopd_bench.cell import Cell, Job, Shape
from xopd_bench.clock import Ceiling, Clock
from xopd_bench.errors import BenchError
from xopd_bench.measure import Limits, Outcome, Problems, Status, fractions, measure_cell
from xopd_bench.problem import Drawn
from xopd_bench.providers import providers
from xopd_bench.providers.provider import Provider, Where, first_line
from xopd_kernels.testing import Distribution

# So many times over the limit, a provider is not tried again with other inputs.
_FAR = 2.0

Listed = Callable[[Job, Where], list[Provider]]


@dataclass(frozen=True)
class Options:
    """What is measured, and how long it may take."""

    device: torch.device
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    jobs: tuple[Job, ...]
    distributions: tuple[Distribution, ...]
    masked: tuple[int, ...]
    limits: Limits
    threads: int
    without: frozenset[str]  # providers that are left out
    is_smoke: bool
    is_interpreted: bool  # on a CPU: Triton's kernels run in its interpreter
    stop_after_s: float | None
    output: Path | None
    commit: str = ""  # of sources without their repository

    @property
    def needs_teacher(self) -> bool:
        """Whether any job needs a second head to be drawn."""
        return any(job.has_teacher or job is Job.TOPK_DIVERGENCE for job in self.jobs)

    def cells(self) -> Iterator[Cell]:
        """Cells in the order in which they are measured: those with the same inputs together."""
        inputs = itertools.product(self.shapes, self.dtypes, self.distributions)
        for shape, dtype, distribution in inputs:
            for job, masked_percent in itertools.product(self.jobs, self.masked):
                yield Cell(shape, dtype, job, distribution, masked_percent)


class Bench:
    """Measures cells; keeps the inputs of the last one and the ceilings of each dtype."""

    def __init__(self, options: Options, listed: Listed) -> None:
        self._options, self._listed = options, listed
        self._clock = Clock(options.device)
        self._ceilings: dict[torch.dtype, Ceiling] = {}
        self._drawn: tuple[tuple[object, ...], list[Drawn]] | None = None

    def ceiling(self, dtype: torch.dtype) -> Ceiling:
        """The best rates of the device, measured when they are first asked for."""
        if dtype not in self._ceilings:
            options = self._options
            self._ceilings[dtype] = Ceiling.of(options.device, dtype, options.is_smoke)
        return self._ceilings[dtype]

    def measure(
        self, cell: Cell, before: Sequence[record.Line], at_work: Callable[[str], None]
    ) -> list[Outcome]:
        """All providers of a cell; `before`: cells that were measured already."""
        options, listed = self._options, self._providers(cell)
        slow_s = _far_over_limit(cell, before, options.limits.limit_s)
        try:
            drawn = self._inputs(cell)
            problems = Problems(*(x.problem(cell.job, cell.masked_percent) for x in drawn))
            return measure_cell(listed, problems, options.limits, self._clock, slow_s, at_work)
        except torch.OutOfMemoryError as error:
            reason = f"the inputs and their fp64 check do not fit: {first_line(error)}"
            return [Outcome(x.name, Status.TOO_LARGE, reason, x.version) for x in listed]

    def described(self, cell: Cell) -> dict[str, float]:
        """What a line says of the inputs that were measured last; nothing if they do not fit."""
        try:
            *_, full = self._inputs(cell)
            return full.described()
        except torch.OutOfMemoryError:
            return {}

    def _providers(self, cell: Cell) -> list[Provider]:
        options = self._options
        listed = self._listed(cell.job, Where(options.device, cell.dtype, options.is_interpreted))
        absent = "left out (--without)"
        return [
            dataclasses.replace(x, prepare=None, absent=absent) if x.name in options.without else x
            for x in listed
        ]

    def _inputs(self, cell: Cell) -> list[Drawn]:
        """Inputs at both fractions of the vocabulary and in full; the last ones are kept."""
        inputs = (cell.shape, cell.dtype, cell.distribution)
        if self._drawn is None or self._drawn[0] != inputs:
            self._drawn = None  # before the next: both at once may not fit
            torch.compiler.reset()  # it compiles for each shape, and gives up after some
            self._drawn = inputs, self._draw(cell)
        return self._drawn[1]

    def _draw(self, cell: Cell) -> list[Drawn]:
        shape, options = cell.shape, self._options
        return [
            Drawn.of(
                Shape(shape.rows, shape.dim, classes),
                cell.dtype,
                cell.distribution,
                options.device,
                options.needs_teacher,
            )
            for classes in (*fractions(shape.vocab_size), shape.vocab_size)
        ]


def run(
    options: Options, console: Console, listed: Listed = providers
) -> tuple[list[record.Line], bool]:
    """Measure all cells that the output does not have yet.

    Returns the lines of all that were asked for, and whether the time was enough for them. Raises
    BenchError for an output that is none of ours, a provider in `without` that there is not, and a
    device that does not work any more; finished cells are in the output then.
    """
    torch.set_num_threads(options.threads)
    if options.without:
        _check_names(options, listed)
    if options.output is not None:
        record.check_writable(options.output)
    origin = record.origin(options.device, options.limits, options.commit)
    path = options.output
    known = {} if path is None else {record.key(x): x for x in record.read(path)}
    bench, lines, start = Bench(options, listed), [], time.monotonic()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        cells = list(options.cells())
        task = progress.add_task("cells", total=len(cells))
        for cell in cells:
            empty = record.cell_line(origin, cell, (), Ceiling(0.0, 0.0))
            if (found := known.get(record.key(empty))) is not None:
                lines.append(found)
                progress.advance(task)
                continue
            if options.stop_after_s and time.monotonic() - start > options.stop_after_s:
                console.print(f"stopped after {options.stop_after_s:g} s, {len(lines)} cells")
                return lines, False
            name = _name(cell)
            begin = time.monotonic()

            def at_work(provider: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {provider}")

            outcomes = bench.measure(cell, lines, at_work)
            line = record.cell_line(origin, cell, outcomes, bench.ceiling(cell.dtype))
            lines.append(line | bench.described(cell))
            if path is not None:
                record.append(path, lines[-1])
            # Also where stderr is a file, in which no bar moves.
            console.print(f"{name}: {time.monotonic() - begin:.0f} s", highlight=False)
            progress.advance(task)
    return lines, True


def _check_names(options: Options, listed: Listed) -> None:
    where = Where(options.device, options.dtypes[0], options.is_interpreted)
    known = {x.name for job in options.jobs for x in listed(job, where)}
    if unknown := options.without - known:
        raise BenchError(
            f"--without names {', '.join(map(repr, sorted(unknown)))}; there are "
            f"{', '.join(map(repr, sorted(known)))}"
        )


def _far_over_limit(cell: Cell, lines: Sequence[record.Line], limit_s: float) -> dict[str, float]:
    """Seconds of a pass of what was far over the limit in cells that differ in inputs alone."""
    same = ("job", "shape", "dtype")
    wanted = cell.record()
    return {
        outcome["provider"]: outcome["estimate_s"]
        for line in lines
        if all(line[name] == wanted[name] for name in same)
        for outcome in line["outcomes"]
        if (outcome.get("estimate_s") or 0.0) > _FAR * limit_s
    }


def _name(cell: Cell) -> str:
    dtype = str(cell.dtype).removeprefix("torch.")
    kind = f"{cell.job.value} {cell.distribution.value} {cell.masked_percent} % masked"
    return f"{cell.shape.name} {dtype} {kind}"
