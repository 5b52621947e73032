"""Reads a paired speech/text corpus and refuses what would spoil training without a sound.

The corpus may come from `xopd data synth` or from elsewhere: any folder of parquet shards
``{split}-*.parquet`` with the columns of `xopd.data.synth.SCHEMA`. Audio stands in the row
(``audio.bytes``) or in a file below the folder (``audio.path``). Every clip is decoded and checked
on loading, because a silent or cut clip does not fail later: it only makes the student worse.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import soundfile as sf
from transformers import SequenceFeatureExtractor, WhisperFeatureExtractor

from xopd.data.speech import SAMPLE_RATE_HZ
from xopd.data.synth import MANIFEST_NAME, SCHEMA
from xopd.errors import UserError

DURATION_LIMITS_S: Final = (0.1, 30.0)
"""Shortest and longest clip; 30 s is the window of the Whisper-style audio towers."""
MIN_PEAK: Final = 1e-3
"""A clip whose loudest sample is below this (-60 dB of full scale) counts as silent."""
_DURATION_TOLERANCE_S: Final = 1e-3


class CorpusError(UserError):
    """A corpus folder, row or clip that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class SpokenPrompt:
    """One prompt as speech and as text, with its worked solution and how it was spoken."""

    id: str
    task: str
    text: str
    solution: str
    answer: str
    voice: str
    speaker: str  # "male" or "female"
    speed: str  # "slow" or "fast"
    rate_wpm: int
    pitch: int
    duration_s: float
    word_start_ms: tuple[int, ...]  # one a word of `text`
    audio: bytes  # an encoded file: FLAC, WAV or what else libsndfile reads; 16 kHz mono


def available_splits(folder: Path) -> tuple[str, ...]:
    """Returns the names of the splits that have shards in `folder`, sorted."""
    return tuple(sorted({path.name.rsplit("-", 1)[0] for path in folder.glob("*-*.parquet")}))


def load_corpus(folder: Path, split: str) -> list[SpokenPrompt]:
    """Loads and checks every row of a split, in shard order.

    Args:
        folder: the data root; no file outside it is read, whatever a row or a link says.
        split: for example ``"train"``; see `available_splits`.

    Raises:
        CorpusError: no such split, an unfinished synthesis, a missing column, a repeated id, or a
            row whose audio is not 16 kHz mono speech of 0.1..30 s that matches its duration.
    """
    if split not in available_splits(folder):
        found = ", ".join(available_splits(folder)) or "no shards at all"
        raise CorpusError(
            f"split {split!r} is not in {folder} (found: {found}); "
            f"make it with: xopd data synth --out {folder}"
        )
    prompts: list[SpokenPrompt] = []
    for shard in sorted(folder.glob(f"{split}-*.parquet")):
        table = pq.read_table(_inside(folder, shard.name, shard.name))
        lacking = [name for name in SCHEMA.names if name not in table.column_names]
        if lacking:
            raise CorpusError(f"{shard} lacks the columns {', '.join(lacking)}; add them")
        prompts.extend(_prompt(folder, row) for row in table.select(SCHEMA.names).to_pylist())
    _check_whole(folder, split, len(prompts))
    _check_unique([prompt.id for prompt in prompts])
    return prompts


def decode_audio(prompt: SpokenPrompt) -> npt.NDArray[np.float32]:
    """Decodes a clip and checks it.

    Returns:
        Samples in -1..1, float32 [samples], 16 kHz mono.

    Raises:
        CorpusError: see `load_corpus`.
    """
    where = f"row {prompt.id!r}"
    try:
        with sf.SoundFile(io.BytesIO(prompt.audio)) as file:
            rate_hz, channels, header_samples = file.samplerate, file.channels, file.frames
            promised_s, longest_s = header_samples / rate_hz, DURATION_LIMITS_S[1]
            if promised_s > longest_s:
                # Refused before it is decoded: a small file can promise hours of silence.
                raise CorpusError(
                    f"{where}: the clip lasts {promised_s:.3f} s; cut it to at most {longest_s} s"
                )
            samples = file.read(dtype="float32", always_2d=True)[:, 0]
    except sf.LibsndfileError as error:
        raise CorpusError(
            f"{where}: the audio does not decode ({error}); store it as 16 kHz mono FLAC or WAV"
        ) from error
    if rate_hz != SAMPLE_RATE_HZ or channels != 1:
        raise CorpusError(
            f"{where}: the audio has {rate_hz} Hz and {channels} channels; "
            f"resample it to {SAMPLE_RATE_HZ} Hz mono"
        )
    if len(samples) != header_samples:
        raise CorpusError(
            f"{where}: the header promises {header_samples} samples and {len(samples)} are there; "
            "the file is cut, write it again"
        )
    waveform: npt.NDArray[np.float32] = samples
    _check_samples(where, waveform, prompt.duration_s)
    return waveform


