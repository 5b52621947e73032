"""The running baseline and what it does to an advantage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from xopd.advantage import DECAY, Baseline, centred
from xopd.types import Modality, Rollout

TEXT, SPEECH = Modality.TEXT, Modality.SPEECH
MakeRollouts = Callable[[list[Modality]], list[Rollout]]


def test_the_first_step_has_no_baseline_and_sets_it() -> None:
    baseline = Baseline()
    assert (baseline.of(TEXT), baseline.of(SPEECH)) == (0.0, 0.0)
    baseline = baseline.updated(SPEECH, -0.5)
    assert (baseline.of(TEXT), baseline.of(SPEECH)) == (0.0, -0.5)
    assert baseline.text is None


def test_later_steps_decay_and_keep_the_modalities_apart() -> None:
    baseline = Baseline(text=1.0, speech=-1.0).updated(TEXT, 2.0)
    assert baseline.of(TEXT) == pytest.approx(DECAY * 1.0 + (1 - DECAY) * 2.0)
    assert baseline.of(SPEECH) == -1.0


def test_centring_shifts_the_advantage_of_its_modality(rollouts: MakeRollouts) -> None:
    baseline = Baseline(text=0.25, speech=-2.0)
    teacher = torch.tensor([-1.0, -2.0, -3.0])
    row = replace(rollouts([TEXT])[0], teacher_logprob=teacher)
    torch.testing.assert_close(centred(row, baseline).teacher_logprob, teacher - 0.25)
    spoken = replace(row, modality=SPEECH)
    torch.testing.assert_close(centred(spoken, baseline).teacher_logprob, teacher + 2.0)
    assert centred(row, Baseline()).response_ids == row.response_ids
    assert torch.equal(row.teacher_logprob, teacher)


def test_an_unscored_rollout_cannot_be_centred(rollouts: MakeRollouts) -> None:
    with pytest.raises(ValueError, match="no teacher_logprob"):
        centred(rollouts([TEXT])[0], Baseline())
