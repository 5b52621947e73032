"""Synthesises the spoken-instruction corpus as parquet shards: repeatable, resumable, atomic.

A row is a function of (split, seed, index), and a shard of its rows, so the same call with
the same package versions gives the same bytes. ``manifest.json`` holds a content key and a SHA-256
of each finished shard: a killed run continues behind the last finished shard, a damaged shard is
made again, and a finished corpus is only checked.
"""

import hashlib
import io
import json
import multiprocessing
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xopd.data.speech import (
    FAST_WPM,
    HELD_OUT_VOICES,
    PITCH_RANGE,
    SAMPLE_RATE_HZ,
    SLOW_WPM,
    TRAINING_VOICES,
    Speed,
    Synthesizer,
    Utterance,
    Voice,
    engine_version,
)
from xopd.data.world import Problem, PromptSplit, draw
from xopd.files import write_atomically

SplitName = Literal["align", "train", "dev", "test", "test_heldout_voice"]

DEFAULT_SIZES: Final[Mapping[SplitName, int]] = MappingProxyType(
    {"align": 3000, "train": 1600, "dev": 200, "test": 400, "test_heldout_voice": 200}
)
"""Utterances in each split; `align` pre-trains the base student and shares train's prompts."""

MANIFEST_NAME: Final = "manifest.json"
SHARD_ROWS: Final = 200
_FORMAT: Final = 1


class _SplitSource(NamedTuple):
    prompts: PromptSplit
    voices: tuple[Voice, ...]


_SOURCES: Final[Mapping[SplitName, _SplitSource]] = MappingProxyType(
    {
        "align": _SplitSource("train", TRAINING_VOICES),
        "train": _SplitSource("train", TRAINING_VOICES),
        "dev": _SplitSource("dev", TRAINING_VOICES),
        "test": _SplitSource("test", TRAINING_VOICES),
        "test_heldout_voice": _SplitSource("test", HELD_OUT_VOICES),
    }
)

