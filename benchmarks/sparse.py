"""Time, kept entries, bound and true error of sparse gradients, on heads of different entropy.

In each cell, one family of inputs (see sparse_problem.py), rounds of one bare GEMM (torch.mm in the
inputs' dtype, on a CPU in fp32 too), the exact policy loss and the sparse one at every threshold
take turns, each round in an order of its own. Before that every provider runs once, and its
gradients are held against those of plain torch in fp64; how many entries a row kept follows from
the mass that the operator says it left out.

examples:
  python -m benchmarks.sparse run --smoke
  python -m benchmarks.sparse run --shape 1024x2048x151936 --threads 2 \\
      --errors 0 0.01 0.03 0.1 0.3 --exponents 0 1 1.5 2 3 --output sparse.jsonl
  python -m benchmarks.sparse plot sparse.jsonl --output docs/sparse/ \\
      --page docs/sparse-gradients.md
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.sparse_problem import CENTRED, PEAKED, Inputs, draw, solve
from benchmarks.sparse_verify import policy_loss, verified
from xopd_bench import record
from xopd_bench.cell import Shape
from xopd_bench.cli import DTYPES, parse_shape
from xopd_bench.clock import Clock
from xopd_bench.errors import BenchError
from xopd_bench.measure import LEAST_ROUNDS, Limits, quantile, turns
from xopd_bench.record import Line
from xopd_kernels.backend import resolve

GEMM, GEMM_FP32, EXACT = "torch.mm", "torch.mm fp32", "exact"
FIELDS = frozenset({"study", "shape", "dtype", "family", "providers"})
_MEASURED = frozenset(("date", "providers", "entropy_nat", "certain_share", "target_p", "left_out"))
_PROBE = 64  # the share of the classes by which a GEMM's time is estimated
_WIDE = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What is measured, and how long it may take."""

    device: torch.device
    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    families: tuple[str, ...]
    errors: tuple[float, ...]
    limits: Limits
    wide: torch.dtype  # of the exact gradients
    threads: int
    stop_after_s: float | None
    output: Path | None
    commit: str


Pass = Callable[[], object]


def sparse_name(error: float) -> str:
    """How a threshold is called."""
    return f"sparse {error:g}"


def run(options: Options, show: Callable[[str], None]) -> tuple[list[Line], bool]:
    """Measure all cells that the output does not have yet.

    Returns the lines of all that were asked for, and whether the time was enough for them. Raises
    BenchError for an output that is none of ours, BackendUnavailableError where nothing can run.
    """
    torch.set_num_threads(options.threads)
    path = options.output
    if path is not None:
        record.check_writable(path)
    known = {} if path is None else {_key(x): x for x in record.read(path, FIELDS)}
    origin = record.origin(options.device, options.limits, options.commit)
    lines: list[Line] = []
    start_s = time.monotonic()
    for dtype in options.dtypes:
        for family in options.families:
            line = origin | _about(options, dtype, family)
            if (found := known.get(_key(line))) is not None:
                lines.append(found)
                continue
            if options.stop_after_s and time.monotonic() - start_s > options.stop_after_s:
                show(f"stopped after {options.stop_after_s:g} s, {len(lines)} cells")
                return lines, False
            begin_s = time.monotonic()
            lines.append(line | _cell(options, dtype, family, show))
            if path is not None:
                record.append(path, lines[-1])
            show(f"{line['dtype']}, family {family}: {time.monotonic() - begin_s:.0f} s")
    return lines, True


def _about(options: Options, dtype: torch.dtype, family: str) -> Line:
    shape = options.shape
    return {
        "study": "sparse",
        "shape": shape.name,
        **dataclasses.asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "family": family,
        "errors": list(options.errors),
        "backend": resolve("auto", options.device, dtype).value,
        "truth": str(options.wide).removeprefix("torch."),
    }


def _key(line: Mapping[str, object]) -> str:
    """What must be equal for a cell not to be measured again."""
    return record.key({name: value for name, value in line.items() if name not in _MEASURED})