def log_mel(
    waveforms: Sequence[npt.NDArray[np.float32]], feature_extractor: SequenceFeatureExtractor
) -> list[npt.NDArray[np.float32]]:
    """Computes log-mel features, each clip at its true length.

    The extractor is Whisper's: 25 ms Hann window, hop 160 samples (10 ms), log10 of the mel power
    clamped to 8 below the clip's maximum, then (x + 4) / 4. Clips go one by one and unpadded, so
    that no clip's features depend on its neighbours in a batch.

    Args:
        waveforms: clips, float32 [samples], 16 kHz.
        feature_extractor: a `WhisperFeatureExtractor`; its `feature_size` is n_mels.

    Returns:
        float32 [n_mels, samples // 160] for each clip.

    Raises:
        TypeError: the extractor is not Whisper's.
        ValueError: the extractor works at another rate than 16 kHz.
    """
    if not isinstance(feature_extractor, WhisperFeatureExtractor):
        raise TypeError(
            f"feature_extractor is a {type(feature_extractor).__name__}; "
            "use a model whose audio tower reads a WhisperFeatureExtractor"
        )
    if feature_extractor.sampling_rate != SAMPLE_RATE_HZ:
        raise ValueError(
            f"feature_extractor.sampling_rate is {feature_extractor.sampling_rate}; "
            f"use an extractor for {SAMPLE_RATE_HZ} Hz"
        )
    return [_clip_features(waveform, feature_extractor) for waveform in waveforms]


def _clip_features(
    waveform: npt.NDArray[np.float32], feature_extractor: WhisperFeatureExtractor
) -> npt.NDArray[np.float32]:
    batch = feature_extractor(
        waveform,
        sampling_rate=SAMPLE_RATE_HZ,
        padding="do_not_pad",
        truncation=False,
        return_tensors="np",
    )
    return np.asarray(batch["input_features"][0], dtype=np.float32)


def _prompt(folder: Path, row: Mapping[str, Any]) -> SpokenPrompt:
    where = f"row {row['id']!r}"
    empty = [name for name in SCHEMA.names if row[name] is None]
    if empty:
        raise CorpusError(f"{where}: {', '.join(empty)} is null; fill it or drop the row")
    audio = row["audio"]["bytes"]
    if audio is None:
        audio = _inside(folder, row["audio"]["path"] or "", where).read_bytes()
    fields = {name: row[name] for name in SCHEMA.names if name not in ("word_start_ms", "audio")}
    prompt = SpokenPrompt(**fields, word_start_ms=tuple(row["word_start_ms"]), audio=audio)
    words = len(prompt.text.split())
    if words == 0 or len(prompt.word_start_ms) != words:
        raise CorpusError(
            f"{where}: text has {words} words and word_start_ms has {len(prompt.word_start_ms)} "
            "entries; give one start a word"
        )
    decode_audio(prompt)
    return prompt


def _inside(folder: Path, name: str, where: str) -> Path:
    """Resolves a file name of the corpus and refuses one that leads out of its folder."""
    relative = PurePosixPath(name)
    path = (folder / relative).resolve()
    if (
        not name
        or relative.is_absolute()
        or ".." in relative.parts
        or not path.is_relative_to(folder.resolve())
    ):
        raise CorpusError(
            f"{where}: path {name!r} is empty or leads out of {folder}; "
            "put the file below that folder and give its path from there"
        )
    if not path.is_file():
        raise CorpusError(f"{where}: there is no file {path}; restore it or drop the row")
    return path


def _check_samples(where: str, samples: npt.NDArray[np.float32], duration_s: float) -> None:
    actual_s = len(samples) / SAMPLE_RATE_HZ
    shortest_s, longest_s = DURATION_LIMITS_S
    if not shortest_s <= actual_s <= longest_s:
        raise CorpusError(
            f"{where}: the clip lasts {actual_s:.3f} s; "
            f"drop it or cut it to {shortest_s}..{longest_s} s"
        )
    if not abs(actual_s - duration_s) <= _DURATION_TOLERANCE_S:  # also refuses a NaN duration
        raise CorpusError(
            f"{where}: duration_s is {duration_s} and the clip lasts {actual_s:.4f} s; "
            "the row and its audio do not belong together or the file is cut"
        )
    if not np.isfinite(samples).all():
        raise CorpusError(f"{where}: the audio has NaN or infinite samples; write it again")
    peak = float(np.abs(samples).max())
    if peak < MIN_PEAK:
        raise CorpusError(f"{where}: the clip is silent (peak {peak:.1e}); drop the row")


def _check_unique(ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise CorpusError(f"row {name!r} occurs twice; give every row an id of its own")
        seen.add(name)


def _check_whole(folder: Path, split: str, rows: int) -> None:
    """Refuses a split of which an interrupted synthesis made only some shards."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return  # a corpus that was not made by xopd data synth
    size = json.loads(path.read_bytes())["sizes"].get(split)
    if size is not None and size != rows:
        raise CorpusError(
            f"split {split!r} in {folder} has {rows} of {size} rows: its synthesis was "
            "interrupted; run the same xopd data synth command again to complete it"
        )