# The features in the form that Hugging Face datasets reads from a parquet file's metadata.
_COLUMNS: Final[Mapping[str, tuple[pa.DataType, dict[str, Any]]]] = MappingProxyType(
    {
        **{
            name: (pa.string(), {"dtype": "string", "_type": "Value"})
            for name in ("id", "task", "text", "solution", "answer", "voice", "speaker", "speed")
        },
        "rate_wpm": (pa.int32(), {"dtype": "int32", "_type": "Value"}),
        "pitch": (pa.int32(), {"dtype": "int32", "_type": "Value"}),
        "duration_s": (pa.float64(), {"dtype": "float64", "_type": "Value"}),
        "word_start_ms": (
            pa.list_(pa.int32()),
            {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
        ),
        "audio": (
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            {"sampling_rate": SAMPLE_RATE_HZ, "_type": "Audio"},
        ),
    }
)
SCHEMA: Final = pa.schema(
    [(name, column[0]) for name, column in _COLUMNS.items()],
    metadata={
        "huggingface": json.dumps(
            {"info": {"features": {name: column[1] for name, column in _COLUMNS.items()}}}
        )
    },
)
"""Columns of a shard; `audio.bytes` is a 16 kHz mono 16-bit FLAC file."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """All that decides one row of the corpus."""

    id: str
    problem: Problem
    voice: Voice
    speed: Speed
    rate_wpm: int
    pitch: int


class SynthSummary(NamedTuple):
    """What a call of `synthesize` made and found."""

    rows: int
    audio_s: float
    made_shards: int
    reused_shards: int


class _Shard(NamedTuple):
    name: str
    key: str
    rows: tuple[PlannedRow, ...]


class _ShardRecord(NamedTuple):
    key: str
    sha256: str
    rows: int
    audio_s: float


def plan_split(split: SplitName, size: int, seed: int) -> tuple[PlannedRow, ...]:
    """Plans `size` rows of a split without a repeated prompt; a larger size only appends rows.

    Voices take turns and slow and fast speech alternate pseudo-randomly, all from `seed`.

    Raises:
        ValueError: `split` is unknown or `size` is negative.
    """
    if split not in _SOURCES:
        raise ValueError(f"split is {split!r}; use one of {', '.join(_SOURCES)}")
    if size < 0:
        raise ValueError(f"size of split {split!r} is {size}; give 0 or more")
    source = _SOURCES[split]
    rng = random.Random(f"xopd {split} {seed}")
    seen: set[str] = set()
    rows: list[PlannedRow] = []
    while len(rows) < size:
        problem = draw(rng, split=source.prompts)
        if problem.text in seen:
            continue
        seen.add(problem.text)
        fast = rng.random() < 0.5
        rows.append(
            PlannedRow(
                id=f"{split}-{len(rows):06d}",
                problem=problem,
                voice=source.voices[len(rows) % len(source.voices)],
                speed="fast" if fast else "slow",
                rate_wpm=rng.randint(*(FAST_WPM if fast else SLOW_WPM)),
                pitch=rng.randint(*PITCH_RANGE),
            )
        )
    return tuple(rows)


def synthesize(
    out_dir: Path,
    *,
    sizes: Mapping[SplitName, int] = DEFAULT_SIZES,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> SynthSummary:
    """Writes the corpus below `out_dir`, or completes the one that is there.

    Args:
        out_dir: made when missing; shards are ``{split}-{number:05d}.parquet``.
        sizes: utterances in each split. A split left out is not made, and its shards from an
            earlier call are deleted: the folder always holds the corpus of the latest call.
        seed: chooses prompts and speech; which split a prompt belongs to does not depend on it.
        workers: processes that synthesise; 1 works in this process.
        progress: show a progress bar on the terminal.

    Raises:
        ValueError: `sizes`, or `workers` < 1.
        OSError: the folder cannot be written.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more")
    shards = [shard for split, size in sizes.items() for shard in _shards(split, size, seed)]
    out_dir.mkdir(parents=True, exist_ok=True)
    known = _read_manifest(out_dir)
    done = {
        shard.name: known[shard.name]
        for shard in shards
        if shard.name in known and _is_intact(out_dir, shard, known[shard.name])
    }
    reused = len(done)
    missing = [shard for shard in shards if shard.name not in done]
    _delete_stale(out_dir, known.keys() - {shard.name for shard in shards})
    _write_manifest(out_dir, sizes, seed, done)
    with _progress_bar(progress) as bar:
        total = sum(len(shard.rows) for shard in shards)
        task = bar.add_task("speech", total=total, completed=sum(r.rows for r in done.values()))
        for name, record in _make_shards(out_dir, missing, workers):
            done[name] = record
            _write_manifest(out_dir, sizes, seed, done)
            bar.advance(task, record.rows)
    return SynthSummary(
        rows=sum(record.rows for record in done.values()),
        audio_s=sum(record.audio_s for record in done.values()),
        made_shards=len(missing),
        reused_shards=reused,
    )


def _shards(split: SplitName, size: int, seed: int) -> Iterator[_Shard]:
    rows = plan_split(split, size, seed)
    for number, start in enumerate(range(0, size, SHARD_ROWS)):
        part = rows[start : start + SHARD_ROWS]
        yield _Shard(f"{split}-{number:05d}.parquet", _content_key(part), part)


def _content_key(rows: tuple[PlannedRow, ...]) -> str:
    """Hash of all that decides a shard's bytes: format, package versions and planned rows."""
    content = {
        "format": _FORMAT,
        "packages": f"{engine_version()} soundfile={version('soundfile')} pyarrow={pa.__version__}",
        "libsndfile": sf.__libsndfile_version__,
        "rows": [asdict(row) for row in rows],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _make_shards(
    out_dir: Path, shards: list[_Shard], workers: int
) -> Iterator[tuple[str, _ShardRecord]]:
    if workers == 1 or len(shards) <= 1:
        for shard in shards:
            yield shard.name, _make_shard(out_dir, shard)
        return
    # Spawned, because a fork copies the locks of whatever threads the caller has running.
    context = multiprocessing.get_context("spawn")
    count = min(workers, len(shards))
    with ProcessPoolExecutor(max_workers=count, mp_context=context) as pool:
        names: dict[Future[_ShardRecord], str] = {
            pool.submit(_make_shard, out_dir, shard): shard.name for shard in shards
        }
        try:
            for future in as_completed(names):
                yield names[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_shard(out_dir: Path, shard: _Shard) -> _ShardRecord:
    synthesizer = Synthesizer()
    rows: list[dict[str, Any]] = []
    for planned in shard.rows:
        speech = synthesizer.say(
            planned.problem.text, planned.voice, planned.rate_wpm, planned.pitch
        )
        rows.append(_row(planned, speech))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="NONE")
    data = buffer.getvalue()
    write_atomically(out_dir / shard.name, data)
    audio_s = sum(row["duration_s"] for row in rows)
    return _ShardRecord(shard.key, hashlib.sha256(data).hexdigest(), len(rows), audio_s)


def _row(planned: PlannedRow, speech: Utterance) -> dict[str, Any]:
    buffer = io.BytesIO()
    sf.write(buffer, speech.waveform, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return {
        "id": planned.id,
        "task": planned.problem.task,
        "text": planned.problem.text,
        "solution": planned.problem.solution,
        "answer": planned.problem.answer,
        "voice": planned.voice.name,
        "speaker": planned.voice.speaker,
        "speed": planned.speed,
        "rate_wpm": planned.rate_wpm,
        "pitch": planned.pitch,
        "duration_s": len(speech.waveform) / SAMPLE_RATE_HZ,
        "word_start_ms": list(speech.word_start_ms),
        "audio": {"bytes": buffer.getvalue(), "path": f"{planned.id}.flac"},
    }


def _read_manifest(out_dir: Path) -> dict[str, _ShardRecord]:
    path = out_dir / MANIFEST_NAME
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            return {}  # another format: every shard is made again
        return {name: _ShardRecord(**record) for name, record in content["shards"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a manifest of this program ({error}); "
            "delete it to make the corpus again"
        ) from error


def _write_manifest(
    out_dir: Path,
    sizes: Mapping[SplitName, int],
    seed: int,
    shards: Mapping[str, _ShardRecord],
) -> None:
    content = {
        "format": _FORMAT,
        "seed": seed,
        "sizes": dict(sizes),
        "shards": {name: shards[name]._asdict() for name in sorted(shards)},
    }
    data = json.dumps(content, indent=1).encode() + b"\n"
    write_atomically(out_dir / MANIFEST_NAME, data)


def _is_intact(out_dir: Path, shard: _Shard, record: _ShardRecord) -> bool:
    path = out_dir / shard.name
    if record.key != shard.key or not path.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256


def _delete_stale(out_dir: Path, names: set[str]) -> None:
    """Deletes shards of an earlier call and temporary files that a killed one left."""
    for name in names:
        if Path(name).name == name:  # a manifest is data: it may not name a path elsewhere
            (out_dir / name).unlink(missing_ok=True)
    for leftover in out_dir.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), disable=not shown)
