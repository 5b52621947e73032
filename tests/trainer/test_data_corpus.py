"""Reading a corpus: what is loaded is what was made, and bad rows are named and refused."""

import argparse
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

from xopd.data import synth
from xopd.data.cli import add_data_parser, run_data
from xopd.data.corpus import (
    CorpusError,
    SpokenPrompt,
    available_splits,
    decode_audio,
    load_corpus,
    log_mel,
)
from xopd.data.synth import SCHEMA, plan_split, synthesize

RATE_HZ = 16_000


def tone(seconds: float = 0.5, rate_hz: int = RATE_HZ) -> npt.NDArray[np.float32]:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.3 * np.sin(2 * np.pi * 220 * time_s)).astype(np.float32)


def wav(samples: npt.NDArray[np.float32], rate_hz: int = RATE_HZ) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate_hz, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    return {
        "id": "row-7",
        "task": "calc",
        "text": "add one",
        "solution": "so answer one",
        "answer": "one",
        "voice": "x",
        "speaker": "male",
        "speed": "slow",
        "rate_wpm": 200,
        "pitch": 50,
        "duration_s": 0.5,
        "word_start_ms": [0, 200],
        "audio": {"bytes": wav(tone()), "path": None},
        **changes,
    }


def load_rows(folder: Path, *rows: dict[str, Any]) -> list[SpokenPrompt]:
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    pq.write_table(table, folder / "train-00000.parquet")
    return load_corpus(folder, "train")


def audio(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def test_what_is_loaded_is_what_was_planned(tmp_path: Path) -> None:
    synthesize(tmp_path, sizes={"dev": 6}, seed=3, workers=1, progress=False)
    assert available_splits(tmp_path) == ("dev",)
    loaded = load_corpus(tmp_path, "dev")
    for prompt, planned in zip(loaded, plan_split("dev", 6, 3), strict=True):
        assert (prompt.id, prompt.text) == (planned.id, planned.problem.text)
        assert (prompt.solution, prompt.answer) == (
            planned.problem.solution,
            planned.problem.answer,
        )
        assert (prompt.voice, prompt.speaker) == (planned.voice.name, planned.voice.speaker)
        assert (prompt.speed, prompt.rate_wpm) == (planned.speed, planned.rate_wpm)
        samples = decode_audio(prompt)
        assert samples.dtype == np.float32
        assert len(samples) / RATE_HZ == prompt.duration_s
        assert len(prompt.word_start_ms) == len(prompt.text.split())
        assert all(a < b for a, b in itertools.pairwise(prompt.word_start_ms))


def test_a_good_row_is_loaded_with_its_samples(tmp_path: Path) -> None:
    (prompt,) = load_rows(tmp_path, row())
    np.testing.assert_array_equal(decode_audio(prompt), tone())


NAN = tone()
NAN[7] = np.nan
BAD_ROWS = {
    "rate": (row(audio=audio(wav(tone(rate_hz=8000), 8000))), "8000 Hz and 1 channels"),
    "stereo": (row(audio=audio(wav(np.stack([tone(), tone()], 1)))), "2 channels"),
    "garbage": (row(audio=audio(b"RIFF nothing")), "does not decode"),
    "cut": (row(audio=audio(wav(tone())[:9000])), "cut"),
    "wrong clip": (row(duration_s=0.7), "duration_s is 0.7"),
    "no duration": (row(duration_s=float("nan")), "duration_s is nan"),
    "short": (row(duration_s=0.05, audio=audio(wav(tone(0.05)))), r"0\.050 s"),
    "long": (row(duration_s=31.0, audio=audio(wav(tone(31)))), r"31\.000 s"),
    "nan": (row(audio=audio(wav(NAN))), "NaN or infinite"),
    "silent": (row(audio=audio(wav(tone() * 1e-5))), "silent"),
    "empty": (row(duration_s=0.0, audio=audio(wav(tone(0)))), r"0\.000 s"),
    "null": (row(answer=None), "answer is null"),
    "timings": (row(word_start_ms=[0]), "2 words and word_start_ms has 1"),
    "no audio": (row(audio=audio(None)), "path '' is empty"),
    "absolute": (row(audio=audio(None, "/etc/hostname")), "leads out"),
    "parent": (row(audio=audio(None, "a/../../b.wav")), "leads out"),
    "missing": (row(audio=audio(None, "gone.wav")), "there is no file"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_by_name(tmp_path: Path, case: str) -> None:
    bad, message = BAD_ROWS[case]
    with pytest.raises(CorpusError, match=message) as caught:
        load_rows(tmp_path, row(id="fine"), bad)
    assert "'row-7'" in str(caught.value)


def test_audio_files_are_read_below_the_folder_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "clips").mkdir(parents=True)
    (root / "clips" / "a.wav").write_bytes(wav(tone()))
    (tmp_path / "outside.wav").write_bytes(wav(tone()))
    (prompt,) = load_rows(root, row(audio=audio(None, "clips/a.wav")))
    assert len(decode_audio(prompt)) == 8000
    (root / "link.wav").symlink_to(tmp_path / "outside.wav")
    with pytest.raises(CorpusError, match="leads out"):
        load_rows(root, row(audio=audio(None, "link.wav")))


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="occurs twice"):
        load_rows(tmp_path, row(), row())


def test_an_unknown_split_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no shards at all"):
        load_corpus(tmp_path, "train")
    load_rows(tmp_path, row())
    with pytest.raises(CorpusError, match=r"found: train.*xopd data synth"):
        load_corpus(tmp_path, "test")


def test_missing_columns_are_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row()], schema=SCHEMA).drop_columns(["answer", "pitch"])
    pq.write_table(table, tmp_path / "train-00000.parquet")
    with pytest.raises(CorpusError, match="lacks the columns answer, pitch"):
        load_corpus(tmp_path, "train")


