"""xopd.checkpoint: bit-exact round trips, damage found, and SIGKILL at any instant survived."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xopd.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)


def save(directory: Path, step: int, keep: int = 9) -> Path:
    tensors = {"model": {"weight": torch.full((3,), float(step))}}
    return save_checkpoint(directory, step, tensors, {"step": step}, keep)


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensors = {
        "model": {
            "bf16": bits.view(torch.bfloat16),  # every bit pattern: NaNs, infinities, subnormals
            "transposed": torch.arange(6.0).reshape(2, 3).t(),
            "scalar": torch.tensor(1.5, dtype=torch.float64),
            "empty": torch.empty(0, 4),
        },
        "rng": {"cpu": torch.get_rng_state()},
    }
    state = {"step": 40, "nested": {"list": [1, 2.5, None, True, "ü"]}, "small": 5e-324}
    path = save_checkpoint(tmp_path / "new" / "dir", 40, tensors, state, keep=1)
    assert path.name == "step_000040"
    loaded = load_checkpoint(path)
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for stem, entries in tensors.items():
        assert loaded.tensors[stem].keys() == entries.keys()
        for name, expected in entries.items():
            got = loaded.tensors[stem][name]
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert raw(got) == raw(expected)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tied_and_sliced_tensors_are_written_whole(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    entries = {"row": shared[1], "embed": shared, "head": shared, "corner": shared[1:, 2:]}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"m": entries}, {}, keep=1)).tensors["m"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in entries.items())


def test_pruning_keeps_the_newest_of_this_run(tmp_path: Path) -> None:
    save(tmp_path, 90)  # of an earlier run that went further
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert folders(tmp_path) == ["step_000020", "step_000030", "step_000090"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    path = save_checkpoint(tmp_path, 10, {"model": {}}, {"again": True}, keep=1)
    assert load_checkpoint(path).state == {"again": True}
    assert folders(tmp_path) == ["step_000010"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "bit flip in weights": lambda p: flip(p / "model.safetensors"),
    "bit flip in state": lambda p: flip(p / "state.json"),
    "truncated weights": lambda p: os.truncate(p / "model.safetensors", 50),
    "weights deleted": lambda p: (p / "model.safetensors").unlink(),
    "manifest deleted": lambda p: (p / "manifest.json").unlink(),
    "manifest not JSON": lambda p: (p / "manifest.json").write_text("{"),
    "manifest a list": lambda p: (p / "manifest.json").write_text("[]"),
    "manifest empty": lambda p: (p / "manifest.json").write_text('{"format": 1, "step": 20}'),
    "another step's folder": lambda p: p.rename(p.with_name("step_000021")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_the_previous_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    previous = save(tmp_path, 10)
    damage(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == previous
    assert len(caplog.messages) == 1
    assert "skipping a damaged checkpoint" in caplog.text
    newest = max(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=newest.name):
        load_checkpoint(newest)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["files"].pop("model.safetensors")
    (path / "model.safetensors").rename(tmp_path / "model.safetensors")
    manifest["files"]["../model.safetensors"] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(path)


def test_absent_checkpoints(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="manifest"):
        load_checkpoint(tmp_path / "step_000001")
    with pytest.raises(CheckpointError, match="expected a folder named step_NNNNNN"):
        load_checkpoint(tmp_path)


def test_leftovers_of_an_interrupted_save_are_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".tmp_step_000030").mkdir()
    replaced = save(tmp_path, 20)
    replaced.rename(tmp_path / ".replaced_step_000020")  # killed between the two renames
    assert latest_checkpoint(tmp_path) == replaced
    (tmp_path / ".replaced_step_000020").mkdir()  # killed after them
    assert latest_checkpoint(tmp_path) == replaced
    assert folders(tmp_path) == ["step_000020"]


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": (1, 2)}, {1: 2}, {"x": {1, 2}}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, state, keep=1)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, 1, {}, {}, keep=0)
    with pytest.raises(ValueError, match=r"\.\./x"):
        save_checkpoint(tmp_path, 1, {"../x": {}}, {}, keep=1)


def test_a_failed_write_leaves_the_previous_one_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = save(tmp_path, 10)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 20, keep=1)
    monkeypatch.undo()
    assert folders(tmp_path) == ["step_000010"]
    assert latest_checkpoint(tmp_path) == previous


def test_a_failed_replacement_keeps_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 10)
    rename = Path.rename

    def fails_on_the_new_one(source: Path, target: Path) -> Path:
        if source.name.startswith(".tmp_"):
            raise OSError(5, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fails_on_the_new_one)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_checkpoint(tmp_path, 10, {}, {"again": True}, keep=1)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == path
    assert load_checkpoint(path).state == {"step": 10}


def small_optimizer() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    model = torch.nn.Linear(3, 2)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "betas": (0.5, 0.6)}]
    return model, torch.optim.AdamW(groups)


def step(model: torch.nn.Linear, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()


def test_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, optimizer = small_optimizer()
    for _ in range(3):
        step(model, optimizer)
    optim = pack_optimizer(optimizer.state_dict())
    tensors = {"model": model.state_dict(), "optim": optim.tensors}
    path = save_checkpoint(tmp_path, 3, tensors, {"optim": optim.state}, keep=1)
    torch.manual_seed(1)
    step(model, optimizer)
    expected = [raw(p.detach()) for p in model.parameters()]

    loaded = load_checkpoint(path)
    other, other_optimizer = small_optimizer()
    other.load_state_dict(loaded.tensors["model"])
    packed = type(optim)(loaded.tensors["optim"], loaded.state["optim"])
    state_dict = unpack_optimizer(packed)
    assert state_dict["param_groups"][1]["betas"] == (0.5, 0.6)
    other_optimizer.load_state_dict(state_dict)
    torch.manual_seed(1)
    step(other, other_optimizer)
    assert [raw(p.detach()) for p in other.parameters()] == expected


# Imports torch once, then forks a fresh victim for each start step that it reads.
LAUNCHER = """
import os, sys
from pathlib import Path
import torch
from xopd.checkpoint import save_checkpoint

