"""The one loop over steps: rollouts, teacher, loss, update; resumable to the bit on the CPU.

Each step's prompts, sampling seed and learning rate are pure functions of (config, step); what is
left to remember is the trained weights, Adam's moments and the running baseline, and that is what
a checkpoint holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from xopd.advantage import Baseline, centred
from xopd.checkpoint import (
    Packed,
    latest_checkpoint,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from xopd.config import Config, dump_config
from xopd.errors import UserError
from xopd.files import write_atomically
from xopd.loss import TokenStats, policy_loss, step_sizes
from xopd.models import SpeechLM, TextLM
from xopd.optimizer import build_optimizer, learning_rate
from xopd.prompts import prompts_of_step
from xopd.rollout import sample_rollouts
from xopd.run import (
    AFTER,
    Run,
    check_folder,
    exclusive,
    kernel_backend,
    prepare,
    record_samples,
)
from xopd.scoring import score
from xopd.types import Modality, Rollout

_log = logging.getLogger(__name__)


class TrainError(UserError):
    """Training that stopped itself, and why."""


@dataclass(slots=True)
class LoopState:
    """What changes from step to step; the loop is its only writer."""

    optimizer: torch.optim.AdamW
    step: int = 0  # steps done
    baseline: Baseline = field(default_factory=Baseline)


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a step went, in seconds."""

    rollout_s: float
    teacher_s: float
    update_s: float


def train(config: Config) -> Path:
    """Run the configured training, or continue it where its last checkpoint stopped.

    Returns the run folder: config.yaml, metrics.jsonl, eval/*.json, samples.jsonl, checkpoints/,
    student/ (the trained model as safetensors). Raises RunError for a folder that is in use or of
    another config, GuardError before the first step when the models do not fit the method, and
    TrainError when a step is not finite.
    """
    directory = Path(config.train.out_dir)
    check_folder(directory, config)  # before anything is written there
    with exclusive(directory):
        if (directory / AFTER).exists():
            _log.info("%s is complete; nothing to train", directory)
        else:
            _train(config, directory)
    return directory


def _train(config: Config, directory: Path) -> None:
    run = prepare(config)
    # Only now: a config that cannot run must not claim the folder.
    write_atomically(directory / "config.yaml", dump_config(config).encode())
    state = _resume(run)
    if state.step == 0:
        run.evaluate("before", step=0)
    with run.log(state.step) as log, run.progress(state.step) as progress:
        while state.step < config.train.steps:
            record, stats = _step(run, state)
            log.write(record)
            progress.update(state.step, record)
            if (state.step - 1) in run.sample_steps():
                record_samples(run, state.step - 1, stats)
            _save_and_evaluate(run, state)
    run.save_student()
    run.evaluate("after", step=state.step)  # written last: it says that the run is complete


def _save_and_evaluate(run: Run, state: LoopState) -> None:
    settings = run.config.train
    last = state.step == settings.steps
    # Evaluated before the save: a run killed in between repeats the step and evaluates then.
    if settings.eval_every and state.step % settings.eval_every == 0 and not last:
        run.evaluate(f"step_{state.step:06d}", step=state.step)
    if last or (settings.checkpoint_every and state.step % settings.checkpoint_every == 0):
        _save(run, state)


def _step(run: Run, state: LoopState) -> tuple[dict[str, float | int], list[TokenStats]]:
    """One rollout batch and its updates; advances ``state``."""
    config = run.config
    rate = learning_rate(state.step, config.train.steps, config.optim)
    # The step's own seed: a resumed run samples what the uninterrupted one would have.
    torch.manual_seed(config.train.seed * 1_000_003 + state.step)
    start_s = time.perf_counter()
    rows = _sample(run, state.step)
    sampled_s = time.perf_counter()
    rows = _with_teacher(run, rows)
    scored_s = time.perf_counter()
    baseline = state.baseline if config.loss.center_advantage else Baseline()
    stats, loss, norm = _update(run, state.optimizer, rows, baseline, rate)
    end_s = time.perf_counter()
    timing = Timing(sampled_s - start_s, scored_s - sampled_s, end_s - scored_s)
    record = step_record(state.step, stats, timing)
    record |= {"loss": loss, "grad_norm": norm, "learning_rate": rate}
    state.step += 1
    for modality in Modality:
        key = f"kl_{modality.value}"
        if key in record:
            state.baseline = state.baseline.updated(modality, -record[key])
    return record, stats


def _sample(run: Run, step: int) -> list[Rollout]:
    settings = run.config.rollout
    prompts = prompts_of_step(
        run.prompts, step=step, count=settings.prompts_per_step, seed=run.config.train.seed
    )
    rows: list[Rollout] = []
    for modality in run.modalities():
        with run.autocast():
            rows += sample_rollouts(
                run.student,
                prompts,
                modality,
                rollouts_per_prompt=settings.rollouts_per_prompt,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                batch_size=settings.batch_size,
            )
    return rows