def _cell(options: Options, dtype: torch.dtype, family: str, show: Callable[[str], None]) -> Line:
    """Draw, solve, verify, time: the measured half of a line."""
    device, shape = options.device, options.shape
    backend = resolve("auto", device, dtype)
    inputs, described = draw(shape, dtype, family, device, options.wide)
    show(f"family {family}: entropy {described.entropy_nat:.3g} nat, solving")
    truth = solve(inputs, options.wide)
    thresholds: dict[str, float | None] = {EXACT: None}
    thresholds |= {sparse_name(error): error for error in options.errors}
    rows = verified(inputs, truth, backend, thresholds)
    del truth
    gemms, left_out = _gemms(inputs, options.limits.limit_s)
    passes: dict[str, Pass] = {
        **gemms,
        **{
            name: functools.partial(policy_loss, inputs, backend, error)
            for name, error in thresholds.items()
        },
    }
    gc.collect()
    times_ms = _rounds(passes, options.limits, Clock(device))
    for name in gemms:
        rows[name] = {}
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    providers = []
    for name in passes:
        timed = _timing(sorted(times_ms[name]))
        ratios = _ratios(name, medians)
        providers.append(
            {"name": name, "max_error": thresholds.get(name), **timed, **ratios} | rows[name]
        )
    return {**described._asdict(), "left_out": left_out, "providers": providers}


