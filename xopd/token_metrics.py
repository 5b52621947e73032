"""The metrics of a step's tokens, as sums over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xopd.loss import TokenStats
from xopd.ranks import World
from xopd.types import Modality


def token_metrics(
    world: World, stats: Sequence[TokenStats], importance_cap: float
) -> dict[str, float | int]:
    """The metrics of a step's tokens, over all ranks.

    kl_*: mean over tokens of logprob - teacher_logprob, the sampled estimate of KL(student ||
    teacher) in nats. entropy_*: mean of -logprob, the sampled estimate of the policy's entropy.
    mismatch_*, where the engine gave log-probs: mean of engine_logprob - old_logprob, the sampled
    estimate of KL(engine || trainer), for recomputed old log-probs; else the first update's own.
    truncated_*: share of tokens whose importance weight was cut at the cap.
    """
    names, cap = list(Modality), importance_cap
    sums = world.total([value for modality in names for value in _sums(stats, modality, cap)])
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
