"""``xopd demo``: a small speech LLM, its text teacher, a spoken world, and X-OPD between them."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from statistics import fmean, stdev

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xopd.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    TrainConfig,
)
from xopd.data.corpus import load_corpus
from xopd.data.synth import SplitName, synthesize
from xopd.files import write_atomically
from xopd.models.demo import build_tokenizer
from xopd.recipes import base_pair
from xopd.report import write_report
from xopd.run import evaluate_folder, save_speech_lm
from xopd.train import train

_log = logging.getLogger(__name__)

SIZES: dict[SplitName, int] = {"train": 1600, "test": 400, "test_heldout_voice": 200}
SCRATCH_SIZES: dict[SplitName, int] = {"align": 4000, **SIZES}
DATA_SEED = 0
MODEL_SEED = 0
THREADS = 2
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Where a demo keeps its parts; runs of other seeds share data and models."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def models(self) -> Path:
        return self.root / "models"

    def run(self, seed: int) -> Path:
        return self.root / f"seed_{seed}"


def demo_config(paths: DemoPaths, models: Path, seed: int) -> Config:
    """The demo's training run; every number that differs from the defaults is here."""
    return Config(
        model=ModelConfig(student=str(models / "student"), teacher=str(models / "teacher")),
        data=DataConfig(path=str(paths.data), eval_limit=SIZES["test"]),
        rollout=RolloutConfig(prompts_per_step=32, rollouts_per_prompt=4),
        loss=LossConfig(text_weight=0.5, advantage_clamp=2.0, center_advantage=True),
        optim=OptimConfig(learning_rate=2e-4),
        train=TrainConfig(
            steps=80,
            seed=seed,
            checkpoint_every=20,
            threads=THREADS,
            out_dir=str(paths.run(seed)),
        ),
    )


def run_demo(root: Path, *, seeds: Sequence[int], from_scratch: bool, workers: int) -> list[Path]:
    """Synthesize what is missing, then train, evaluate and report for each seed.

    Everything is cached below ``root``: the same command resumes or, when done, only reports.
    ``from_scratch`` also trains the two models, which are otherwise the bundled ones. Prints the
    table and writes it to ``summary.json``; returns the run folders.
    """
    start_s = time.monotonic()
    paths = DemoPaths(root / "from_scratch" if from_scratch else root)
    sizes = SCRATCH_SIZES if from_scratch else SIZES
    synthesize(paths.data, sizes=sizes, seed=DATA_SEED, workers=workers, progress=True)
    if from_scratch and not (paths.models / "provenance.json").exists():
        make_models(paths)
    runs: list[Path] = []
    with as_file(files("xopd") / "assets" / "demo") as bundled:
        for seed in seeds:
            models = paths.models if from_scratch else bundled
            runs.append(train(demo_config(paths, models, seed)))
            _log.info("report: %s", write_report(runs[-1]))
    rows = summarize(runs)
    summary = {"seeds": list(seeds), "rows": [asdict(row) for row in rows]}
    write_atomically(paths.root / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    print_table(rows, runs=len(runs))
    _log.info("total: %.0f s", time.monotonic() - start_s)
    return runs


def make_models(paths: DemoPaths) -> None:
    """Train teacher and base student from nothing; save them with what made them and how good.

    One thread, so that the weights do not depend on the number of cores.
    """
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    stages = {"teacher": base_pair.TEACHER, "align": base_pair.ALIGN, "base": base_pair.BASE}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        tasks = {name: bar.add_task(name, total=stage.steps) for name, stage in stages.items()}

        def log(stage: str, step: int, loss: float) -> None:
            bar.update(tasks[stage], completed=step + 1, description=f"{stage} loss {loss:.3f}")

        teacher, student = base_pair.make_base_pair(
            tokenizer, load_corpus(paths.data, "align"), seed=MODEL_SEED, log=log
        )
    teacher.model.save_pretrained(paths.models / "teacher")
    tokenizer.save_pretrained(paths.models / "teacher")
    save_speech_lm(student, paths.models / "student")
    provenance = {
        "command": "xopd demo --from-scratch",
        "seed": MODEL_SEED,
        "data_seed": DATA_SEED,
        "align_clips": SCRATCH_SIZES["align"],
        "stages": {name: asdict(stage) for name, stage in stages.items()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sha256": {
            name: hashlib.sha256((paths.models / name / WEIGHTS).read_bytes()).hexdigest()
            for name in ("teacher", "student")
        },
        "evaluation": evaluate_folder(demo_config(paths, paths.models, seed=0)),
    }
    # Written last: its presence says that both models are whole.
    text = json.dumps(provenance, indent=1) + "\n"
    write_atomically(paths.models / "provenance.json", text.encode())


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of the demo, in percent, over its seeds."""

    name: str
    before: float  # of the base student; the same for every seed
    after: float  # mean over seeds
    spread: float  # sample standard deviation over seeds; 0 for one seed


def summarize(runs: Sequence[Path]) -> list[Row]:
    """The headline figures of runs that differ in their seed only."""
    tables = [_figures(run) for run in runs]
    return [
        Row(
            name,
            before=before,
            after=fmean(table[name][1] for table in tables),
            spread=stdev(table[name][1] for table in tables) if len(tables) > 1 else 0.0,
        )
        for name, (before, _) in tables[0].items()
    ]


def print_table(rows: Sequence[Row], *, runs: int) -> None:
    """The table for a terminal."""
    table = Table(title=f"X-OPD, percent correct, greedy decoding, {runs} seed(s)")
    for heading in ("", "base student", "after X-OPD", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        after = f"{row.after:.1f} ± {row.spread:.1f}" if runs > 1 else f"{row.after:.1f}"
        table.add_row(row.name, f"{row.before:.1f}", after, f"{row.after - row.before:+.1f}")
    Console().print(table)


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table as the README shows it."""
    lines = ["| percent | base student | after X-OPD | change |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row.name} | {row.before:.1f} | {row.after:.1f} ± {row.spread:.1f} "
        f"| {row.after - row.before:+.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _figures(run: Path) -> dict[str, tuple[float, float]]:
    """Name -> (before, after) of one run."""
    before, after = (
        json.loads((run / "eval" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("before", "after")
    )
    found = {
        name: (before[key]["accuracy"], after[key]["accuracy"])
        for name, key in (
            ("speech (S)", "speech"),
            ("text (T)", "text"),
            ("speech, held-out voices", "held_out_voice"),
        )
    }
    for name, key in (("avg. drop S", "average_drop_speech"), ("avg. drop T", "average_drop_text")):
        found[name] = (before[key], after[key])
    for name, value in before["probes"].items():
        found[f"probe: {name}"] = (value, after["probes"][name])
    return found
