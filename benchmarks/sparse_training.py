"""The bundled demo trained with exact and with sparse gradients, from the same seeds.

Each run is `xopd demo`'s of that seed with loss.max_gradient_error set, in a folder of its own:
killed, it resumes from its last checkpoint, and one that is in the output is not trained again.
Printed is, for each final figure, how far the mean over seeds is from that of the exact runs of the
same seeds, and whether that is within the seeds' spread: the sample standard deviation of exact.

examples:
  python -m benchmarks.sparse_training run --smoke
  python -m benchmarks.sparse_training run --steps 40 --output training.jsonl
  python -m benchmarks.sparse_training plot training.jsonl --output docs/sparse/ \\
      --page docs/sparse-gradients.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from benchmarks.sparse_training_report import put_into, table, verdicts, write_plot
from xopd.config import Config
from xopd.data.synth import SplitName, synthesize
from xopd.metrics import METRICS_FILE, read_jsonl
from xopd.recipes.demo import DATA_SEED, SIZES, DemoPaths, demo_config
from xopd.train import train
from xopd_bench import record
from xopd_bench.errors import BenchError
from xopd_bench.measure import Limits
from xopd_bench.record import Line

EXACT = "exact"
FIELDS = frozenset({"study", "seed", "gradient", "steps", "curve", "figures"})
_MEASURED = frozenset({"date", "curve", "figures", "train_s"})
_LAST = 0.1  # of the steps: what the final KL is a mean over
_CURVES = (
    *("kl_speech", "kl_text", "entropy_speech", "entropy_text", "loss", "grad_norm"),
    *("gradient_error", "dropped_mass_speech", "dropped_mass_text"),
)
_TINY: dict[SplitName, int] = {"train": 12, "test": 4, "test_heldout_voice": 2}
_NO_LIMITS = Limits(1, 0.0, 0.0)


@dataclass(frozen=True)
class Options:
    """Which runs, and where they go."""

    seeds: tuple[int, ...]
    errors: tuple[float | None, ...]  # None: exact
    steps: int | None  # None: the demo's
    threads: int
    folder: Path  # of corpus and runs
    is_smoke: bool
    stop_after_s: float | None
    output: Path | None
    commit: str


def gradient_name(error: float | None) -> str:
    """How the runs of a threshold are called."""
    return EXACT if error is None else f"sparse {error:g}"


def run(options: Options, show: Callable[[str], None]) -> tuple[list[Line], bool]:
    """Train what the output does not have yet, seed by seed.

    Returns the lines of all runs that were asked for, and whether the time was enough for them.
    Raises BenchError for an output that is none of ours, and what training raises.
    """
    torch.set_num_threads(options.threads)
    path = options.output
    if path is not None:
        record.check_writable(path)
    known = {} if path is None else {_key(x): x for x in record.read(path, FIELDS)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = record.origin(device, _NO_LIMITS, options.commit)
    sizes = _TINY if options.is_smoke else SIZES
    synthesize(options.folder / "data", sizes=sizes, seed=DATA_SEED, workers=1, progress=False)
    lines: list[Line] = []
    start_s = time.monotonic()
    with as_file(files("xopd") / "assets" / "demo") as models:
        for seed in options.seeds:
            for error in options.errors:
                config = _config(options, models, seed, error)
                line = origin | _about(config, error)
                if (found := known.get(_key(line))) is not None:
                    lines.append(found)
                    continue
                if options.stop_after_s and time.monotonic() - start_s > options.stop_after_s:
                    show(f"stopped after {options.stop_after_s:g} s, {len(lines)} runs")
                    return lines, False
                begin_s = time.monotonic()
                folder = train(config)
                seconds = round(time.monotonic() - begin_s, 1)
                lines.append(line | _ends(folder) | {"train_s": seconds})
                if path is not None:
                    record.append(path, lines[-1])
                show(f"seed {seed}, {line['gradient']}: {seconds:.0f} s")
    return lines, True


def _config(options: Options, models: Path, seed: int, error: float | None) -> Config:
    """The demo's config of that seed with the threshold; tiny for a smoke run."""
    config = demo_config(DemoPaths(options.folder), models, seed)
    name = gradient_name(error).replace(" ", "_")
    steps = config.train.steps if options.steps is None else options.steps
    runs = options.folder / f"{steps}_steps_{record.kernel_hash()}"
    settings = dataclasses.replace(
        config.train,
        steps=steps,
        threads=options.threads,
        tensorboard=False,
        out_dir=str(runs / f"{name}_seed_{seed}"),
    )
    loss = dataclasses.replace(config.loss, max_gradient_error=error)
    config = dataclasses.replace(config, train=settings, loss=loss)
    if not options.is_smoke:
        return config
    rollout = dataclasses.replace(
        config.rollout, prompts_per_step=2, rollouts_per_prompt=1, max_new_tokens=8
    )
    data = dataclasses.replace(config.data, eval_limit=4)
    return dataclasses.replace(config, rollout=rollout, data=data)


