"""One training step: rollouts, the teacher's scores, and an update for each minibatch.

Every rank decides the same from what all of them know: the requests, the sampled tokens, who
trains on which row. What differs from rank to rank is only the rows that a rank holds; loss,
gradients and metrics are sums over ranks, normalised by counts of the whole step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from xopd.advantage import Baseline, centred
from xopd.config import OldLogprob
from xopd.errors import UserError
from xopd.loss import StepSize, TokenStats, policy_loss, step_sizes
from xopd.models import SpeechLM, TextLM
from xopd.packing import assigned
from xopd.prompts import numbers_of_step
from xopd.rollout import Sampled, requests_of_step
from xopd.run import Run
from xopd.scoring import score
from xopd.sharding import whole
from xopd.types import Modality, Prompt, Rollout

Passes = list[list[Rollout]]  # the rows of each forward pass of this rank


class Share(NamedTuple):
    """What this rank does of a minibatch."""

    passes: Passes
    sizes: dict[Modality, StepSize]  # of the minibatch on all ranks


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


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a step went, in seconds."""

    rollout_s: float
    teacher_s: float
    update_s: float


def run_step(
    run: Run,
    optimizer: torch.optim.Optimizer,
    baseline: Baseline,
    *,
    step: int,
    rate: float,
    check: Callable[[], None],
) -> StepResult:
    """The step of that number (0-based) with that learning rate; changes the student.

    check: called by all ranks after each stage that changes nothing; it may raise to stop there.
    """
    start_s = time.perf_counter()
    sampled = sample(run, step)
    check()
    sampled_s = time.perf_counter()
    shares = [share_of(run, part) for part in minibatches(sampled, run.config.loss.minibatches)]
    shares = [scored(run, share) for share in shares]
    check()
    scored_s = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = rate
    stats: list[TokenStats] = []
    updates: list[Update] = []
    for share in shares:
        found, update = _update(run, optimizer, share, baseline)
        stats += found
        updates.append(update)
    end_s = time.perf_counter()
    timing = Timing(sampled_s - start_s, scored_s - sampled_s, end_s - scored_s)
    record = {"step": step} | token_metrics(run, stats) | asdict(timing)
    record |= {
        "tokens_per_s": record["tokens"] / (end_s - start_s),
        "loss": sum(update.loss for update in updates) / len(updates),
        "grad_norm": updates[-1].grad_norm,
        "learning_rate": rate,
        "skipped_updates": sum(not update.is_finite for update in updates),
    }
    return StepResult(record, stats, updates)


def sample(run: Run, step: int) -> list[Sampled]:
    """The step's trajectories, of all ranks, on every rank."""
    settings, seed = run.config.rollout, run.config.train.seed
    numbers = numbers_of_step(
        len(run.prompts), step=step, count=settings.prompts_per_step, seed=seed
    )
    requests = requests_of_step(
        numbers,
        run.modalities(),
        rollouts_per_prompt=settings.rollouts_per_prompt,
        seed=seed,
        step=step,
    )
    with run.autocast():
        return run.engine.sample(requests)


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


def scored(run: Run, share: Share) -> Share:
    """Rollouts with the teacher's log-probs on the text prompt, and old ones where needed."""
    found = _scores(run, run.teacher, share.passes)
    passes = [
        [replace(row, teacher_logprob=value) for row, value in zip(rows, part, strict=True)]
        for rows, part in zip(share.passes, found, strict=True)
    ]
    return share._replace(passes=_with_old(run, passes))


def _with_old(run: Run, passes: Passes) -> Passes:
    """Rollouts with the log-probs that the ratio starts from, and importance weights.

    None at all where the trainer itself sampled and makes one update: pi_old is then the current
    policy, and the ratio is 1. Which case it is, is the same on every rank.
    """
    config = run.config.loss
    has_engine = any(r.engine_logprob is not None for rows in passes for r in rows)
    has_engine = run.world.any(has_engine)  # a rank may hold nothing but filling rows
    wanted = config.old_logprob
    if wanted is OldLogprob.AUTO:
        is_engine = has_engine and not run.student.is_mixture_of_experts
        wanted = OldLogprob.ENGINE if is_engine else OldLogprob.RECOMPUTED
    if wanted is OldLogprob.ENGINE:
        if not has_engine:
            raise UserError(
                "loss.old_logprob is engine, but this rollout engine gives no log-probs: set it "
                "to auto or recomputed"
            )
        return [[replace(r, old_logprob=_by_engine(r)) for r in rows] for rows in passes]
    if config.minibatches == 1 and not has_engine:
        return passes
    with run.autocast():
        found = _scores(run, run.student, passes)
    passes = [
        [replace(row, old_logprob=value) for row, value in zip(rows, part, strict=True)]
        for rows, part in zip(passes, found, strict=True)
    ]
    if not has_engine:
        return passes
    cap = config.importance_cap
    return [[replace(r, importance=importance(r, cap)) for r in rows] for rows in passes]


