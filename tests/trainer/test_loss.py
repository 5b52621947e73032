"""Token weights and the loss on numbers small enough to do by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from xopd.config import LossConfig
from xopd.head import Head, fused_head
from xopd.loss import policy_loss, step_sizes, token_weight
from xopd.models import SpeechLM
from xopd.types import Modality, Rollout
from xopd_kernels import Backend

TEXT, SPEECH = Modality.TEXT, Modality.SPEECH
MakeRollouts = Callable[[list[Modality]], list[Rollout]]


@pytest.mark.parametrize("text_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sequence_mean", [True, False])
def test_weights_of_a_modality_add_up_to_its_share(
    rollouts: MakeRollouts, text_weight: float, sequence_mean: bool
) -> None:
    rows = rollouts([TEXT, SPEECH, TEXT, SPEECH, SPEECH])
    config = LossConfig(text_weight=text_weight, sequence_mean=sequence_mean)
    sizes = step_sizes(rows)
    total = dict.fromkeys(Modality, 0.0)
    for row in rows:
        total[row.modality] += float(token_weight(row, sizes, config).double().sum())
    assert total[TEXT] == pytest.approx(text_weight, abs=1e-6)
    assert total[SPEECH] == pytest.approx(1 - text_weight, abs=1e-6)


def test_weights_by_hand(rollouts: MakeRollouts) -> None:
    rows = rollouts([TEXT, SPEECH, TEXT])  # 3, 4 and 5 tokens
    sizes = step_sizes(rows)
    assert (sizes[TEXT].rollouts, sizes[TEXT].tokens) == (2, 8)
    assert (sizes[SPEECH].rollouts, sizes[SPEECH].tokens) == (1, 4)
    by_sequence = LossConfig(text_weight=0.25)
    by_token = replace(by_sequence, sequence_mean=False)
    for row, length, sequence_share, token_share in (
        (rows[0], 3, 0.25 / 2 / 3, 0.25 / 8),
        (rows[1], 4, 0.75 / 4, 0.75 / 4),
        (rows[2], 5, 0.25 / 2 / 5, 0.25 / 8),
    ):
        expected = torch.full((length,), sequence_share)
        torch.testing.assert_close(token_weight(row, sizes, by_sequence), expected)
        expected = torch.full((length,), token_share)
        torch.testing.assert_close(token_weight(row, sizes, by_token), expected)


def test_loss_by_hand(new_student: SpeechLM, rollouts: MakeRollouts) -> None:
    """A head of zeros: log-probs are -log of the ids that can be sampled; the rest by hand."""
    head = nn.Linear(128, 64, bias=False)
    nn.init.zeros_(head.weight)
    new_student.model.set_output_embeddings(head)
    flat = -math.log(64 - len(new_student.reserved_ids))
    text, speech = (replace(r, response_ids=(20, 21)) for r in rollouts([TEXT, SPEECH]))
    rows = [
        replace(
            text,
            teacher_logprob=torch.tensor([flat + 1.0, flat - 2.0]),
            old_logprob=torch.tensor([flat, flat - math.log(1.5)]),
        ),
        replace(
            speech,
            teacher_logprob=torch.tensor([flat + 9.0, flat + 1.0]),
            old_logprob=torch.tensor([flat - math.log(1.5), flat + math.log(2.0)]),
        ),
    ]
    # Text: r A = 1 * 1, and 1.5 * -2 (the min keeps the larger ratio of a negative advantage).
    # Speech: A = 9 -> 4, r = 1.5 -> 1.3; and r = 0.5 (the min keeps the smaller ratio) with A = 1.
    text_term = (1.0 - 3.0) / 2
    speech_term = (1.3 * 4.0 + 0.5) / 2
    config = LossConfig(text_weight=0.25, clip_low=0.2, clip_high=0.3, advantage_clamp=4.0)
    loss, stats = policy_loss(
        new_student, rows, step_sizes(rows), config, temperature=1.0, backend=Backend.REFERENCE
    )
    assert loss.item() == pytest.approx(-(0.25 * text_term + 0.75 * speech_term), rel=1e-5)
    assert [s.is_clipped.tolist() for s in stats] == [[False, False], [True, False]]
    torch.testing.assert_close(stats[0].advantage, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(stats[1].advantage, torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(stats[0].logprob, torch.tensor([flat, flat]))
    assert stats[0].rollout is rows[0]


def test_unscored_rollouts_are_refused(student: SpeechLM, rollouts: MakeRollouts) -> None:
    rows = rollouts([TEXT, TEXT])
    sizes = step_sizes(rows)

    def loss(given: list[Rollout]) -> None:
        policy_loss(student, given, sizes, LossConfig(), temperature=1.0, backend=Backend.REFERENCE)

    with pytest.raises(ValueError, match="every rollout needs teacher_logprob"):
        loss(rows)
    scored = [replace(r, teacher_logprob=torch.zeros(len(r.response_ids))) for r in rows]
    half = [replace(scored[0], old_logprob=torch.zeros(3)), scored[1]]
    with pytest.raises(ValueError, match="on all rollouts of a batch or on none"):
        loss(half)


def test_fused_head_is_undone_and_does_not_nest(student: SpeechLM) -> None:
    lm_head = student.lm_head
    hidden, target = torch.randn(2, lm_head.in_features), torch.tensor([3, 4])
    plain = lm_head(hidden)

    def show(hidden: Tensor, head: Head, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (hidden, head.weight, *values)

    def fail(hidden: Tensor, head: Head, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        raise ZeroDivisionError

    with fused_head(student.model, show, [target]):
        found = lm_head(hidden)
        assert found[0] is hidden and found[1] is lm_head.weight and found[2] is target
        with pytest.raises(RuntimeError, match="do not nest"), fused_head(student.model, show):
            pass
    assert torch.equal(lm_head(hidden), plain)
    with pytest.raises(ZeroDivisionError), fused_head(student.model, fail):
        lm_head(hidden)
    assert torch.equal(lm_head(hidden), plain)
