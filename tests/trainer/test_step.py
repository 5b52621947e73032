"""One step: who gives the old log-probs, importance weights, and updates that are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.telling import tell
from xopd.advantage import Baseline
from xopd.config import Config
from xopd.errors import UserError
from xopd.judged import importance
from xopd.optimizer import build_optimizer
from xopd.ranks import ALONE
from xopd.rollout import GenerateEngine, Request, Sampled
from xopd.run import Run, prepare
from xopd.step import StepResult, requests, run_step
from xopd.teacher import LocalTeacher, Score
from xopd.types import Modality, Prompt, Rollout

MakeConfig = Callable[..., Config]
OneStep = Callable[..., tuple[Run, StepResult]]


TOLD = "rollout.engine=vllm"


@pytest.fixture
def one_step(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OneStep:
    """The first step of a run; offset: of an engine that says log-probs, None for generate."""

    def make(offset: float | None, *overrides: str) -> tuple[Run, StepResult]:
        if offset is not None:
            tell(monkeypatch, offset)
            overrides = (*overrides, TOLD)
        config = make_config(tmp_path, *overrides)
        return stepped(prepare(config, ALONE))

    return make


def stepped(run: Run) -> tuple[Run, StepResult]:
    optimizer = build_optimizer(run.student.trainable().values(), run.config.optim)
    return run, run_step(run, optimizer, Baseline(), step=0, rate=1e-3, check=lambda: None)


def test_an_exact_engine_changes_nothing(one_step: OneStep) -> None:
    plain, expected = one_step(None)
    for choice in ("auto", "engine", "recomputed"):
        run, result = one_step(0.0, f"loss.old_logprob={choice}")
        assert result.record["loss"] == pytest.approx(expected.record["loss"], rel=1e-6)
        for name in ("text", "speech"):
            assert abs(result.record[f"mismatch_{name}"]) < 1e-6
            assert result.record[f"truncated_{name}"] == 0
        for one, two in zip(
            plain.student.trainable().values(), run.student.trainable().values(), strict=True
        ):
            assert (one - two).norm() <= 1e-4 * one.norm()


def test_a_mismatch_is_weighed_and_reported(one_step: OneStep) -> None:
    """The engine is sure by 0.1 nat too much: each token weighs exp(-0.1)."""
    _, expected = one_step(None)
    _, result = one_step(0.1, "loss.old_logprob=recomputed")
    assert result.record["loss"] == pytest.approx(
        math.exp(-0.1) * float(expected.record["loss"]), rel=1e-5
    )
    assert result.record["mismatch_text"] == pytest.approx(0.1, rel=1e-4)
    assert result.record["truncated_text"] == 0
    # 2 nat too little would weigh exp(2): cut at the cap.
    _, result = one_step(-2.0, "loss.old_logprob=recomputed", "loss.importance_cap=1.5")
    assert result.record["loss"] == pytest.approx(1.5 * float(expected.record["loss"]), rel=1e-5)
    assert result.record["truncated_speech"] == 1


def test_the_engines_own_log_probs_move_the_ratio(one_step: OneStep) -> None:
    """The ratio starts at exp(-0.5), which is below 1 - clip_low, so negative advantages clip."""
    _, result = one_step(0.5, "loss.old_logprob=engine")
    assert result.record["mismatch_text"] == pytest.approx(0.5, rel=1e-4)
    assert result.record["clip_fraction_text"] > 0


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
    assert isinstance(run.teacher, LocalTeacher)
    hook = run.teacher.lm.model.get_output_embeddings().weight
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


class Failing:
    """A teacher that cannot score some responses."""

    def __init__(self, inner: LocalTeacher, is_lost: Callable[[tuple[int, ...]], bool]) -> None:
        self._inner, self._is_lost = inner, is_lost

    def score(self, passes: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        return [
            [
                UserError("no server answers") if self._is_lost(row.response_ids) else value
                for row, value in zip(rows, found, strict=True)
            ]
            for rows, found in zip(passes, self._inner.score(passes), strict=True)
        ]

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[tuple[int, ...]]:
        raise AssertionError("no answers are needed in a step")


class Without(GenerateEngine):
    """An engine that never gave those rollouts."""

    is_lost: Callable[[tuple[int, ...]], bool]

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        return [s for s in super().sample(requests) if not self.is_lost(s.response_ids)]


@pytest.mark.parametrize("sequence_mean", ["true", "false"])
def test_rollouts_without_a_score_are_as_never_sampled(
    make_config: MakeConfig, tmp_path: Path, sequence_mean: str
) -> None:
    def is_lost(response: tuple[int, ...]) -> bool:
        return response[0] % 3 == 0

    config = make_config(tmp_path, "teacher.max_dropped=0.8", f"loss.sequence_mean={sequence_mean}")
    run = prepare(config, ALONE)
    assert isinstance(run.teacher, LocalTeacher)
    run, found = stepped(replace(run, teacher=Failing(run.teacher, is_lost)))
    other = prepare(config, ALONE)
    engine = Without(other.student, other.prompts, config.rollout, ALONE)
    engine.is_lost = is_lost
    other, expected = stepped(replace(other, engine=engine))
    dropped = found.record["dropped_rollouts"]
    assert 0 < dropped < 12
    assert expected.record["dropped_rollouts"] == 0
    for name in ("loss", "grad_norm", "kl_text", "kl_speech", "tokens"):
        assert found.record[name] == pytest.approx(expected.record[name], rel=1e-5), name
    strict = prepare(make_config(tmp_path, f"teacher.max_dropped={(dropped - 0.5) / 12}"), ALONE)
    assert isinstance(strict.teacher, LocalTeacher)
    before = {name: p.detach().clone() for name, p in strict.student.trainable().items()}
    with pytest.raises(UserError, match=rf"could not score {dropped} of 12 .* no server answers"):
        stepped(replace(strict, teacher=Failing(strict.teacher, is_lost)))
    assert all(torch.equal(before[n], p) for n, p in strict.student.trainable().items())


@pytest.mark.parametrize(("limit", "version"), [(0, 3), (0, 2), (1, 2), (1, 1), (1, 4), (0, -1)])
def test_rollouts_of_older_weights_than_allowed_stop_the_run(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    version: int,
) -> None:
    tell(monkeypatch, 0.0)
    settings = (TOLD, f"rollout.max_staleness={limit}", "train.steps=4")
    run = prepare(make_config(tmp_path, *settings), ALONE)
    old = [s._replace(version=version) for s in run.engine.sample(requests(run, 3))]
    optimizer = build_optimizer(run.student.trainable().values(), run.config.optim)
    options: dict[str, Any] = {"step": 3, "rate": 1e-3, "check": lambda: None, "ahead": old}
    if 3 - limit <= version <= 3:
        result = run_step(run, optimizer, Baseline(), **options)
        assert result.record["staleness"] == 3 - version
        return
    with pytest.raises(UserError, match=r"rollouts of weights .*, and rollout.max_staleness is"):
        run_step(run, optimizer, Baseline(), **options)
