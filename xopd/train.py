"""The one loop over steps: rollouts, teacher, loss, update; resumable to the bit on the CPU.

Each step's prompts, sampling seeds and learning rate are pure functions of (config, step); what is
left to remember is the trained weights, Adam's moments and the running baseline, and that is what
a checkpoint holds.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from xopd.advantage import Baseline
from xopd.checkpoint import Checkpoints, load_checkpoint
from xopd.config import Config, dump_config
from xopd.errors import Terminated, UserError
from xopd.files import write_atomically
from xopd.optimizer import (
    build_optimizer,
    learning_rate,
    moments,
    set_updates_made,
    updates_made,
)
from xopd.ranks import World, joined
from xopd.rollout import Sampled
from xopd.run import AFTER, Run, check_folder, exclusive, prepare, record_samples
from xopd.step import StepResult, Update, run_step
from xopd.types import Modality

_log = logging.getLogger(__name__)


class TrainError(UserError):
    """Training that stopped itself, and why."""


@dataclass(slots=True)
class LoopState:
    """What changes from step to step; the loop is its only writer."""

    optimizer: torch.optim.AdamW
    step: int = 0  # steps done
    baseline: Baseline = field(default_factory=Baseline)
    skipped_in_a_row: int = 0  # updates left out since the last one that was made
    ahead: list[Sampled] = field(default_factory=list)  # of the coming step, if sampled already


def train(config: Config) -> Path:
    """Run the configured training, or continue it where its last checkpoint stopped.

    Under `torchrun` the ranks share the work and the models' weights. Returns the run folder:
    config.yaml, metrics.jsonl, eval/*.json, samples.jsonl, checkpoints/, student/ (the trained
    model as safetensors). Raises RunError for a folder that is in use or of another config,
    GuardError before the first step when the models do not fit the method, TrainError when too
    many updates in a row are not finite, and Terminated after SIGTERM, with a checkpoint saved.
    """
    directory = Path(config.train.out_dir)
    check_folder(directory, config)  # before anything is written there
    with (
        joined(config.train.rank_timeout_s) as world,
        sigterm_noted() as is_told_to_end,
        exclusive(directory, world),
    ):
        # Asked together: a rank must not look while the first one writes.
        if world.first((directory / AFTER).exists()):
            _log.info("%s is complete; nothing to train", directory)
        else:
            _train(config, directory, world, is_told_to_end)
        world.barrier()
    return directory


def _train(
    config: Config, directory: Path, world: World, is_told_to_end: Callable[[], bool]
) -> None:
    run = prepare(config, world)
    # Only now: a config that cannot run must not claim the folder.
    if world.is_first:
        write_atomically(directory / "config.yaml", dump_config(config).encode())
    checkpoints = Checkpoints(directory / "checkpoints", world, keep=config.train.keep_checkpoints)
    try:
        state = _resume(run, checkpoints)
        if state.step == 0:
            run.evaluate("before", step=0)

        def check() -> None:
            if world.any(is_told_to_end()):
                raise Terminated(f"stopped by SIGTERM after step {state.step}")

        with run.shown(state.step) as show:
            while state.step < config.train.steps:
                try:
                    check()
                    result = _step(run, state, check)
                except Terminated:
                    _save(run, state, checkpoints)
                    checkpoints.finish()
                    raise
                show(result.record)
                if (state.step - 1) in run.sample_steps():
                    record_samples(run, state.step - 1, result.stats)
                _count_skipped(run, state, result.updates)
                _save_and_evaluate(run, state, checkpoints)
        checkpoints.finish()
    finally:
        run.engine.close()
        checkpoints.close()
    run.save_student()
    run.evaluate("after", step=state.step)  # written last: it says that the run is complete


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM is only noted; gives a function that says whether one came."""
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        came.set()

    if threading.current_thread() is not threading.main_thread():
        yield came.is_set  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _save_and_evaluate(run: Run, state: LoopState, checkpoints: Checkpoints) -> None:
    settings = run.config.train
    last = state.step == settings.steps
    # Evaluated before the save: a run killed in between repeats the step and evaluates then.
    if settings.eval_every and state.step % settings.eval_every == 0 and not last:
        run.evaluate(f"step_{state.step:06d}", step=state.step)
    checkpoints.poll()
    if last or (settings.checkpoint_every and state.step % settings.checkpoint_every == 0):
        _save(run, state, checkpoints)


def _step(run: Run, state: LoopState, check: Callable[[], None]) -> StepResult:
    """One rollout batch and its updates; advances ``state``."""
    config = run.config
    rate = learning_rate(state.step, config.train.steps, config.optim)
    baseline = state.baseline if config.loss.center_advantage else Baseline()
    result = run_step(
        run,
        state.optimizer,
        baseline,
        step=state.step,
        rate=rate,
        check=check,
        ahead=state.ahead,
    )
    state.step += 1
    state.ahead = result.ahead
    for modality in Modality:
        mean = result.record.get(f"kl_{modality.value}", math.nan)
        if math.isfinite(mean):
            state.baseline = state.baseline.updated(modality, -mean)
    return result


def _count_skipped(run: Run, state: LoopState, updates: list[Update]) -> None:
    """Count updates that were left out; raise TrainError when there are too many in a row."""
    limit = run.config.train.max_skipped_updates
    for update in updates:
        state.skipped_in_a_row = 0 if update.is_finite else state.skipped_in_a_row + 1
        if state.skipped_in_a_row > limit:
            raise TrainError(
                f"loss {update.loss} or gradient norm {update.grad_norm} is not finite in "
                f"{state.skipped_in_a_row} updates in a row (train.max_skipped_updates is {limit})"
                ": stopped, the student is as before them. Checkpoints are intact. Lower "
                "optim.learning_rate or check the models."
            )
        if not update.is_finite and run.world.is_first:
            _log.warning(
                "step %d: loss %s, gradient norm %s: update skipped",
                *(state.step - 1, update.loss, update.grad_norm),
            )


def _tensors(run: Run, state: LoopState) -> dict[str, Tensor]:
    """What a checkpoint holds: trained weights and moments, by name."""
    trained = run.student.trainable()
    weights = {f"student.{name}": parameter.detach() for name, parameter in trained.items()}
    return weights | moments(state.optimizer, trained)


def _save(run: Run, state: LoopState, checkpoints: Checkpoints) -> None:
    checkpoints.save(
        state.step,
        _tensors(run, state),
        {
            "step": state.step,
            "updates": updates_made(state.optimizer, run.student.trainable()),
            "skipped_in_a_row": state.skipped_in_a_row,
            "baseline": asdict(state.baseline),
            "ahead": [sampled.to_dict() for sampled in state.ahead],
        },
    )


def _resume(run: Run, checkpoints: Checkpoints) -> LoopState:
    """The state of the newest valid checkpoint, or a fresh one."""
    state = LoopState(build_optimizer(run.student.trainable().values(), run.config.optim))
    found = checkpoints.latest()
    if found is None:
        return state
    saved = load_checkpoint(found, _tensors(run, state), run.world)
    set_updates_made(state.optimizer, run.student.trainable(), saved["updates"])
    state.step = saved["step"]
    state.skipped_in_a_row = saved["skipped_in_a_row"]
    state.baseline = Baseline(**saved["baseline"])
    state.ahead = [Sampled.from_dict(values) for values in saved["ahead"]]
    if run.world.is_first:
        _log.info("resuming %s after step %d", run.directory, state.step)
    return state
