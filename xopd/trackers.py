"""TensorBoard, trackio and wandb behind three methods; each is an extra that a run asks for.

`metrics.jsonl` stays the record of a run. A tracker shows the same numbers elsewhere, and a resumed
run goes on in the same curve: its name and id are made of the run folder.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from xopd.config import Config, config_to_dict
from xopd.errors import UserError

_log = logging.getLogger(__name__)


class TrackerError(UserError):
    """A tracker that a config asks for and that is not installed."""


class Tracker(Protocol):
    """Where the numbers of each step go besides the log."""

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """The finite numbers of one step."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Events in `directory/tensorboard`; those of steps that are run again are hidden."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        summary = importlib.import_module("torch.utils.tensorboard")
        self._writer = summary.SummaryWriter(directory / "tensorboard", purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Trackio:
    """A local trackio project (`trackio show --project NAME`)."""

    def __init__(self, directory: Path, project: str, settings: Mapping[str, Any]) -> None:
        trackio = _module("trackio")
        self._run = trackio.init(
            project=project, name=run_name(directory), config=dict(settings), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Wandb:
    """A wandb run; WANDB_MODE=offline, wandb's own switch, keeps it in the run folder."""

    def __init__(self, directory: Path, project: str, settings: Mapping[str, Any]) -> None:
        wandb = _module("wandb")
        self._run = wandb.init(
            project=project,
            name=run_name(directory),
            id=run_id(directory),
            dir=str(directory),
            config=dict(settings),
            resume="allow",
        )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def open_trackers(config: Config, directory: Path, resume_step: int) -> list[Tracker]:
    """The trackers that a config asks for. TensorBoard is on by default, so it may be absent."""
    found: list[Tracker] = []
    wanted = config.train
    settings = config_to_dict(config)
    if wanted.tensorboard:
        try:
            found.append(TensorBoard(directory, resume_step))
        except ImportError:  # also one that is too old
            _log.warning("TensorBoard is not installed (pip install tensorboard); only the log")
    if wanted.trackio:
        found.append(Trackio(directory, wanted.project, settings))
    if wanted.wandb:
        found.append(Wandb(directory, wanted.project, settings))
    return found


def check_trackers(config: Config) -> None:
    """Raise TrackerError before any work if a tracker that is asked for cannot be imported."""
    for name, is_wanted in (("trackio", config.train.trackio), ("wandb", config.train.wandb)):
        if is_wanted:
            _module(name)


def run_name(directory: Path) -> str:
    """The last two parts of the folder: `demo/seed_0`."""
    return "/".join(directory.resolve().parts[-2:])


def run_id(directory: Path) -> str:
    """A short id that the same folder has again."""
    return hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).hexdigest()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TrackerError(
            f"train.{name} is true, but {error.name} is not installed: pip install '.[{name}]' in "
            "the clone, or set it to false"
        ) from error
