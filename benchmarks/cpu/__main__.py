"""Times every provider of three jobs on the CPU and prints a Markdown table.

Jobs: policy_loss (forward + backward), scoring (log-probs, no gradient), divergence (reverse KL to
a teacher of the same sizes, forward + backward). Each is compared with its bare GEMMs (3, 1 and 4),
in the dtype of the inputs and in fp32: the honest floor where a CPU has no bf16 instructions.

A cell is one job, shape, dtype, distribution and share of masked tokens. In it each provider is
probed at V/1024 and V/64 classes (too slow or too large: reported, not run), verified against fp64
(wrong: reported, not ranked), run once for the peak of its memory, and timed in interleaved
rounds. With --output every finished cell is kept, and the same command goes on after the last.

examples:
  python -m benchmarks.cpu --smoke
  python -m benchmarks.cpu --shapes 512x1024x32000 --dtypes float32 --jobs scoring
  python -m benchmarks.cpu --output benchmarks/results/cpu.jsonl
  python -m benchmarks.cpu --report benchmarks/results/cpu.jsonl
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cpu import record
from benchmarks.cpu.measure import LEAST_ROUNDS, Limits, Outcome, Problems, fractions, measure_cell
from benchmarks.cpu.problem import Cell, Drawn, Job
from benchmarks.cpu.providers import Provider, providers
from benchmarks.cpu.report import markdown
from benchmarks.harness import Shape
from xopd_kernels.testing import Distribution

FULL_SHAPES = ("512x1024x32000", "1024x2048x151936", "256x3584x152064")
SMOKE_SHAPES = ("48x32x500",)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# So many times over the limit, a provider is not tried again with other inputs.
_FAR = 4.0

T = TypeVar("T")
List = Callable[[Job, torch.dtype], list[Provider]]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    jobs: tuple[Job, ...]
    distributions: tuple[Distribution, ...]
    masked: tuple[int, ...]
    limits: Limits
    threads: int
    output: Path | None
    report: Path | None

    def cells(self) -> Iterator[Cell]:
        """Cells in the order in which they are measured: those with the same inputs together."""
        inputs = itertools.product(self.shapes, self.dtypes, self.distributions)
        for shape, dtype, distribution in inputs:
            for job, masked_percent in itertools.product(self.jobs, self.masked):
                yield Cell(shape, dtype, job, distribution, masked_percent)


def parse_shape(text: str) -> Shape:
    """NxDxV: tokens, hidden size, classes."""
    try:
        rows, dim, vocab_size = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a shape is NxDxV, such as {FULL_SHAPES[0]}, got {text!r}"
        ) from None
    if min(rows, dim) < 1 or vocab_size < 16:
        raise argparse.ArgumentTypeError(f"a shape needs N, D >= 1 and V >= 16, got {text!r}")
    return Shape(text, rows, dim, vocab_size)


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_choices(parser)
    _add_limits(parser)
    given = parser.parse_args(arguments)
    shapes = given.shapes or [
        parse_shape(x) for x in (SMOKE_SHAPES if given.smoke else FULL_SHAPES)
    ]
    if not all(0 <= percent < 100 for percent in given.masked):
        parser.error(f"--masked takes percents from 0 to 99, got {given.masked}")
    rounds = given.rounds or (LEAST_ROUNDS if given.smoke else 7)
    if min(rounds, given.threads, given.limit_s) <= 0:
        parser.error("--rounds, --threads and --limit-s must be positive")
    return Options(
        tuple(shapes),
        tuple(DTYPES[x] for x in given.dtypes),
        tuple(Job(x) for x in given.jobs),
        tuple(Distribution(x) for x in given.distributions),
        tuple(given.masked),
        Limits(rounds, given.limit_s, given.cell_s),
        given.threads,
        given.output,
        given.report,
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    jobs, distributions = [x.value for x in Job], [x.value for x in Distribution]
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny shape, all providers; less than a minute")
    help_text = f"tokens x hidden size x classes (default: {' '.join(FULL_SHAPES)})"
    add("--shapes", nargs="+", type=parse_shape, metavar="NxDxV", help=help_text)
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--jobs", nargs="+", choices=jobs, default=jobs)
    help_text = "random: normal logits; peaked: half of the tokens with p > 0.99"
    default = distributions
    add("--distributions", nargs="+", choices=distributions, default=default, help=help_text)
    help_text = "percents of ignored tokens (default: 0 50)"
    add("--masked", nargs="+", type=int, default=[0, 50], metavar="PERCENT", help=help_text)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=int, help=f"timed rounds (default: 7, smoke: {LEAST_ROUNDS})")
    help_text = (
        "a provider whose single pass is estimated longer is not run, one whose first takes twice "
        "that is not timed (default: 60)"
    )
    add("--limit-s", type=float, default=60.0, metavar="S", help=help_text)
    help_text = f"a cell's rounds end after this, {LEAST_ROUNDS} at least (default: 180)"
    add("--cell-s", type=float, default=180.0, metavar="S", help=help_text)
    add(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="torch's threads (default: its own)",
    )
    help_text = "JSON lines, appended cell by cell; cells that are there are not measured again"
    add("--output", type=Path, metavar="FILE", help=help_text)
    help_text = "make the table of these JSON lines; nothing is measured"
    add("--report", type=Path, metavar="FILE", help=help_text)


def run(options: Options, console: Console, listed: List = providers) -> list[record.Line]:
    """Measure all cells that the output does not have yet; the lines of all that were asked for."""
    torch.set_num_threads(options.threads)
    origin = record.origin(options.limits)
    known = (
        {} if options.output is None else {record.key(x): x for x in record.read(options.output)}
    )
    lines: list[record.Line] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        cells = list(options.cells())
        task = progress.add_task("cells", total=len(cells))
        drawn: tuple[Cell, list[Drawn]] | None = None
        for cell in cells:
            line = record.cell_line(origin, cell, ())
            if (found := known.get(record.key(line))) is not None:
                lines.append(found)
            else:
                name = " ".join(str(x) for x in list(cell.record().values())[4:])
                name = f"{cell.shape.name} {name} % masked"
                progress.update(task, description=name)
                start = time.perf_counter()
                if drawn is None or not _has_same_inputs(drawn[0], cell):
                    drawn = None  # before the next: both at once may not fit
                    drawn = (cell, _draw(cell, Job.DIVERGENCE in options.jobs))
                slow_s = _far_over_limit(cell, lines, options.limits.limit_s)
                outcomes = _measure(cell, drawn[1], options.limits, listed, slow_s)
                lines.append(record.cell_line(origin, cell, outcomes))
                if options.output is not None:
                    record.append(options.output, lines[-1])
                # Also where stderr is a file, in which no bar moves.
                console.print(f"{name}: {time.perf_counter() - start:.0f} s", highlight=False)
            progress.advance(task)
    return lines


def _has_same_inputs(first: Cell, second: Cell) -> bool:
    return all(
        getattr(first, name) == getattr(second, name) for name in ("shape", "dtype", "distribution")
    )


def _draw(cell: Cell, has_teacher: bool) -> list[Drawn]:
    """Inputs at both fractions of the vocabulary and in full."""
    shape = cell.shape
    torch.compiler.reset()  # it compiles for each shape, and gives up after some
    return [
        Drawn.of(
            Shape(shape.name, shape.rows, shape.dim, classes),
            cell.dtype,
            cell.distribution,
            has_teacher,
        )
        for classes in (*fractions(shape.vocab_size), shape.vocab_size)
    ]


def _measure(
    cell: Cell, drawn: list[Drawn], limits: Limits, listed: List, slow_s: Mapping[str, float]
) -> list[Outcome]:
    problems = Problems(*(x.problem(cell.job, cell.masked_percent) for x in drawn))
    return measure_cell(listed(cell.job, cell.dtype), problems, limits, slow_s)


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


def main(options: Options) -> None:
    """Measure, or read, and print the table."""
    try:
        if options.report is not None:
            if not options.report.exists():
                sys.exit(f"--report: there is no {options.report}; make it with --output")
            lines = record.read(options.report)
        else:
            lines = run(options, Console(stderr=True))
    except ValueError as error:
        sys.exit(str(error))
    print(markdown(lines), end="")


if __name__ == "__main__":
    main(parse_options())