def test_an_interrupted_synthesis_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "SHARD_ROWS", 2)
    synthesize(tmp_path, sizes={"train": 4}, workers=1, progress=False)
    (tmp_path / "train-00001.parquet").unlink()
    with pytest.raises(CorpusError, match="2 of 4 rows"):
        load_corpus(tmp_path, "train")


def test_log_mel_has_true_length_and_ignores_neighbours() -> None:
    extractor = WhisperFeatureExtractor(feature_size=64)
    clips = [tone(0.5), np.tile(tone(0.37), 3)]
    features = log_mel(clips, extractor)
    for clip, feature in zip(clips, features, strict=True):
        assert feature.shape == (64, len(clip) // 160)
        assert feature.dtype == np.float32
        assert np.isfinite(feature).all()
        np.testing.assert_array_equal(log_mel([clip], extractor)[0], feature)
    # A 220 Hz tone is loudest in one of the lowest mel bands.
    assert features[0].mean(1).argmax() < 8


def test_log_mel_follows_its_formula() -> None:
    extractor = WhisperFeatureExtractor(feature_size=64)
    clip = np.random.default_rng(0).normal(0, 0.1, 4000).astype(np.float32)
    padded = np.pad(clip.astype(np.float64), 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[t : t + 400] * window for t in range(0, len(clip), 160)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    log = np.log10(np.maximum(extractor.mel_filters.T @ power.T, 1e-10))
    expected = (np.maximum(log, log.max() - 8) + 4) / 4
    np.testing.assert_allclose(log_mel([clip], extractor)[0], expected[:, :25], atol=1e-4)


def test_log_mel_refuses_another_extractor() -> None:
    with pytest.raises(TypeError, match="ClapFeatureExtractor"):
        log_mel([tone()], ClapFeatureExtractor())
    with pytest.raises(ValueError, match="24000"):
        log_mel([tone()], WhisperFeatureExtractor(feature_size=64, sampling_rate=24_000))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_data_parser(parser.add_subparsers())
    small = "--align 0 --train 2 --dev 1 --test 1 --test-heldout-voice 1 --workers 1 --quiet"
    args = parser.parse_args(["data", "synth", "--out", str(tmp_path), *small.split()])
    assert run_data(args) == 0
    assert "5 clips" in capsys.readouterr().out
    sizes = json.loads((tmp_path / "manifest.json").read_bytes())["sizes"]
    assert sizes == {"align": 0, "train": 2, "dev": 1, "test": 1, "test_heldout_voice": 1}
    with pytest.raises(SystemExit):
        parser.parse_args(["data", "synth", "--help"])
    assert "examples:" in capsys.readouterr().out
