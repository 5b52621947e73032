"""Numbers of a run: a JSON-lines log that survives kill and resume, and a terminal.

`metrics.jsonl` is the record; trackers and the progress display show the same numbers and may
be absent. One training step is one line, written and flushed at once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from xopd.errors import UserError
from xopd.trackers import Tracker

METRICS_FILE = "metrics.jsonl"


class MetricsError(UserError):
    """A metrics file or line that cannot be used; the message names file and line."""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line (no newline: killed) is left out.

    Raises MetricsError for any other line that is not a JSON object, OSError for a missing file.
    """
    return [record for record, _ in _read_lines(path)]


class MetricsLog:
    """Appends one JSON object per training step to `directory/metrics.jsonl`.

    resume_step: the first step that this process will write. Lines of that step or a later one are
    dropped when the log opens, and so is a torn last line: after a crash the steps behind the
    checkpoint are run again. 0 starts afresh. trackers: get the same numbers, and are closed with
    the log.
    """

    def __init__(self, directory: Path, resume_step: int, trackers: Sequence[Tracker] = ()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        if path.exists():
            os.truncate(path, _bytes_before(path, resume_step))
        self._file = path.open("a", encoding="utf-8")
        self._trackers = tuple(trackers)

    def write(self, record: Mapping[str, float | int | str | bool]) -> None:
        """Writes one line; NaN and infinities become null, since JSON has no word for them.

        Raises MetricsError where "step" is no integer or a value is not a plain scalar.
        """
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise MetricsError(f"record has step={step!r}; expected an integer")
        for name, value in record.items():
            if not isinstance(value, (int, float, str)):
                raise MetricsError(
                    f"{name} is a {type(value).__name__}; pass a Python number (tensor.item())"
                )
        clean = {n: None if _is_not_finite(value) else value for n, value in record.items()}
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {
            name: value
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        for tracker in self._trackers:
            tracker.write(step, numbers)

    def close(self) -> None:
        """Closes the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class TrainProgress:
    """Progress of training: a live bar on a terminal, one line every `plain_every` steps elsewhere.

    Use as a context manager and call `update` after each step with the record that the log gets.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        plain_every: int = 10,
    ) -> None:
        self._total = total_steps
        self._first = first_step
        self._plain_every = plain_every
        self._console = console if console is not None else Console()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step)
        self._live: Live | None = None
        self._start_s = time.monotonic()

    def __enter__(self) -> Self:
        self._start_s = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(Group(self._bar), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, completed_steps: int, record: Mapping[str, object]) -> None:
        """Shows that `completed_steps` of the total are done, with the numbers of the last one."""
        detail = format_record(record)
        if self._live is not None:
            self._bar.update(self._task, completed=completed_steps)
            self._live.update(Group(self._bar, Text(detail)))
            return
        done = completed_steps - self._first
        if completed_steps == self._total or done == 1 or done % self._plain_every == 0:
            eta_s = (time.monotonic() - self._start_s) / max(done, 1)
            eta_s *= self._total - completed_steps
            line = f"step {completed_steps}/{self._total} ETA {_clock(eta_s)} | {detail}"
            self._console.print(Text(line), soft_wrap=True)


def format_record(record: Mapping[str, object]) -> str:
    """The numbers of one step for a reader, text before speech; absent ones are left out.

    KL gap is kl_speech - kl_text: how much farther from the teacher the student is when it listens.
    """
    parts: list[str] = []
    if (rate := _number(record, "tokens_per_s")) is not None:
        parts.append(f"{rate:,.0f} tok/s")
    if kl := _pair(record, "kl", 1.0, ".3f"):
        parts.append(f"KL {kl} nat")
    text, speech = _number(record, "kl_text"), _number(record, "kl_speech")
    if text is not None and speech is not None:
        parts.append(f"KL gap {speech - text:+.3f}")
    if accuracy := _pair(record, "accuracy", 1.0, ".1f"):
        parts.append(f"accuracy {accuracy} %")
    if entropy := _pair(record, "entropy", 1.0, ".2f"):
        parts.append(f"entropy {entropy} nat")
    if clipped := _pair(record, "clip_fraction", 100.0, ".1f"):
        parts.append(f"clipped {clipped} %")
    if (bound := _number(record, "gradient_error")) is not None:
        parts.append(f"gradient error {bound:.2g}")
    if length := _pair(record, "length", 1.0, ".1f"):
        parts.append(f"length {length} tok")
    return " | ".join(parts)


def _pair(record: Mapping[str, object], name: str, scale: float, style: str) -> str:
    shown = []
    for modality in ("text", "speech"):
        value = _number(record, f"{name}_{modality}")
        if value is not None:
            shown.append(f"{modality} {value * scale:{style}}")
    return " ".join(shown)


def _number(record: Mapping[str, object], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _read_lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Each complete line's object, and the byte offset at which the line ends."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # torn: only the last line can lack its newline
        try:
            record = json.loads(line)
        except ValueError as error:
            raise MetricsError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise MetricsError(f"{path}:{number}: expected a JSON object")
        end += len(line)
        found.append((record, end))
    return found


def _bytes_before(path: Path, resume_step: int) -> int:
    """Length of the file up to the first line of a step that will be run again."""
    kept = 0
    for number, (record, end) in enumerate(_read_lines(path), start=1):
        step = record.get("step")
        if not isinstance(step, int):
            raise MetricsError(f"{path}:{number}: step is {step!r}, expected an integer")
        if step >= resume_step:
            break
        kept = end
    return kept