def _with_teacher(run: Run, rows: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts with the teacher's log-probs on the text prompt, and old ones where needed."""

    def scored_by(lm: TextLM | SpeechLM) -> list[Tensor]:
        return score(
            lm,
            rows,
            temperature=run.config.rollout.temperature,
            micro_batch=run.config.train.micro_batch,
            backend=kernel_backend(run.config),
        )

    teacher = scored_by(run.teacher)
    scored = [replace(r, teacher_logprob=t) for r, t in zip(rows, teacher, strict=True)]
    if run.config.loss.minibatches == 1:
        return scored  # one update per rollout: pi_old is the current policy and the ratio is 1
    with run.autocast():
        old = scored_by(run.student)
    return [replace(r, old_logprob=o) for r, o in zip(scored, old, strict=True)]


def _update(
    run: Run,
    optimizer: torch.optim.AdamW,
    rows: Sequence[Rollout],
    baseline: Baseline,
    rate: float,
) -> tuple[list[TokenStats], float, float]:
    """One optimizer step per minibatch; statistics, mean loss and last gradient norm."""
    config = run.config
    parameters = list(run.student.trainable().values())
    for group in optimizer.param_groups:
        group["lr"] = rate
    stats: list[TokenStats] = []
    losses: list[float] = []
    norm = 0.0
    run.student.model.train()
    for minibatch in minibatches(rows, config.loss.minibatches):
        optimizer.zero_grad(set_to_none=True)
        sizes = step_sizes(minibatch)
        total = 0.0
        ordered = sorted(minibatch, key=lambda r: len(r.prompt.ids(r.modality) + r.response_ids))
        for start in range(0, len(ordered), config.train.micro_batch):
            part = ordered[start : start + config.train.micro_batch]
            with run.autocast():
                loss, found = policy_loss(
                    run.student,
                    [centred(r, baseline) for r in part],
                    sizes,
                    config.loss,
                    temperature=config.rollout.temperature,
                    backend=kernel_backend(config),
                )
            loss.backward()
            total += float(loss.detach())
            # Statistics keep the teacher's own log-probs: KL and the next baseline need them.
            stats += [replace(s, rollout=r) for s, r in zip(found, part, strict=True)]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm))
        if not (torch.isfinite(torch.tensor([norm, total])).all()):
            raise TrainError(
                f"loss {total} or gradient norm {norm} is not finite: stopped before the update. "
                "Checkpoints are intact. Lower optim.learning_rate or check the models."
            )
        optimizer.step()
        losses.append(total)
    return stats, sum(losses) / len(losses), norm


def minibatches(rows: Sequence[Rollout], count: int) -> list[list[Rollout]]:
    """Deal each modality's rollouts out in turn, so that every minibatch holds both."""
    parts: list[list[Rollout]] = [[] for _ in range(count)]
    for modality in Modality:
        for i, row in enumerate(r for r in rows if r.modality is modality):
            parts[i % count].append(row)
    return parts


def step_record(step: int, stats: Sequence[TokenStats], timing: Timing) -> dict[str, float | int]:
    """The metrics of one step.

    kl_*: mean over tokens of logprob - teacher_logprob, the sampled estimate of KL(student ||
    teacher) in nats. entropy_*: mean of -logprob, the sampled estimate of the policy's entropy.
    """
    record: dict[str, float | int] = {"step": step}
    for modality in Modality:
        picked = [s for s in stats if s.rollout.modality is modality]
        if not picked:
            continue
        name = modality.value
        logprob = torch.cat([s.logprob for s in picked]).double()
        teacher = torch.cat([_teacher(s) for s in picked]).double()
        clipped = torch.cat([s.is_clipped for s in picked]).double()
        record[f"kl_{name}"] = float((logprob - teacher).mean())
        record[f"entropy_{name}"] = float(-logprob.mean())
        record[f"clip_fraction_{name}"] = float(clipped.mean())
        record[f"length_{name}"] = len(logprob) / len(picked)
        record[f"finished_{name}"] = sum(s.rollout.is_finished for s in picked) / len(picked)
    tokens = sum(len(s.rollout.response_ids) for s in stats)
    seconds = timing.rollout_s + timing.teacher_s + timing.update_s
    return record | {"tokens": tokens, "tokens_per_s": tokens / seconds} | asdict(timing)


def _teacher(stats: TokenStats) -> Tensor:
    if stats.rollout.teacher_logprob is None:
        raise ValueError("token statistics of a rollout that no teacher scored")
    return stats.rollout.teacher_logprob.cpu()


def _save(run: Run, state: LoopState) -> None:
    packed = pack_optimizer(state.optimizer.state_dict())
    save_checkpoint(
        run.directory / "checkpoints",
        state.step,
        {"student": run.student.trainable(), "optimizer": packed.tensors},
        {
            "optimizer": packed.state,
            "step": state.step,
            "baseline": asdict(state.baseline),
        },
        keep=run.config.train.keep_checkpoints,
    )


def _resume(run: Run) -> LoopState:
    """The state of the newest valid checkpoint, or a fresh one."""
    trainable = run.student.trainable()
    state = LoopState(build_optimizer(trainable.values(), run.config.optim))
    path = latest_checkpoint(run.directory / "checkpoints")
    if path is None:
        return state
    tensors, saved = load_checkpoint(path)
    if set(tensors["student"]) != set(trainable):
        raise TrainError(f"{path} holds other parameters than the student; use another out_dir.")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors["student"][name])
    packed = Packed(tensors["optimizer"], saved["optimizer"])
    state.optimizer.load_state_dict(unpack_optimizer(packed))
    state.step = saved["step"]
    state.baseline = Baseline(**saved["baseline"])
    _log.info("resuming %s after step %d", run.directory, state.step)
    return state
