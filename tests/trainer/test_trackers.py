"""Trackers: the same numbers elsewhere, and a clear word where one is missing."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from xopd.config import Config
from xopd.metrics import MetricsLog
from xopd.trackers import (
    TensorBoard,
    TrackerError,
    check_trackers,
    open_trackers,
    run_id,
    run_name,
)

MakeConfig = Callable[..., Config]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, 0, [TensorBoard(tmp_path, 0)]) as log:
        log.write({"step": 7, "loss": 0.5, "phase": "train"})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 0.5)]


def test_without_tensorboard_the_run_goes_on_and_says_so(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        assert open_trackers(make_config(tmp_path, "train.tensorboard=true"), tmp_path, 0) == []
    assert len(caplog.messages) == 1
    assert "pip install tensorboard" in caplog.text


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_asked_for_must_be_there(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check_trackers(make_config(tmp_path))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackerError, match=rf"train\.{name} is true, .*pip install"):
        check_trackers(make_config(tmp_path, f"train.{name}=true"))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_resumed_run_goes_on_in_the_same_curve(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The calls that reach the package, which need not be installed for this."""
    calls: list[tuple[str, Any]] = []
    fake = ModuleType(name)
    run = SimpleNamespace(
        log=lambda values, step: calls.append(("log", (step, values))),
        finish=lambda: calls.append(("finish", None)),
    )

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(("init", settings))
        return run

    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)
    directory = tmp_path / "seed_0"
    config = make_config(directory, f"train.{name}=true", "train.project=mine")
    for step in (0, 3):
        with MetricsLog(directory, step, open_trackers(config, directory, step)) as log:
            log.write({"step": step, "loss": 0.5})
    first, second = (settings for kind, settings in calls if kind == "init")
    assert first == second
    assert (first["project"], first["name"]) == ("mine", f"{tmp_path.name}/seed_0")
    assert first["resume"] == "allow"
    assert first.get("id", run_id(directory)) == run_id(directory)
    assert json.loads(json.dumps(first["config"]))["train"]["project"] == "mine"
    assert [value for kind, value in calls if kind == "log"] == [
        (0, {"loss": 0.5}),
        (3, {"loss": 0.5}),
    ]
    assert [kind for kind, _ in calls].count("finish") == 2


def test_wandb_itself_offline(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(tmp_path, "train.wandb=true")
    with MetricsLog(tmp_path, 0, open_trackers(config, tmp_path, 0)) as log:
        log.write({"step": 0, "loss": 0.5})
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_trackio_itself(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    config = make_config(tmp_path, "train.trackio=true", "train.project=mine")
    with MetricsLog(tmp_path, 0, open_trackers(config, tmp_path, 0)) as log:
        log.write({"step": 0, "loss": 0.5})
    assert list((tmp_path / "trackio").glob("mine*.db"))


def test_names_of_runs_are_those_of_their_folders(tmp_path: Path) -> None:
    one, two = tmp_path / "demo" / "seed_0", tmp_path / "demo" / "seed_1"
    assert run_name(one) == "demo/seed_0"
    assert run_id(one) == run_id(one) != run_id(two)
    assert len(run_id(one)) == 16
