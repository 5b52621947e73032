"""Synthesis of the corpus: the same bytes, resumed after damage and after a kill, and readable."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import soundfile as sf

from xopd.data import synth
from xopd.data.speech import HELD_OUT_VOICES, TRAINING_VOICES
from xopd.data.synth import MANIFEST_NAME, SplitName, SynthSummary, plan_split, synthesize
from xopd.data.world import split_of
from xopd.files import write_atomically

SIZES: dict[SplitName, int] = {"train": 10, "dev": 3, "test": 3, "test_heldout_voice": 4}
ROWS = sum(SIZES.values())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "SHARD_ROWS", 4)


def make(folder: Path, *, seed: int = 0, workers: int = 1) -> SynthSummary:
    return synthesize(folder, sizes=SIZES, seed=seed, workers=workers, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "SHARD_ROWS", 4)
        make(folder)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    for name, data in contents(made).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_two_processes_give_the_same_bytes_as_one(made: Path, tmp_path: Path) -> None:
    summary = make(tmp_path, workers=2)
    assert summary.rows == ROWS
    assert summary.made_shards == 6
    assert contents(tmp_path) == contents(made)


def test_another_seed_gives_other_prompts() -> None:
    texts = [{row.problem.text for row in plan_split("train", 50, seed)} for seed in (0, 1)]
    assert len(texts[0] & texts[1]) < 5


def test_a_finished_corpus_is_left_alone(copy: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.parquet")}
    summary = make(copy)
    assert (summary.made_shards, summary.reused_shards, summary.rows) == (0, 6, ROWS)
    assert {path.name: path.stat().st_mtime_ns for path in copy.glob("*.parquet")} == before


def test_missing_and_damaged_shards_are_made_again(copy: Path, made: Path) -> None:
    (copy / "dev-00000.parquet").unlink()
    damaged = bytearray((copy / "train-00001.parquet").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy / "train-00001.parquet").write_bytes(damaged)
    summary = make(copy)
    assert (summary.made_shards, summary.reused_shards) == (2, 4)
    assert contents(copy) == contents(made)


def test_another_seed_replaces_every_shard(copy: Path, made: Path) -> None:
    assert make(copy, seed=1).reused_shards == 0
    assert contents(copy).keys() == contents(made).keys()


def test_shards_of_splits_left_out_are_deleted(copy: Path) -> None:
    synthesize(copy, sizes={"train": 4}, workers=1, progress=False)
    assert sorted(contents(copy)) == [MANIFEST_NAME, "train-00000.parquet"]


def test_a_manifest_cannot_delete_outside_the_folder(copy: Path) -> None:
    victim = copy.parent / "victim.parquet"
    victim.write_bytes(b"mine")
    manifest = json.loads((copy / MANIFEST_NAME).read_bytes())
    manifest["shards"]["../victim.parquet"] = next(iter(manifest["shards"].values()))
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    make(copy)
    assert victim.read_bytes() == b"mine"


def test_a_damaged_manifest_is_refused(copy: Path) -> None:
    (copy / MANIFEST_NAME).write_text("{")
    with pytest.raises(ValueError, match="delete it"):
        make(copy)


def test_a_killed_run_continues(tmp_path: Path) -> None:
    sizes = {"train": 160}
    program = (
        "import sys; from pathlib import Path; from xopd.data import synth; synth.SHARD_ROWS = 4\n"
        f"synth.synthesize(Path(sys.argv[1]), sizes={sizes}, workers=1, progress=False)"
    )
    root = str(Path(synth.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": root}
    )
    try:
        deadline_s = time.monotonic() + 30
        while len(list(tmp_path.glob("*.parquet"))) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = len(list(tmp_path.glob("*.parquet")))
    assert 2 <= left < 40
    (tmp_path / ".train-00039.parquet.1.tmp").write_bytes(b"half a shard")
    summary = synthesize(tmp_path, sizes={"train": 160}, workers=1, progress=False)
    # At most the shard in work is lost: it may lie there without an entry in the manifest.
    assert left - 1 <= summary.reused_shards <= left
    assert summary.reused_shards + summary.made_shards == 40
    assert not list(tmp_path.glob(".*"))
    manifest = json.loads((tmp_path / MANIFEST_NAME).read_bytes())
    assert len(manifest["shards"]) == 40


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_plan_draws_each_split_from_its_own_prompts_and_voices() -> None:
    rows = {split: plan_split(split, 80, 0) for split in synth.DEFAULT_SIZES}
    for split, planned in rows.items():
        prompts = {"align": "train", "test_heldout_voice": "test"}.get(split, split)
        assert {split_of(row.problem.text) for row in planned} == {prompts}
        voices = HELD_OUT_VOICES if split == "test_heldout_voice" else TRAINING_VOICES
        assert {row.voice for row in planned} == set(voices)
        assert 0.3 < sum(row.speed == "fast" for row in planned) / 80 < 0.7
    many = plan_split("dev", 400, 0)  # the smallest pool, where repeats are drawn for certain
    assert len({row.problem.text for row in many}) == 400
    assert plan_split("train", 20, 0) == rows["train"][:20]  # a larger corpus only adds rows


@pytest.mark.parametrize(
    ("sizes", "workers", "message"),
    [({"trian": 3}, 1, "use one of"), ({"train": -1}, 1, "0 or more"), ({"train": 1}, 0, "1 or")],
)
def test_bad_arguments_are_refused(
    tmp_path: Path, sizes: dict[SplitName, int], workers: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path, sizes=sizes, workers=workers, progress=False)


def test_hugging_face_datasets_reads_the_audio(made: Path, tmp_path: Path) -> None:
    files = {"train": str(made / "train-*.parquet")}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))["train"]
    feature = loaded.features["audio"]
    assert isinstance(feature, datasets.Audio)
    assert feature.sampling_rate == 16_000
    assert loaded.features["word_start_ms"] == datasets.List(datasets.Value("int32"))
    # Decoding by datasets itself would need torchcodec and FFmpeg.
    plain = loaded.cast_column("audio", datasets.Audio(sampling_rate=16_000, decode=False))
    assert plain.num_rows == 10
    for row in plain:
        info = sf.info(io.BytesIO(row["audio"]["bytes"]))
        assert (info.format, info.subtype) == ("FLAC", "PCM_16")
        assert (info.samplerate, info.channels) == (16_000, 1)
        assert row["duration_s"] == info.frames / 16_000
        assert row["audio"]["path"] == f"{row['id']}.flac"
