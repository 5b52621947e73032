"""``xopd bench``: what is measured, and where it goes."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xopd_bench.cell import Job, Shape
from xopd_bench.errors import BenchError, BrokenDeviceError
from xopd_kernels.testing import Distribution

if TYPE_CHECKING:
    from xopd_bench.record import Line
    from xopd_bench.run import Options

CPU_SHAPES = ("512x1024x32000", "1024x2048x151936", "256x3584x152064")
# The lm_heads of Qwen3-Omni-30B-A3B, Qwen2.5-Omni-7B and Voxtral-Mini; what tells most comes first,
# because a run may be stopped.
CUDA_SHAPES = tuple(
    f"{rows}x{head}"
    for rows in (4096, 1024, 16_384, 8192)
    for head in ("2048x152064", "3584x152064", "3072x131072")
)
SMOKE_SHAPES = ("48x32x500",)
CPU_JOBS = (Job.POLICY_LOSS, Job.SCORING, Job.DIVERGENCE)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_DESCRIPTION = """\
Times every provider of seven jobs and prints a Markdown report.

Jobs: policy_loss (forward + backward), frozen_head (the same, no gradient of the weight), scoring
(log-probs, no gradient), divergence (reverse KL to a teacher of the same sizes, forward +
backward), jsd, topk_divergence (to the teacher's 64 likeliest classes), advantage (log-probs under
student and teacher). Each is compared with its bare GEMMs, on a CPU in fp32 too: the honest floor
where it has no bf16 instructions.

A cell is one job, shape, dtype, distribution and share of masked tokens. In it each provider is
probed at V/1024 and V/64 classes (too slow or too large: reported, not run), verified against fp64
(wrong: reported, not ranked), run once for the peak of its memory, and timed in interleaved
rounds. The limits below bound a pass and the rounds; probes, compilation and the fp64 check come on
top. With --output every finished cell is kept, and the same command goes on after the last.
The exit status is 1 if one of ours was wrong or failed."""
_EPILOG = """\
examples:
  xopd bench --smoke                          every provider that runs here, tiny; 2 to 4 minutes
  xopd bench --shapes 4096x2048x152064 --jobs policy_loss --dtypes bfloat16
  xopd bench --output bench.jsonl             everything; hours on a CPU, resumable
  xopd bench report bench.jsonl --plots plots tables and PNGs of one or several files
