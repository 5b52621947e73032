"""The metrics of a step's tokens, as sums over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xopd.loss import TokenStats
from xopd.ranks import World
from xopd.types import Modality

_SUMS = 11  # numbers of each modality


def token_metrics(
    world: World, stats: Sequence[TokenStats], importance_cap: float
) -> dict[str, float | int]:
    """The metrics of a step's tokens, over all ranks.

    kl_*: mean over tokens of logprob - teacher_logprob, the sampled estimate of KL(student ||
    teacher) in nats. entropy_*: mean of -logprob, the sampled estimate of the policy's entropy.
    mismatch_*, where the engine gave log-probs: mean of engine_logprob - old_logprob, the sampled
    estimate of KL(engine || trainer), for recomputed old log-probs; else the first update's own.
    truncated_*: share of tokens whose importance weight was cut at the cap.
    With sparse gradients, dropped_mass_*: mean over tokens of the probability of the classes that
    were left out of the gradient; gradient_error: the largest bound of a pass, hence one of the
    whole step, ||d_logits - exact||_1 <= gradient_error * ||exact||_1.
    """
    names, cap = list(Modality), importance_cap
    sums = world.total([value for modality in names for value in _sums(stats, modality, cap)])
    record: dict[str, float | int] = {}
    all_tokens, is_sparse = 0, False
    for i, modality in enumerate(names):
        of_modality = sums[_SUMS * i : _SUMS * (i + 1)]
        tokens, rows, kl, logprob, clipped, finished, *rest = of_modality
        said, mismatch, cut, listed, dropped = rest
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
        if listed:
            is_sparse = True
            record[f"dropped_mass_{name}"] = dropped / listed
    if is_sparse:  # all ranks know it from the sums
        bounds = [s.gradient_error for s in stats if s.gradient_error is not None]
        record["gradient_error"] = max(max(part) for part in world.gather(bounds) if part)
    return record | {"tokens": all_tokens}


def _sums(stats: Sequence[TokenStats], modality: Modality, cap: float) -> list[float]:
    """Tokens, rows, sums over tokens of KL, logprob and clipped, rows that ended; of what the
    engine gave log-probs for: tokens, sum of the mismatch, tokens at the cap; of those with a
    sparse gradient: tokens, sum of the mass left out."""
    picked = [s for s in stats if s.rollout.modality is modality]
    if not picked:
        return [0.0] * _SUMS
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
    masses = [s.dropped_mass for s in picked if s.dropped_mass is not None]
    dropped = sum(float(mass.double().sum()) for mass in masses)
    return [*head, said, mismatch, cut, float(sum(map(len, masses))), dropped]


def _own(stats: TokenStats) -> Tensor:
    """The trainer's log-probs of the policy that sampled: recomputed ones, else the update's."""
    row = stats.rollout
    recomputed = row.old_logprob if row.importance is not None else None
    return (stats.logprob if recomputed is None else recomputed.cpu()).double()


def _teacher(stats: TokenStats) -> Tensor:
    if stats.rollout.teacher_logprob is None:
        raise ValueError("token statistics of a rollout that no teacher scored")
    return stats.rollout.teacher_logprob.cpu()
