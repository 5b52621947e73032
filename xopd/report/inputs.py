"""Reads what a run left on disk into frozen records; says what is missing instead of failing.

A report is most wanted for a run that broke, so each file is optional: an absent or unusable one
becomes a note on the page. Numbers are checked here, so that the rest can trust them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xopd.errors import UserError
from xopd.metrics import METRICS_FILE, MetricsError, read_jsonl

Record = Mapping[str, object]


class ReportError(UserError):
    """A folder that no report can be made of; the message names it."""


@dataclass(frozen=True)
class Score:
    """Accuracy in percent, over all prompts and by task family."""

    accuracy: float
    by_task: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: eval/before.json, eval/after.json or eval/step_*.json."""

    step: int
    split: str
    count: int  # prompts
    speech: Score | None
    text: Score | None
    held_out_voice: Score | None  # speech prompts in voices absent from training
    teacher_text: Score | None
    probes: Mapping[str, float]  # accuracy in percent by forgetting probe
    average_drop_speech: float | None  # percent below the teacher's text accuracy, mean over tasks
    average_drop_text: float | None


@dataclass(frozen=True)
class Sample:
    """One sampled response; the four token fields have one entry per token."""

    step: int
    modality: str
    task: str
    prompt: str
    reference: str
    is_correct: bool | None
    token: tuple[str, ...]
    advantage: tuple[float, ...]  # nats
    logprob: tuple[float, ...]
    teacher_logprob: tuple[float, ...]


@dataclass(frozen=True)
class RunInputs:
    """All that a report shows, and notes on what it could not read."""

    name: str
    config_text: str | None
    metrics: tuple[Record, ...]
    before: Evaluation | None
    after: Evaluation | None
    during: tuple[Evaluation, ...]  # by step
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def read_run(run_dir: Path) -> RunInputs:
    """The inputs of a report. Raises ReportError where `run_dir` is no folder."""
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir}: no such folder; give the out_dir of a run")
    notes: list[str] = []
    paths = sorted((run_dir / "eval").glob("step_*.json"))
    during = [read for path in paths if (read := _read_evaluation(path, notes)) is not None]
    return RunInputs(
        name=run_dir.resolve().name,
        config_text=_read_text(run_dir / "config.yaml", notes),
        metrics=_read_records(run_dir / METRICS_FILE, notes),
        before=_read_evaluation(run_dir / "eval" / "before.json", notes),
        after=_read_evaluation(run_dir / "eval" / "after.json", notes),
        during=tuple(sorted(during, key=lambda evaluation: evaluation.step)),
        samples=_read_samples(run_dir / "samples.jsonl", notes),
        notes=tuple(notes),
    )


def number(record: Record, name: str) -> float | None:
    """A finite number of a record, or None where it is absent, null or of another type."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _read_text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
    return None


def _read_records(path: Path, notes: list[str]) -> tuple[Record, ...]:
    try:
        return tuple(read_jsonl(path))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
    except (OSError, MetricsError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
    return ()


def _read_evaluation(path: Path, notes: list[str]) -> Evaluation | None:
    text = _read_text(path, notes)
    if text is None:
        return None
    try:
        return _evaluation(_mapping(json.loads(text), "the file"))
    except ValueError as error:
        notes.append(f"{path.name} cannot be used: {error}")
        return None


def _evaluation(record: Record) -> Evaluation:
    return Evaluation(
        step=int(_required(record, "step")),
        split=str(record.get("split", "")),
        count=int(_required(record, "count")),
        speech=_score(record, "speech"),
        text=_score(record, "text"),
        held_out_voice=_score(record, "held_out_voice"),
        teacher_text=_score(record, "teacher_text"),
        probes=_percentages(record, "probes"),
        average_drop_speech=number(record, "average_drop_speech"),
        average_drop_text=number(record, "average_drop_text"),
    )


def _score(record: Record, name: str) -> Score | None:
    if record.get(name) is None:
        return None
    entry = _mapping(record[name], name)
    return Score(_required(entry, "accuracy"), _percentages(entry, "by_task"))


def _percentages(record: Record, name: str) -> dict[str, float]:
    entry = _mapping(record.get(name) or {}, name)
    return {str(key): _required(entry, key) for key in entry}


def _required(record: Record, name: str) -> float:
    value = number(record, name)
    if value is None:
        raise ValueError(f"{name} is {record.get(name)!r}, expected a finite number")
    return value


def _mapping(value: object, name: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}, expected an object")
    return value


def _read_samples(path: Path, notes: list[str]) -> tuple[Sample, ...]:
    samples: list[Sample] = []
    for line, record in enumerate(_read_records(path, notes), start=1):
        try:
            samples.append(_sample(record))
        except ValueError as error:
            notes.append(f"{path.name}: record {line} left out: {error}")
    return tuple(samples)


def _sample(record: Record) -> Sample:
    token = _list(record, "token")
    numbers = {
        name: tuple(_entry(name, value) for value in _list(record, name))
        for name in ("advantage", "logprob", "teacher_logprob")
    }
    lengths = {"token": len(token)} | {name: len(values) for name, values in numbers.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"token fields differ in length: {lengths}")
    is_correct = record.get("is_correct")
    return Sample(
        step=int(_required(record, "step")),
        modality=str(record.get("modality", "")),
        task=str(record.get("task", "")),
        prompt=str(record.get("prompt", "")),
        reference=str(record.get("reference", "")),
        is_correct=is_correct if isinstance(is_correct, bool) else None,
        token=tuple(str(word) for word in token),
        advantage=numbers["advantage"],
        logprob=numbers["logprob"],
        teacher_logprob=numbers["teacher_logprob"],
    )


def _list(record: Record, name: str) -> list[object]:
    value = record.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a list")
    return value


def _entry(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} holds {value!r}, expected finite numbers")
    return float(value)
