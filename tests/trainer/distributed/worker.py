"""What the ranks of a test run: a list of jobs from a JSON file, one after the other.

Started by torchrun, or alone as the single process that the ranks are compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TypedDict

import torch
from folder_backend import FolderBackend  # beside this script
from safetensors.torch import save_file
from torch import Tensor

from xopd import parts as parts_module
from xopd import run as run_module
from xopd.advantage import Baseline
from xopd.config import Config, load_config
from xopd.models import SpeechLM
from xopd.optimizer import build_optimizer, learning_rate
from xopd.ranks import is_first_process, joined
from xopd.rollout import GenerateEngine, Request, Sampled
from xopd.run import prepare
from xopd.sharding import whole
from xopd.step import run_step
from xopd.train import train


class Job(TypedDict):
    """One entry of the JSON file."""

    # "trace": every gradient of every step; "train": the whole of `xopd train`; "engine": the same
    # with a backend of transformers in place of vLLM.
    kind: str
    config: str  # YAML file
    out: str  # trace: folder for step_N.safetensors; train: JSON lines of what was sampled


class Recording(GenerateEngine):
    """An engine that remembers what it sampled."""

    sampled: ClassVar[list[Sampled]] = []  # of the process

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        found = super().sample(requests)
        Recording.sampled += found
        return found


def trace(config: Config, out: Path) -> None:
    """Gradients (as the optimizer sees them), parameters and loss of each step."""
    with joined(600) as world:
        run = prepare(config, world)
        trained = run.student.trainable()
        optimizer = build_optimizer(trained.values(), config.optim)
        gradients: dict[str, Tensor] = {}

        def keep(optimizer: torch.optim.Optimizer, args: object, options: object) -> None:
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    gradients[f"gradient.{name}"] = whole(parameter.grad).clone()

        optimizer.register_step_pre_hook(keep)
        for step in range(config.train.steps):
            rate = learning_rate(step, config.train.steps, config.optim)
            result = run_step(run, optimizer, Baseline(), step=step, rate=rate, check=lambda: None)
            tensors = {"loss": torch.tensor(result.record["loss"], dtype=torch.float64)}
            for name, parameter in trained.items():
                tensors[f"parameter.{name}"] = whole(parameter.detach()).clone()
            if world.is_first:
                save_file(tensors | gradients, out / f"step_{step}.safetensors")
        world.barrier()


def use_folder_backend(folder: Path) -> None:
    """Runs whose config asks for vLLM get its stand-in."""

    def make(student: SpeechLM, options: object, *, ranks: int) -> FolderBackend:
        return FolderBackend(student, folder)

    parts_module.LocalBackend = make  # type: ignore[assignment,misc]
    run_module.check_reachable = lambda config, world: None


def main(jobs: Sequence[Job]) -> None:
    torch.set_num_threads(1)
    parts_module.GenerateEngine = Recording  # type: ignore[misc]
    for job in jobs:
        config = load_config(Path(job["config"]), [])
        if job["kind"] == "trace":
            trace(config, Path(job["out"]))
            continue
        if job["kind"] == "engine":
            use_folder_backend(Path(f"{job['out']}_engine"))
        Recording.sampled = []
        train(config)
        if is_first_process():
            with Path(job["out"]).open("a") as file:
                for s in Recording.sampled:
                    row = [s.request.number, s.modality.value, s.request.seed, list(s.response_ids)]
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    with joined(600):  # one group for all jobs
        main(json.loads(Path(sys.argv[1]).read_text()))
