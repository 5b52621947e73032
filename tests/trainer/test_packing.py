"""Who trains on which row: every row once, equal passes, and no rank far above the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xopd.packing import assigned

lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=60)


@given(lengths, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_every_row_is_trained_on_once_in_equally_many_passes(
    tokens: list[int], ranks: int, micro_batch: int, is_balanced: bool
) -> None:
    found = assigned(tokens, ranks=ranks, micro_batch=micro_batch, is_balanced=is_balanced)
    assert len(found) == ranks
    rows = [row for passes in found for part in passes for row in part]
    assert sorted(rows) == list(range(len(tokens)))
    assert len({len(passes) for passes in found}) == 1  # else a rank would wait for ever
    assert all(len(part) <= micro_batch for passes in found for part in passes)
    # No pass too many: one less would be too few for the fullest rank.
    fullest = max(sum(map(len, passes)) for passes in found)
    assert len(found[0]) == -(-fullest // micro_batch)


@given(lengths, st.integers(1, 9), st.integers(1, 60))
def test_no_balanced_rank_is_far_above_the_mean(
    tokens: list[int], ranks: int, micro_batch: int
) -> None:
    found = assigned(tokens, ranks=ranks, micro_batch=micro_batch, is_balanced=True)
    heaviest = max(sum(tokens[row] for part in passes for row in part) for passes in found)
    # The heaviest rank was the lightest before its last row; with more than one row, that last one
    # is not among the `ranks` longest, which were dealt to ranks that had none.
    longest = sorted(tokens, reverse=True)
    last = longest[ranks] if len(tokens) > ranks else 0
    assert heaviest <= max(longest[0], sum(tokens) / ranks + last)


def test_by_hand() -> None:
    tokens = [10, 1, 7, 3, 2]
    assert assigned(tokens, ranks=2, micro_batch=9, is_balanced=True) == [[(4, 0)], [(1, 3, 2)]]
    assert assigned(tokens, ranks=2, micro_batch=9, is_balanced=False) == [[(4, 2, 0)], [(1, 3)]]
    assert assigned([5], ranks=3, micro_batch=1, is_balanced=True) == [[(0,)], [()], [()]]


@pytest.mark.parametrize(("rows", "ranks", "micro_batch"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_to_deal_is_refused(rows: int, ranks: int, micro_batch: int) -> None:
    with pytest.raises(ValueError, match="expected rows, ranks and micro_batch >= 1"):
        assigned([3] * rows, ranks=ranks, micro_batch=micro_batch, is_balanced=True)