"""


def add_bench_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """``xopd bench`` and its own sub-command, ``report``."""
    parser = commands.add_parser(
        "bench",
        help="time our operators beside every library that computes the same",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _fill(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks``: the same without the trainer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        epilog=_EPILOG.replace("xopd bench", "python -m benchmarks"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _fill(parser)
    given = parser.parse_args(arguments)
    return int(given.run(given))


def _fill(parser: argparse.ArgumentParser) -> None:
    _add_cells(parser)
    _add_limits(parser)
    parser.set_defaults(run=_measure, fail=parser.error)
    reports = parser.add_subparsers(metavar="report", dest="action")
    report = reports.add_parser(
        "report",
        help="Markdown and plots of files that --output wrote",
        description="Tables, our targets beside what was measured, and plots of result files. One "
        "whose kernels are not today's is marked as stale. Measures nothing.",
        epilog="example: report benchmarks/results/*.jsonl --plots plots > report.md",
    )
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines")
    report.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNGs here")
    report.add_argument(
        "--short", action="store_true", help="only a table with a row for each cell"
    )
    report.set_defaults(run=_report, fail=report.error)


def parse_shape(text: str) -> Shape:
    """NxDxV: tokens, hidden size, classes."""
    try:
        rows, dim, vocab_size = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a shape is NxDxV, such as {CPU_SHAPES[0]}, got {text!r}"
        ) from None
    if min(rows, dim) < 1 or vocab_size < 16:
        raise argparse.ArgumentTypeError(f"a shape needs N, D >= 1 and V >= 16, got {text!r}")
    return Shape(rows, dim, vocab_size)


def _percent(text: str) -> int:
    percent = int(text)
    if not 0 <= percent < 100:
        raise argparse.ArgumentTypeError(f"a percent from 0 to 99, got {text}")
    return percent


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _add_cells(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    jobs, distributions = [x.value for x in Job], [x.value for x in Distribution]
    help_text = "a tiny peaked shape, all jobs and providers; on a CPU Triton is interpreted"
    add("--smoke", action="store_true", help=help_text)
    help_text = "default: cuda if there is one"
    add("--device", choices=("cpu", "cuda"), help=help_text)
    help_text = "tokens x hidden size x classes (default: heads of known models)"
    add("--shapes", nargs="+", type=parse_shape, metavar="NxDxV", help=help_text)
    help_text = "default: bfloat16, on a CPU float32 too"
    add("--dtypes", nargs="+", choices=DTYPES, help=help_text)
    help_text = "default: all; on a CPU policy_loss, scoring and divergence"
    add("--jobs", nargs="+", choices=jobs, help=help_text)
    help_text = "random: normal logits; peaked: half of the tokens with p > 0.99 (default: both)"
    add("--distributions", nargs="+", choices=distributions, help=help_text)
    help_text = "providers to leave out, as they are named in the report"
    add("--without", nargs="+", default=[], metavar="NAME", help=help_text)
    help_text = "percents of ignored tokens (default: 0 50)"
    add("--masked", nargs="+", type=_percent, metavar="PERCENT", help=help_text)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=_count, help="timed rounds (default: 7 on a CPU, 20 on CUDA, smoke 3)")
    help_text = (
        "a provider whose single pass is estimated longer is not run, one whose first takes a "
        "quarter more is not timed (default: 60)"
    )
    add("--limit-s", type=_positive, default=60.0, metavar="S", help=help_text)
    help_text = "a cell's rounds end after this, 3 at least (default: 180)"
    add("--cell-s", type=_positive, default=180.0, metavar="S", help=help_text)
    help_text = "begin no cell later than this; the exit status is then 3, run it again to go on"
    add("--stop-after-s", type=_positive, metavar="S", help=help_text)
    threads = torch.get_num_threads()
    add("--threads", type=_count, default=threads, help="torch's threads (default: its own)")
    help_text = "of sources that were copied without their repository; the lines name it"
    add("--commit", default="", metavar="ID", help=help_text)
    help_text = "JSON lines, appended cell by cell; cells that are there are not measured again"
    add("--output", type=Path, metavar="FILE", help=help_text)


def parse_options(given: argparse.Namespace) -> "Options":
    """What the command line asks for, with the defaults of the device."""
    is_cuda = given.device == "cuda" or (given.device is None and torch.cuda.is_available())
    if is_cuda and not torch.cuda.is_available():
        given.fail("--device cuda: torch sees no CUDA device; `xopd doctor` says more")
    is_interpreted = given.smoke and not is_cuda and _interpreted()
    from xopd_bench.measure import LEAST_ROUNDS, Limits
    from xopd_bench.run import Options

    everything = given.smoke or is_cuda
    shapes = SMOKE_SHAPES if given.smoke else CUDA_SHAPES if is_cuda else CPU_SHAPES
    dtypes = ["bfloat16"] if is_cuda and not given.smoke else ["bfloat16", "float32"]
    jobs = tuple(Job) if everything else CPU_JOBS
    distributions = ["peaked"] if given.smoke else [x.value for x in Distribution]
    rounds = given.rounds or (LEAST_ROUNDS if given.smoke else 20 if is_cuda else 7)
    return Options(
        device=torch.device("cuda" if is_cuda else "cpu"),
        shapes=tuple(given.shapes or (parse_shape(x) for x in shapes)),
        dtypes=tuple(DTYPES[x] for x in given.dtypes or dtypes),
        jobs=tuple(Job(x) for x in given.jobs) if given.jobs else jobs,
        distributions=tuple(Distribution(x) for x in given.distributions or distributions),
        masked=tuple(given.masked or ((50,) if given.smoke else (0, 50))),
        limits=Limits(rounds, given.limit_s, given.cell_s),
        threads=given.threads,
        without=frozenset(given.without),
        is_smoke=given.smoke,
        is_interpreted=is_interpreted,
        stop_after_s=given.stop_after_s,
        output=given.output,
        commit=given.commit,
    )


def _interpreted() -> bool:
    """Have Triton interpret its kernels; False if it was imported to compile them."""
    if "triton" in sys.modules:
        return bool(sys.modules["triton"].knobs.runtime.interpret)
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    return True


def _measure(given: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from xopd_bench.report import markdown
        from xopd_bench.run import run

        options = parse_options(given)
    except ModuleNotFoundError as error:
        given.fail(_missing(error))
    if options.is_interpreted:
        # numpy's, of values that the kernels mask afterwards.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    try:
        lines, is_complete = run(options, Console(stderr=True))
    except BrokenDeviceError as error:
        print(f"xopd bench: error: {error}", file=sys.stderr)
        return 1
    except BenchError as error:
        given.fail(str(error))
    print(markdown(lines), end="")
    if options.is_smoke:
        print("smoke: who runs and is right; times at this size say nothing", file=sys.stderr)
    if broken := list(_broken(lines)):
        print(f"of ours, wrong or failed: {'; '.join(broken)}", file=sys.stderr)
        return 1
    return 0 if is_complete else 3


def _broken(lines: "Sequence[Line]") -> Iterator[str]:
    """Our own providers that ran and were not right: a run that has one must not look well."""
    from xopd_bench.measure import Status
    from xopd_bench.providers.ours import PREFIX

    for line in lines:
        for outcome in line["outcomes"]:
            name, status = outcome["provider"], outcome["status"]
            if name.startswith(PREFIX) and status in (Status.WRONG.value, Status.FAILED.value):
                yield f"{name}, {line['job']} {line['dtype']}: {outcome['reason']}"


def _report(given: argparse.Namespace) -> int:
    from xopd_bench.report import markdown, short_report

    missing = [str(path) for path in given.files if not path.is_file()]
    if missing:
        given.fail(f"no such file: {', '.join(missing)}; xopd bench --output makes one")
    try:
        lines = [line for path in given.files for line in _cells_of(path)]
    except BenchError as error:
        given.fail(str(error))
    print(short_report(lines) if given.short else markdown(lines), end="")
    if given.plots is not None:
        try:
            from xopd_bench.plots import write_plots

            for path in write_plots(lines, given.plots):
                print(path, file=sys.stderr)
        except ModuleNotFoundError as error:
            given.fail(_missing(error))
        except OSError as error:
            given.fail(f"--plots {given.plots} cannot be written ({error}); choose another folder")
    return 0


def _cells_of(path: Path) -> "list[Line]":
    from xopd_bench import record

    lines = record.read(path)
    if not lines:
        raise BenchError(f"{path} holds no finished cell; run the command that made it again")
    return lines


def _missing(error: ModuleNotFoundError) -> str:
    package = (error.name or "xopd").partition(".")[0]
    if package.startswith("xopd"):
        raise error  # a fault of ours
    return f"this needs {package}: pip install '.[bench]' in the clone"
