"""xopd.metrics: the log survives kill and resume; the progress display works without a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from xopd.metrics import MetricsError, MetricsLog, TrainProgress, format_record, read_jsonl

RECORD = {
    "step": 3,
    "kl_text": 0.012,
    "kl_speech": 0.145,
    "entropy_text": 1.2,
    "entropy_speech": 1.351,
    "clip_fraction_text": 0.001,
    "clip_fraction_speech": 0.0,
    "length_text": 22.04,
    "length_speech": 25.0,
    "tokens_per_s": 1812.4,
    "accuracy_speech": 61.25,
}


def write_steps(directory: Path, resume_step: int, steps: range) -> None:
    with MetricsLog(directory, resume_step) as log:
        for step in steps:
            log.write({"step": step, "loss": step / 2})


def logged_steps(directory: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(directory / "metrics.jsonl")]


def test_each_write_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", 0)
    log.write({"step": 0, "loss": 0.1, "phase": "train"})
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 0, "loss": 0.1, "phase": "train"}
    ]
    log.close()


def test_resume_drops_the_steps_that_are_run_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(10))
    write_steps(tmp_path, 6, range(6, 8))
    assert logged_steps(tmp_path) == list(range(8))
    write_steps(tmp_path, 0, range(2))
    assert logged_steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4}', b'{"x": "\xc3'])
def test_a_torn_last_line_is_left_out_and_removed(tmp_path: Path, torn: bytes) -> None:
    write_steps(tmp_path, 0, range(4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert logged_steps(tmp_path) == [0, 1, 2, 3]
    write_steps(tmp_path, 5, range(5, 6))
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 5]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for text in (
        '{"step": 0}\n{"st\n{"step": 2}\n',
        '{"step": 0}\n[1]\n',
        '{"step": 0}\n{"a":1}\n',
    ):
        path.write_text(text)
        with pytest.raises(MetricsError, match=r"metrics\.jsonl:2"):
            MetricsLog(tmp_path, 5)
        assert path.read_text() == text


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as log:
        log.write({"step": 0, "a": float("nan"), "b": float("-inf"), "c": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 0, "a": None, "b": None, "c": 1.0}
    assert "NaN" not in line


def test_bad_records_are_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as log:
        with pytest.raises(MetricsError, match="step=None"):
            log.write({"loss": 1.0})
        with pytest.raises(MetricsError, match="loss is a Tensor"):
            log.write({"step": 1, "loss": torch.tensor(1.0)})  # type: ignore[dict-item]
    assert logged_steps(tmp_path) == []


class Listening:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float | int]]] = []
        self.is_closed = False

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        self.heard.append((step, dict(values)))

    def close(self) -> None:
        self.is_closed = True


def test_trackers_get_the_finite_numbers_and_are_closed(tmp_path: Path) -> None:
    tracker = Listening()
    with MetricsLog(tmp_path, 0, [tracker]) as log:
        log.write({"step": 7, "loss": 0.5, "kl": float("nan"), "phase": "train", "tokens": 3})
    assert tracker.heard == [(7, {"loss": 0.5, "tokens": 3})]
    assert tracker.is_closed


def test_format_record() -> None:
    assert format_record(RECORD) == (
        "1,812 tok/s | KL text 0.012 speech 0.145 nat | KL gap +0.133 | accuracy speech 61.2 % | "
        "entropy text 1.20 speech 1.35 nat | clipped text 0.1 speech 0.0 % | "
        "length text 22.0 speech 25.0 tok"
    )
    assert format_record({"step": 1, "kl_text": None}) == ""


def test_progress_without_a_terminal_prints_a_line_now_and_then() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=60)
    with TrainProgress(30, first_step=5, console=console, plain_every=10) as progress:
        for completed in range(6, 31):
            progress.update(completed, RECORD)
    lines = out.getvalue().splitlines()
    assert [line.split(" ETA")[0] for line in lines] == [
        "step 6/30",
        "step 15/30",
        "step 25/30",
        "step 30/30",
    ]
    assert lines[-1].startswith("step 30/30 ETA 0:00:00 | 1,812 tok/s | KL text 0.012")


def test_progress_on_a_terminal_shows_bar_and_numbers() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    with TrainProgress(30, console=console) as progress:
        progress.update(30, RECORD)
    assert "30/30" in out.getvalue()
    assert "KL gap +0.133" in out.getvalue()