def _by_engine(row: Rollout) -> Tensor:
    """What the engine said; a filling row weighs nothing, so any number does."""
    if row.engine_logprob is not None:
        return row.engine_logprob
    if row.weight:
        raise ValueError("the engine gave log-probs for some trajectories and not for others")
    return torch.zeros(len(row.response_ids))


def importance(row: Rollout, cap: float) -> Tensor | None:  # [n] fp32
    """min(pi_old / pi_engine, cap) of each token: truncated importance sampling (TIS)."""
    if row.weight == 0.0:
        return None
    if row.old_logprob is None or row.engine_logprob is None:
        raise ValueError("the engine gave log-probs for some trajectories and not for others")
    return (row.old_logprob.cpu() - row.engine_logprob).exp().clamp(max=cap)


def _scores(run: Run, lm: TextLM | SpeechLM, passes: Passes) -> list[list[Tensor]]:
    temperature = run.config.rollout.temperature
    return score(lm, passes, temperature=temperature, backend=run.backend)


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


def token_metrics(run: Run, stats: Sequence[TokenStats]) -> dict[str, float | int]:
    """The metrics of a step's tokens, over all ranks.

    kl_*: mean over tokens of logprob - teacher_logprob, the sampled estimate of KL(student ||
    teacher) in nats. entropy_*: mean of -logprob, the sampled estimate of the policy's entropy.
    mismatch_*, where the engine gave log-probs: mean of engine_logprob - old_logprob, the sampled
    estimate of KL(engine || trainer), for recomputed old log-probs; else the first update's own.
    truncated_*: share of tokens whose importance weight was cut at the cap.
    """
    names, cap = list(Modality), run.config.loss.importance_cap
    sums = run.world.total([value for modality in names for value in _sums(stats, modality, cap)])
    record: dict[str, float | int] = {}
    all_tokens = 0
    for i, modality in enumerate(names):
        tokens, rows, kl, logprob, clipped, finished, said, mismatch, cut = sums[9 * i : 9 * i + 9]
        all_tokens += int(tokens)
        if rows:
            name = modality.value
            record[f"kl_{name}"] = kl / tokens
            record[f"entropy_{name}"] = -logprob / tokens
            record[f"clip_fraction_{name}"] = clipped / tokens
            record[f"length_{name}"] = tokens / rows
            record[f"finished_{name}"] = finished / rows
        if said:
            record[f"mismatch_{name}"] = mismatch / said
            record[f"truncated_{name}"] = cut / said
    return record | {"tokens": all_tokens}


def _sums(stats: Sequence[TokenStats], modality: Modality, cap: float) -> list[float]:
    """Tokens, rows, sums over tokens of KL, logprob and clipped, rows that ended; of what the
    engine gave log-probs for: tokens, sum of the mismatch, tokens at the cap."""
    picked = [s for s in stats if s.rollout.modality is modality]
    if not picked:
        return [0.0] * 9
    logprob = torch.cat([s.logprob for s in picked]).double()
    teacher = torch.cat([_teacher(s) for s in picked]).double()
    clipped = torch.cat([s.is_clipped for s in picked]).double()
    sums = [(logprob - teacher).sum(), logprob.sum(), clipped.sum()]
    finished = sum(s.rollout.is_finished for s in picked)
    by_engine = [(s, s.rollout.engine_logprob) for s in picked]
    apart = [told.double() - _own(s) for s, told in by_engine if told is not None]
    mismatch = float(sum(float(difference.sum()) for difference in apart))
    weights = [s.rollout.importance for s in picked if s.rollout.importance is not None]
    cut = float(sum(int((weight >= cap).sum()) for weight in weights))
    said = float(sum(map(len, apart)))
    head = [float(len(logprob)), float(len(picked)), *(float(x) for x in sums), float(finished)]
    return [*head, said, mismatch, cut]


def _own(stats: TokenStats) -> Tensor:
    """The trainer's log-probs of the policy that sampled: recomputed ones, else the update's."""
    row = stats.rollout
    recomputed = row.old_logprob if row.importance is not None else None
    return (stats.logprob if recomputed is None else recomputed.cpu()).double()


def _teacher(stats: TokenStats) -> Tensor:
    if stats.rollout.teacher_logprob is None:
        raise ValueError("token statistics of a rollout that no teacher scored")
    return stats.rollout.teacher_logprob.cpu()