def _about(config: Config, error: float | None) -> Line:
    return {
        "study": "sparse training",
        "seed": config.train.seed,
        "gradient": gradient_name(error),
        "max_error": error,
        "steps": config.train.steps,
        "prompts_per_step": config.rollout.prompts_per_step,
        "rollouts_per_prompt": config.rollout.rollouts_per_prompt,
        "learning_rate": config.optim.learning_rate,
        "is_smoke": config.rollout.max_new_tokens == 8,
    }


def _key(line: Mapping[str, object]) -> str:
    """What must be equal for a run not to be trained again."""
    return record.key({name: value for name, value in line.items() if name not in _MEASURED})


def _ends(folder: Path) -> Line:
    """The curves of a finished run, and its final figures."""
    steps = read_jsonl(folder / METRICS_FILE)
    curve = {name: [step[name] for step in steps] for name in _CURVES if name in steps[0]}
    last = max(1, math.ceil(_LAST * len(steps)))
    figures: dict[str, float] = {
        name: sum(curve[name][-last:]) / last for name in ("kl_speech", "kl_text") if name in curve
    }
    for prefix, file in (("accuracy", "after.json"), ("before", "before.json")):
        found: dict[str, Any] = json.loads((folder / "eval" / file).read_text("utf-8"))
        for name in ("speech", "text", "held_out_voice"):
            if name in found:
                figures[f"{prefix}_{name}"] = found[name]["accuracy"]
    return {"curve": curve, "figures": figures}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("run", help="train what the output does not have yet").add_argument
    add(
        "--smoke",
        action="store_true",
        help="2 steps of 4 rollouts, one seed, in a folder that goes",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    help_text = "max_gradient_error of the sparse runs, beside the exact ones (default: 0.01 0.3)"
    add("--errors", nargs="+", type=max_error, default=[0.01, 0.3], metavar="E", help=help_text)
    add("--steps", type=_count, help="default: the demo's 80")
    add("--threads", type=_count, default=2, help="default: %(default)s, as the demo")
    help_text = "corpus and runs (default: %(default)s)"
    add("--runs", type=Path, default=Path("runs/sparse"), metavar="FOLDER", help=help_text)
    add("--stop-after-s", type=float, metavar="S", help="begin no run later; the status is 3")
    add("--output", type=Path, metavar="FILE", help="JSON lines; what is there is not done again")
    add("--commit", default="", metavar="ID", help="of sources without their repository")
    plot = commands.add_parser("plot", help="plot and table of a file; trains nothing")
    plot.add_argument("file", type=Path, metavar="FILE")
    plot.add_argument("--output", type=Path, metavar="FOLDER", help="write a PNG here")
    plot.add_argument("--page", type=Path, metavar="PAGE", help="put the table between its marks")
    given = parser.parse_args(arguments)
    given.fail = parser.error
    return given


def max_error(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


@contextlib.contextmanager
def _options(given: argparse.Namespace) -> Iterator[Options]:
    """The options of a command line; a smoke run leaves nothing behind."""
    seeds, errors, steps = given.seeds, sorted(set(given.errors)), given.steps
    with contextlib.ExitStack() as stack:
        folder = given.runs
        if given.smoke:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            seeds, steps = seeds[:1], steps or 2
        yield Options(
            tuple(dict.fromkeys(seeds)),
            (None, *errors),
            steps,
            given.threads,
            folder,
            given.smoke,
            given.stop_after_s,
            given.output,
            given.commit,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print the verdicts, or plot; 3 if the time was not enough."""
    given = _parse(arguments)
    try:
        if given.command == "run":
            with _options(given) as options:
                found = run(options, lambda text: print(text, file=sys.stderr, flush=True))
            lines, is_complete = found
            print(table(lines), end="")
            print(verdicts(lines), end="")
            return 0 if is_complete else 3
        lines = record.read(given.file, FIELDS)
        if not lines:
            raise BenchError(f"{given.file} holds no finished run; the command `run` makes one")
        text = f"{table(lines)}\n{verdicts(lines)}"
        print(text, end="")
        if given.page is not None:
            put_into(given.page, "training", text)
        if given.output is not None:
            print(write_plot(lines, given.output), file=sys.stderr)
    except BenchError as error:
        given.fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
