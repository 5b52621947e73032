"""One training step: rollouts, the teacher's scores, and an update for each minibatch.

Every rank decides the same from what all of them know: the requests, the sampled tokens, who
trains on which row. What differs from rank to rank is only the rows that a rank holds; loss,
gradients and metrics are sums over ranks, normalised by counts of the whole step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from xopd.advantage import Baseline, centred
from xopd.errors import UserError
from xopd.judged import Share, judged
from xopd.loss import TokenStats, policy_loss, step_sizes
from xopd.models import SpeechLM
from xopd.packing import assigned
from xopd.prompts import numbers_of_step
from xopd.rollout import Pending, Request, Sampled, requests_of_step
from xopd.run import Run
from xopd.sharding import whole
from xopd.token_metrics import token_metrics
from xopd.types import Modality, Prompt, Rollout


class Update(NamedTuple):
    """One optimizer step, or one that was skipped."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the step was made; every rank sees the same two numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind."""

    record: dict[str, float | int]  # its metrics, the same on every rank
    stats: list[TokenStats]  # of the rows of this rank
    updates: list[Update]  # one a minibatch
    ahead: list[Sampled]  # what was sampled for the next step meanwhile; empty: nothing


class Stages:
    """Where the time of a step goes: seconds of each stage, `rollout_s` and so on."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("sync_s", "rollout_s", "teacher_s", "update_s"), 0.0)
        self._last_s = time.perf_counter()

    def ended(self, stage: str) -> None:
        """What has passed since the last end of a stage belongs to this one."""
        now_s = time.perf_counter()
        self.seconds[stage] += now_s - self._last_s
        self._last_s = now_s


def run_step(
    run: Run,
    optimizer: torch.optim.Optimizer,
    baseline: Baseline,
    *,
    step: int,
    rate: float,
    check: Callable[[], None],
    ahead: Sequence[Sampled] = (),
) -> StepResult:
    """The step of that number (0-based) with that learning rate; changes the student.

    check: called by all ranks after each stage that changes nothing; it may raise to stop there.
    ahead: the step's own rollouts, where the step before has sampled them.
    """
    stages = Stages()
    mismatch, sampled, pending = _rollouts(run, step, ahead, stages)
    check()
    shares = [share_of(run, part) for part in minibatches(sampled, run.config.loss.minibatches)]
    shares, dropped = judged(run, shares)
    check()
    stages.ended("teacher_s")
    for group in optimizer.param_groups:
        group["lr"] = rate
    stats: list[TokenStats] = []
    updates: list[Update] = []
    for share in shares:
        if not any(size.rollouts for size in share.sizes.values()):
            continue  # all of it was dropped: moments and weights would decay towards nothing
        found, update = _update(run, optimizer, share, baseline)
        stats += found
        updates.append(update)
    stages.ended("update_s")
    used = run.usage.of_update(sampled, stages.seconds["update_s"])
    following = [] if pending is None else pending()
    stages.ended("rollout_s")
    record = {"step": step} | token_metrics(run.world, stats, run.config.loss.importance_cap)
    record |= stages.seconds
    record |= {
        "tokens_per_s": record["tokens"] / sum(stages.seconds.values()),
        "loss": sum(update.loss for update in updates) / len(updates),
        "grad_norm": updates[-1].grad_norm,
        "learning_rate": rate,
        "skipped_updates": sum(not update.is_finite for update in updates),
        "dropped_rollouts": dropped,
        "staleness": step - min(row.version for row in sampled),
        "sync_mismatch": mismatch,
    }
    record |= used | run.usage.planned([share.passes for share in shares])
    return StepResult(record, stats, updates, following)


def _rollouts(
    run: Run, step: int, ahead: Sequence[Sampled], stages: Stages
) -> tuple[float, Sequence[Sampled], Pending | None]:
    """The weight sync's mismatch, the step's rollouts, and those of the next one, under way."""
    settings = run.config.rollout
    is_ahead = settings.max_staleness > 0 and step + 1 < run.config.train.steps
    mismatch, sampled, pending = 0.0, ahead, None
    with run.autocast():
        if is_ahead or not ahead:
            mismatch = run.engine.update(step)
            stages.ended("sync_s")
        if not ahead:
            sampled = run.engine.sample(requests(run, step))
        if is_ahead:
            pending = run.engine.begin(requests(run, step + 1))
    stages.ended("rollout_s")
    _check_versions(sampled, step, settings.max_staleness)
    return mismatch, sampled, pending


def _check_versions(rows: Sequence[Sampled], step: int, limit: int) -> None:
    """The weights that sampled are those of this step, or at most so many steps older."""
    versions = {row.version for row in rows}
    if not versions <= set(range(max(0, step - limit), step + 1)):
        raise UserError(
            f"step {step} got rollouts of weights {sorted(versions)}, and rollout.max_staleness is "
            f"{limit}: resume the run from its last checkpoint"
        )


def requests(run: Run, step: int) -> list[Request]:
    """What is asked of the engine in a step; a pure function of the config and the step."""
    settings, seed = run.config.rollout, run.config.train.seed
    numbers = numbers_of_step(
        len(run.prompts), step=step, count=settings.prompts_per_step, seed=seed
    )
    return requests_of_step(
        numbers,
        run.modalities(),
        rollouts_per_prompt=settings.rollouts_per_prompt,
        seed=seed,
        step=step,
    )


def minibatches(rows: Sequence[Sampled], count: int) -> list[list[Sampled]]:
    """Deal each modality's rollouts out in turn, so that every minibatch holds both."""
    parts: list[list[Sampled]] = [[] for _ in range(count)]
    for modality in Modality:
        for i, row in enumerate(r for r in rows if r.modality is modality):
            parts[i % count].append(row)
    return parts


