"""Between rollouts and update: the teacher's log-probs, old ones, and importance weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xopd.config import OldLogprob
from xopd.errors import UserError
from xopd.loss import StepSize
from xopd.run import Run
from xopd.scoring import score
from xopd.teacher import Score
from xopd.types import Modality, Rollout

Passes = list[list[Rollout]]  # the rows of each forward pass of this rank


class Share(NamedTuple):
    """What this rank does of a minibatch."""

    passes: Passes
    sizes: dict[Modality, StepSize]  # of the minibatch on all ranks


def judged(run: Run, shares: Sequence[Share]) -> tuple[list[Share], int]:
    """A step's minibatches with the teacher's log-probs on the text prompt, and old ones.

    Also how many rollouts of all ranks were left out because the teacher could not score them;
    raises UserError on all ranks where they are more than ``teacher.max_dropped`` allows.
    """
    # All at once: a teacher on servers has one deadline for a step.
    of_step = iter(run.teacher.score([rows for share in shares for rows in share.passes]))
    found = [[next(of_step) for _ in share.passes] for share in shares]
    dropped = _check_dropped(run, shares, found)
    shares = [_scored(run, share, scores) for share, scores in zip(shares, found, strict=True)]
    return [share._replace(passes=_with_old(run, share.passes)) for share in shares], dropped


def _check_dropped(
    run: Run, shares: Sequence[Share], found: Sequence[Sequence[Sequence[Score]]]
) -> int:
    errors = [
        str(value)
        for scores in found
        for part in scores
        for value in part
        if isinstance(value, UserError)
    ]
    of_all = [error for part in run.world.gather(errors) for error in part]
    rows = sum(size.rollouts for share in shares for size in share.sizes.values())
    limit = run.config.teacher.max_dropped
    if len(of_all) > limit * rows:
        raise UserError(
            f"the teacher could not score {len(of_all)} of {rows} rollouts, more than "
            f"teacher.max_dropped {limit:g} allows; the same command resumes. The first: "
            f"{of_all[0]}"
        )
    return len(of_all)


def _scored(run: Run, share: Share, scores: Sequence[Sequence[Score]]) -> Share:
    """Rows with their scores; one without weighs nothing, and no normaliser counts it."""
    passes: Passes = []
    lost: list[Rollout] = []
    for rows, found in zip(share.passes, scores, strict=True):
        passes.append([])
        for row, value in zip(rows, found, strict=True):
            if isinstance(value, Tensor):
                passes[-1].append(replace(row, teacher_logprob=value))
                continue
            lost.append(row)
            nothing = torch.zeros(len(row.response_ids))
            passes[-1].append(replace(row, teacher_logprob=nothing, weight=0.0))
    counts = run.world.total(
        [
            float(count)
            for modality in Modality
            for count in (
                sum(row.modality is modality for row in lost),
                sum(len(row.response_ids) for row in lost if row.modality is modality),
            )
        ]
    )
    sizes = {
        modality: StepSize(
            share.sizes[modality].rollouts - int(counts[2 * i]),
            share.sizes[modality].tokens - int(counts[2 * i + 1]),
        )
        for i, modality in enumerate(Modality)
    }
    return Share(passes, sizes)


def _with_old(run: Run, passes: Passes) -> Passes:
    """Rollouts with the log-probs that the ratio starts from, and importance weights.

    None at all where the trainer itself sampled this step and makes one update: pi_old is then the
    current policy, and the ratio is 1. Which case it is, is the same on every rank.
    """
    config = run.config.loss
    has_engine = any(r.engine_logprob is not None for rows in passes for r in rows)
    has_engine = run.world.any(has_engine)  # a rank may hold nothing but filling rows
    wanted = config.old_logprob
    if wanted is OldLogprob.AUTO:
        is_engine = has_engine and not run.student.is_mixture_of_experts
        wanted = OldLogprob.ENGINE if is_engine else OldLogprob.RECOMPUTED
    if wanted is OldLogprob.ENGINE:
        return [[replace(r, old_logprob=_by_engine(r)) for r in rows] for rows in passes]
    if config.minibatches == 1 and not has_engine:
        return passes
    with run.autocast():
        found = score(
            run.student, passes, temperature=run.config.rollout.temperature, backend=run.backend
        )
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