def save_for_ever(step):
    while True:
        tensors = {name: {"x": torch.full((2_000,), float(step))} for name in ("model", "optim")}
        save_checkpoint(Path(sys.argv[1]), step, tensors, {"step": step}, keep=2)
        os.write(1, f"saved {step}\\n".encode())
        step += 1

torch.set_num_threads(1)
for line in sys.stdin:
    victim = os.fork()
    if victim == 0:
        os.write(1, f"victim {os.getpid()}\\n".encode())
        save_for_ever(int(line))
    os.waitpid(victim, 0)
    os.write(1, b"killed 0\\n")
"""


def test_sigkill_at_a_random_time_loses_nothing_acknowledged(tmp_path: Path) -> None:
    # Each victim is killed a random while after its first save; the next one starts from what is
    # found by saving that step again, so the replacement of a folder is exposed to the kill too.
    rng = random.Random(0)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert launcher.stdin is not None and launcher.stdout is not None
    start = interrupted = 0
    for _ in range(12):
        print(start, file=launcher.stdin, flush=True)
        victim = int(launcher.stdout.readline().removeprefix("victim "))
        acknowledged = int(launcher.stdout.readline().removeprefix("saved "))
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(victim, signal.SIGKILL)
        while (line := launcher.stdout.readline()) != "killed 0\n":
            acknowledged = int(line.removeprefix("saved "))
        interrupted += any(path.name.startswith(".") for path in tmp_path.iterdir())
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        loaded = load_checkpoint(latest)
        found = loaded.state["step"]
        assert latest.name == f"step_{found:06d}"
        assert found >= acknowledged >= start
        for entries in loaded.tensors.values():
            assert torch.equal(entries["x"], torch.full((2_000,), float(found)))
        start = found
    launcher.communicate()
    assert interrupted > 0, "no kill hit a save, so the test tested nothing"