def share_of(run: Run, rows: Sequence[Sampled]) -> Share:
    """The rows of a minibatch that this rank trains on, with their prompts and audio."""
    passes = assigned(
        [row.prompt_tokens + len(row.response_ids) for row in rows],
        ranks=run.world.size,
        micro_batch=run.config.train.micro_batch,
        is_balanced=run.config.sharding.balance_tokens,
    )[run.world.rank]
    numbers = list(dict.fromkeys(rows[i].request.number for part in passes for i in part))
    prompts = dict(zip(numbers, run.prompts.load(numbers), strict=True))
    filling = [filling_row(run.student)]
    return Share(
        [
            [_rollout(rows[i], prompts[rows[i].request.number]) for i in part] or filling
            for part in passes
        ],
        step_sizes(rows),
    )


def _rollout(row: Sampled, prompt: Prompt) -> Rollout:
    logprob = None if row.logprob is None else torch.tensor(row.logprob)
    return Rollout(prompt, row.modality, row.response_ids, row.is_finished, engine_logprob=logprob)


def filling_row(student: SpeechLM) -> Rollout:
    """A row of no weight: a rank that has none left still makes the pass that others wait for."""
    ids = (student.eos_id,)
    prompt = Prompt("", "", ids, ids, torch.zeros(0, 0), "", "")
    return Rollout(prompt, Modality.TEXT, ids, is_finished=True, weight=0.0)


def _update(
    run: Run, optimizer: torch.optim.Optimizer, share: Share, baseline: Baseline
) -> tuple[list[TokenStats], Update]:
    """Gradients of a minibatch and one optimizer step, which all ranks skip if it is not finite."""
    config, world = run.config, run.world
    stats: list[TokenStats] = []
    total = 0.0
    run.student.model.train()
    for rows in share.passes:
        with run.autocast():
            loss, found = policy_loss(
                run.student,
                [centred(row, baseline) for row in rows],
                share.sizes,
                config.loss,
                temperature=config.rollout.temperature,
                backend=run.backend,
            )
        # FSDP2 divides the summed gradient by the number of ranks; the loss is a sum over them.
        (loss * world.size).backward()
        total += float(loss.detach())
        # Statistics keep the teacher's own log-probs: KL and the next baseline need them.
        stats += [replace(s, rollout=r) for s, r in zip(found, rows, strict=True) if r.weight]
    norm = torch.nn.utils.clip_grad_norm_(
        list(run.student.trainable().values()), config.optim.max_grad_norm
    )
    update = Update(world.total([total])[0], float(whole(norm)))
    if update.is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # now: rollouts and scoring need the memory
    return stats, update
