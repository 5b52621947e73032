"""Which rank trains on which rollout, and in which micro-batch.

A step ends when its slowest rank ends, so the ranks get equal numbers of tokens, not of rows. And
as a sharded model gathers its weights layer by layer, every rank has to make the same number of
passes. Both are decided here, from lengths that all ranks know: nobody sends a plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# Rows of a pass, by their index in the step. An empty one is a pass for the others' sake.
MicroBatch = tuple[int, ...]


def assigned(
    lengths: Sequence[int], *, ranks: int, micro_batch: int, is_balanced: bool
) -> list[list[MicroBatch]]:
    """For each rank its micro-batches: the same number for all, rows of like length together.

    lengths: tokens of each row, prompt included. Balanced: the longest row that is left goes to the
    rank with the fewest tokens (a heaviest rank then has at most 4/3 of what is possible; Graham,
    1969). Else rows are dealt in turn. A pure function, so a run with other ranks trains on the
    same rows.
    """
    if not lengths or ranks < 1 or micro_batch < 1:
        raise ValueError(
            f"expected rows, ranks and micro_batch >= 1, got {len(lengths)} rows, {ranks} ranks, "
            f"micro_batch {micro_batch}"
        )
    dealt = _balanced(lengths, ranks) if is_balanced else _in_turn(lengths, ranks)
    passes = max(-(-len(rows) // micro_batch) for rows in dealt)
    return [_cut(rows, passes) for rows in dealt]


def _balanced(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]  # a heap: the least tokens, then the lowest rank
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        tokens, rank = heapq.heappop(load)
        dealt[rank].append(row)
        heapq.heappush(load, (tokens + lengths[row], rank))
    return dealt


def _in_turn(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    return [
        sorted(range(rank, len(lengths), ranks), key=lambda row: (-lengths[row], row))
        for rank in range(ranks)
    ]


def _cut(rows: Sequence[int], passes: int) -> list[MicroBatch]:
    """The rows in that many parts, whose sizes differ by one at most; shortest rows first."""
    ordered = list(reversed(rows))
    share, rest = divmod(len(ordered), passes)
    parts, start = [], 0
    for number in range(passes):
        end = start + share + (number < rest)
        parts.append(tuple(ordered[start:end]))
        start = end
    return parts
