"""``xopd demo``: a small speech LLM, its text teacher, a spoken world, and X-OPD between them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
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
from xopd.run import save_speech_lm
from xopd.train import train

SIZES: dict[SplitName, int] = {"train": 1600, "test": 400, "test_heldout_voice": 200}
SCRATCH_SIZES: dict[SplitName, int] = {"align": 4000, **SIZES}
DATA_SEED = 0
MODEL_SEED = 0
THREADS = 2


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
        rollout=RolloutConfig(prompts_per_step=16, rollouts_per_prompt=4),
        loss=LossConfig(text_weight=0.5, advantage_clamp=2.0, center_advantage=True),
        optim=OptimConfig(learning_rate=3e-4),
        train=TrainConfig(
            steps=120,
            seed=seed,
            checkpoint_every=40,
            threads=THREADS,
            out_dir=str(paths.run(seed)),
        ),
    )


def run_demo(root: Path, *, seed: int, from_scratch: bool, workers: int) -> Path:
    """Synthesize what is missing, train, evaluate, report; returns the run folder.

    Everything is cached below ``root``: the same command resumes or, when done, only reports.
    ``from_scratch`` also trains the two models, which are otherwise the bundled ones.
    """
    start_s = time.monotonic()
    paths = DemoPaths(root / "from_scratch" if from_scratch else root)
    sizes = SCRATCH_SIZES if from_scratch else SIZES
    synthesize(paths.data, sizes=sizes, seed=DATA_SEED, workers=workers, progress=True)
    if from_scratch:
        if not (paths.models / "provenance.json").exists():
            make_models(paths)
        directory = train(demo_config(paths, paths.models, seed))
    else:
        with as_file(files("xopd") / "assets" / "demo") as bundled:
            directory = train(demo_config(paths, bundled, seed))
    report = write_report(directory)
    print_table(directory)
    Console().print(f"report: {report}\ntotal: {time.monotonic() - start_s:.0f} s")
    return directory


def make_models(paths: DemoPaths) -> None:
    """Train teacher and base student from nothing and save them with what made them."""
    torch.set_num_threads(THREADS)
    tokenizer = build_tokenizer()
    stages = {"teacher": base_pair.TEACHER, "align": base_pair.ALIGN, "base": base_pair.BASE}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    last_loss: dict[str, float] = {}
    start_s = time.monotonic()
    with Progress(*columns, TimeRemainingColumn()) as bar:
        tasks = {name: bar.add_task(name, total=stage.steps) for name, stage in stages.items()}

        def log(stage: str, step: int, loss: float) -> None:
            last_loss[stage] = loss
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
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - start_s),
        "last_loss": {name: round(loss, 4) for name, loss in last_loss.items()},
        "steps": {name: stage.steps for name, stage in stages.items()},
    }
    # Written last: its presence says that both models are whole.
    text = json.dumps(provenance, indent=1) + "\n"
    write_atomically(paths.models / "provenance.json", text.encode())


def print_table(directory: Path) -> None:
    """The before/after table of a run."""
    before, after = (
        json.loads((directory / "eval" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("before", "after")
    )
    table = Table(title="X-OPD on the spoken-reasoning world: percent correct, greedy decoding")
    for heading in ("", "base student", "after X-OPD", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, old, new in table_rows(before, after):
        table.add_row(name, f"{old:.1f}", f"{new:.1f}", f"{new - old:+.1f}")
    Console().print(table)


def table_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, before, after) of every headline figure."""
    rows = [
        (name, before[key]["accuracy"], after[key]["accuracy"])
        for name, key in (("speech (S)", "speech"), ("text (T)", "text"))
    ]
    rows.append(
        (
            "speech, held-out voices",
            before["held_out_voice"]["accuracy"],
            after["held_out_voice"]["accuracy"],
        )
    )
    rows += [
        (f"avg. drop {short} (%)", before[f"average_drop_{name}"], after[f"average_drop_{name}"])
        for short, name in (("S", "speech"), ("T", "text"))
    ]
    rows += [
        (f"probe: {name}", value, after["probes"][name]) for name, value in before["probes"].items()
    ]
    teacher = before["teacher_text"]["accuracy"]  # frozen: the same after
    return [*rows, ("teacher (text)", teacher, teacher)]