def _gemms(inputs: Inputs, limit_s: float) -> tuple[dict[str, Pass], str]:
    """The bare GEMMs that are fast enough, and why one is left out."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    is_cpu = hidden.device.type == "cpu"
    pairs = {GEMM: (hidden, weight)}
    if is_cpu and hidden.dtype != torch.float32:
        pairs[GEMM_FP32] = (hidden.float(), weight.float())
    passes: dict[str, Pass] = {}
    left_out = ""
    for name, (left, right) in pairs.items():
        estimate_s = _estimated_s(left, right) if is_cpu else 0.0
        if estimate_s > limit_s:
            left_out = f"{name}: over {limit_s:g} s (estimated {estimate_s:.0f} s)"
            continue
        logits = left.new_empty(len(left), len(right))
        passes[name] = functools.partial(torch.mm, left, right.t(), out=logits)
    return passes, left_out


def _estimated_s(left: Tensor, right: Tensor) -> float:
    """Of the GEMM on a CPU, from a share of the classes; the first pass loads what it needs."""
    part = right[: max(1, len(right) // _PROBE)]
    gemm = functools.partial(torch.mm, left, part.t())
    clock = Clock(left.device)
    return min(clock.milliseconds(gemm) for _ in range(2)) * 1e-3 * len(right) / len(part)


def _rounds(passes: Mapping[str, Pass], limits: Limits, clock: Clock) -> dict[str, list[float]]:
    """Times of each in ms, each round in an order of its own."""
    for run in passes.values() if torch.cuda.is_available() else ():
        run()  # what a first pass does once
    times_ms: dict[str, list[float]] = {name: [] for name in passes}
    start_s = time.perf_counter()
    for number in range(limits.rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start_s > limits.cell_s:
            break
        for name in turns(passes, number):
            times_ms[name].append(clock.milliseconds(passes[name]))
    return times_ms


def _timing(ordered: Sequence[float]) -> Line:
    return {
        "median_ms": round(statistics.median(ordered), 4),
        "p20_ms": round(quantile(ordered, 0.2), 4),
        "p80_ms": round(quantile(ordered, 0.8), 4),
        "rounds": len(ordered),
    }


def _ratios(name: str, medians: Mapping[str, float]) -> Line:
    """Against the bare GEMMs and the exact loss; nothing where one was left out."""
    others = {"x_gemm": GEMM, "x_gemm_fp32": GEMM_FP32, "x_exact": EXACT}
    return {
        field: round(medians[name] / medians[other], 4)
        for field, other in others.items()
        if other in medians
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="measure what the output does not have yet"))
    plot = commands.add_parser("plot", help="plots and the table of a file; measures nothing")
    plot.add_argument("file", type=Path, metavar="FILE")
    plot.add_argument("--output", type=Path, metavar="FOLDER", help="write PNGs here")
    plot.add_argument("--page", type=Path, metavar="PAGE", help="put the table between its marks")
    given = parser.parse_args(arguments)
    given.fail = parser.error
    return given


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny shape, 3 thresholds, 4 families; seconds")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    add(
        "--shape",
        type=parse_shape,
        metavar="NxDxV",
        help="default: 4096x2048x151936 on CUDA, 1024x2048x151936 on a CPU",
    )
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], metavar="DTYPE")
    add(
        "--errors",
        nargs="+",
        type=max_error,
        default=[0.0, 0.01, 0.03, 0.1, 0.3],
        metavar="E",
        help="max_gradient_error (default: 0 0.01 0.03 0.1 0.3)",
    )
    add(
        "--exponents",
        nargs="+",
        type=family,
        default=["0", "1", "1.5", "2", "3"],
        metavar="S",
        help="of the families (default: 0 1 1.5 2 3)",
    )
    add(
        "--peaked",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also `peaked` of xopd_bench, as it is and centred",
    )
    add("--rounds", type=_count, default=10, help="timed rounds (default: %(default)s)")
    add(
        "--cell-s",
        type=float,
        default=120.0,
        help="after three rounds none begins later than this (default: %(default)s)",
    )
    add(
        "--limit-s",
        type=float,
        default=30.0,
        help="a bare GEMM that takes longer is left out (default: %(default)s)",
    )
    add("--truth", choices=_WIDE, default="float64", help="dtype of the exact gradients")
    add("--threads", type=_count, default=torch.get_num_threads(), help="default: torch's")
    add("--stop-after-s", type=float, metavar="S", help="begin no cell later; the status is 3")
    add("--output", type=Path, metavar="FILE", help="JSON lines; what is there is not done again")
    add("--commit", default="", metavar="ID", help="of sources without their repository")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def max_error(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a finite number >= 0, got {text}")
    return value


def family(text: str) -> str:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"an exponent is finite and >= 0, got {text}")
    return f"{value:g}"


def _options(given: argparse.Namespace) -> Options:
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = 4096 if device.type == "cuda" else 1024
    shape = given.shape or Shape(rows, 2048, 151_936)
    families, errors = [*given.exponents, *[PEAKED, CENTRED] * given.peaked], given.errors
    if given.smoke:
        shape, families, errors = Shape(48, 32, 500), ["0", "2", PEAKED, CENTRED], [0.0, 0.03, 0.3]
    limits = Limits(3 if given.smoke else given.rounds, given.limit_s, given.cell_s)
    dtypes = tuple(DTYPES[name] for name in given.dtypes)
    return Options(
        device,
        shape,
        dtypes,
        tuple(dict.fromkeys(families)),
        tuple(sorted(set(errors))),
        limits,
        _WIDE[given.truth],
        given.threads,
        given.stop_after_s,
        given.output,
        given.commit,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table, or plot; 3 if the time was not enough."""
    from benchmarks import sparse_report

    given = _parse(arguments)
    try:
        if given.command == "run":
            lines, is_complete = run(_options(given), lambda text: print(text, file=sys.stderr))
            print(sparse_report.table(lines), end="")
            return 0 if is_complete else 3
        lines = record.read(given.file, FIELDS)
        if not lines:
            raise BenchError(f"{given.file} holds no finished cell; the command `run` makes one")
        print(sparse_report.table(lines), end="")
        if given.page is not None:
            sparse_report.put_into(given.page, "study", sparse_report.table(lines))
        for path in sparse_report.write_plots(lines, given.output) if given.output else ():
            print(path, file=sys.stderr)
    except BenchError as error:
        given.fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
