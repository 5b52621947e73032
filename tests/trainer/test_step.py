"""One step: who gives the old log-probs, importance weights, and updates that are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xopd.advantage import Baseline
from xopd.config import Config
from xopd.errors import UserError
from xopd.optimizer import build_optimizer
from xopd.ranks import ALONE
from xopd.rollout import Request, Sampled
from xopd.run import Run, prepare
from xopd.step import StepResult, importance, run_step
from xopd.types import Modality, Prompt, Rollout

MakeConfig = Callable[..., Config]


class Telling:
    """An engine that samples as another one does and says log-probs, off by a given amount."""

    def __init__(self, run: Run, offset: float) -> None:
        self._inner, self._run, self._offset = run.engine, run, offset

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        from xopd.scoring import score

        found = self._inner.sample(requests)
        prompts = self._run.prompts.load([s.request.number for s in found])
        rows = [
            Rollout(p, s.modality, s.response_ids, s.is_finished)
            for p, s in zip(prompts, found, strict=True)
        ]
        (scores,) = score(self._run.student, [rows], temperature=1.0, backend=self._run.backend)
        return [
            s._replace(logprob=tuple((row + self._offset).tolist()))
            for s, row in zip(found, scores, strict=True)
        ]

    def update(self, version: int) -> None:
        self._inner.update(version)

    def close(self) -> None:
        self._inner.close()


def one_step(config: Config, offset: float | None) -> tuple[Run, StepResult]:
    run = prepare(config, ALONE)
    if offset is not None:
        run = replace(run, engine=Telling(run, offset))
    optimizer = build_optimizer(run.student.trainable().values(), config.optim)
    result = run_step(run, optimizer, Baseline(), step=0, rate=1e-3, check=lambda: None)
    return run, result


def test_an_exact_engine_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    plain, expected = one_step(make_config(tmp_path), None)
    for choice in ("auto", "engine", "recomputed"):
        run, result = one_step(make_config(tmp_path, f"loss.old_logprob={choice}"), 0.0)
        assert result.record["loss"] == pytest.approx(expected.record["loss"], rel=1e-6)
        for name in ("text", "speech"):
            assert abs(result.record[f"mismatch_{name}"]) < 1e-6
            assert result.record[f"truncated_{name}"] == 0
        for one, two in zip(
            plain.student.trainable().values(), run.student.trainable().values(), strict=True
        ):
            assert (one - two).norm() <= 1e-4 * one.norm()


def test_a_mismatch_is_weighed_and_reported(make_config: MakeConfig, tmp_path: Path) -> None:
    """The engine is sure by 0.1 nat too much: each token weighs exp(-0.1)."""
    _, expected = one_step(make_config(tmp_path), None)
    _, result = one_step(make_config(tmp_path, "loss.old_logprob=recomputed"), 0.1)
    assert result.record["loss"] == pytest.approx(
        math.exp(-0.1) * float(expected.record["loss"]), rel=1e-5
    )
    assert result.record["mismatch_text"] == pytest.approx(0.1, rel=1e-4)
    assert result.record["truncated_text"] == 0
    # 2 nat too little would weigh exp(2): cut at the cap.
    _, result = one_step(
        make_config(tmp_path, "loss.old_logprob=recomputed", "loss.importance_cap=1.5"), -2.0
    )
    assert result.record["loss"] == pytest.approx(1.5 * float(expected.record["loss"]), rel=1e-5)
    assert result.record["truncated_speech"] == 1


def test_the_engines_own_log_probs_move_the_ratio(make_config: MakeConfig, tmp_path: Path) -> None:
    """The ratio starts at exp(-0.5), which is below 1 - clip_low, so negative advantages clip."""
    _, result = one_step(make_config(tmp_path, "loss.old_logprob=engine"), 0.5)
    assert result.record["mismatch_text"] == pytest.approx(0.5, rel=1e-4)
    assert result.record["clip_fraction_text"] > 0


def test_an_engine_that_says_nothing_cannot_be_the_old_policy(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"loss\.old_logprob is engine, but this rollout engine"):
        one_step(make_config(tmp_path, "loss.old_logprob=engine"), None)


def test_importance_by_hand() -> None:
    prompt = Prompt("", "", (1,), (1,), torch.zeros(0, 0), "", "")
    row = Rollout(prompt, Modality.TEXT, (5, 6, 7), is_finished=True)
    row = replace(row, old_logprob=torch.tensor([-1.0, -2.0, -0.5]))
    with pytest.raises(ValueError, match="for some trajectories and not for others"):
        importance(row, 2.0)
    row = replace(row, engine_logprob=torch.tensor([-1.5, -1.0, -3.0]))
    expected = [math.exp(0.5), math.exp(-1.0), 2.0]
    assert importance(row, 2.0).tolist() == pytest.approx(expected)  # type: ignore[union-attr]
    assert importance(replace(row, weight=0.0), 2.0) is None


def test_an_update_that_is_not_finite_is_left_out_whole(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """A teacher of NaN, and two minibatches."""
    config = make_config(tmp_path, "loss.minibatches=2")
    run = prepare(config, ALONE)
    optimizer = build_optimizer(run.student.trainable().values(), config.optim)
    hook = run.teacher.model.get_output_embeddings().weight
    with torch.no_grad():
        hook.fill_(torch.nan)
    before = {name: p.detach().clone() for name, p in run.student.trainable().items()}
    result = run_step(run, optimizer, Baseline(), step=0, rate=1e-3, check=lambda: None)
    assert [update.is_finite for update in result.updates] == [False, False]
    assert result.record["skipped_updates"] == 2
    assert all(torch.equal(before[n], p) for n, p in run.student.trainable().items())
    assert not optimizer.state  # Adam's moments are as before too


def test_the_check_may_stop_a_step_before_anything_changes(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    config = make_config(tmp_path)
    run = prepare(config, ALONE)
    optimizer = build_optimizer(run.student.trainable().values(), config.optim)
    before = {name: p.detach().clone() for name, p in run.student.trainable().items()}
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise StopError

    with pytest.raises(StopError):
        run_step(run, optimizer, Baseline(), step=0, rate=1e-3, check=stop)
    assert all(torch.equal(before[n], p) for n, p in run.student.trainable().items())
