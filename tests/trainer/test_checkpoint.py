"""xopd.checkpoint: bit-exact round trips, damage found, and SIGKILL at any instant survived."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xopd.checkpoint import Checkpoints, load_checkpoint, verified
from xopd.manifest import CheckpointError
from xopd.optimizer import build_optimizer, moments, set_updates_made, updates_made
from xopd.ranks import ALONE
from xopd.sections import OptimConfig

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def save_these(
    directory: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 9
) -> Path:
    checkpoints = Checkpoints(directory, ALONE, keep=keep)
    try:
        checkpoints.save(step, tensors, state)
        checkpoints.finish()
    finally:
        checkpoints.close()
    return directory / f"step_{step:06d}"


def save(directory: Path, step: int, keep: int = 9) -> Path:
    return save_these(
        directory, step, {"weight": torch.full((3,), float(step))}, {"step": step}, keep
    )


def load(path: Path, like: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint; `like` says what it should hold."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    return tensors, load_checkpoint(verified(path, ALONE), tensors, ALONE)


def latest(directory: Path) -> Path | None:
    found = Checkpoints(directory, ALONE, keep=1).latest()
    return None if found is None else found.path


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensors = {
        "bf16": bits.view(torch.bfloat16),  # every bit pattern: NaNs, infinities, subnormals
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "integers": torch.arange(-3, 3),
    }
    state = {"step": 40, "nested": {"list": [1, 2.5, None, True, "ü"]}, "small": 5e-324}
    path = save_these(tmp_path / "new" / "dir", 40, tensors, state, keep=1)
    assert path.name == "step_000040"
    found, found_state = load(path, tensors)
    assert found_state == state
    for name, expected in tensors.items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert raw(found[name]) == raw(expected)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tied_and_sliced_tensors_are_written_whole(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    entries = {"row": shared[1], "embed": shared, "head": shared, "corner": shared[1:, 2:]}
    found, _ = load(save_these(tmp_path, 1, entries, {}), entries)
    assert all(torch.equal(found[name], tensor) for name, tensor in entries.items())


def test_tensors_may_change_while_they_are_written(tmp_path: Path) -> None:
    weight = torch.arange(300_000.0)
    expected = weight.clone()
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.save(1, {"weight": weight}, {})
    weight.fill_(-1.0)
    assert folders(tmp_path) == [".tmp_step_000001"]  # not published before it is whole
    checkpoints.finish()
    found, _ = load(tmp_path / "step_000001", {"weight": weight})
    assert torch.equal(found["weight"], expected)
    checkpoints.close()


def test_poll_publishes_what_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.poll()
    checkpoints.save(1, {"weight": torch.ones(3)}, {})
    deadline_s = time.monotonic() + 30
    while folders(tmp_path) != ["step_000001"]:
        assert time.monotonic() < deadline_s
        checkpoints.poll()
    checkpoints.close()


def test_pruning_keeps_the_newest_of_this_run(tmp_path: Path) -> None:
    save(tmp_path, 90)  # of an earlier run that went further
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert folders(tmp_path) == ["step_000020", "step_000030", "step_000090"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    other = {"other": torch.ones(2)}
    path = save_these(tmp_path, 10, other, {"again": True})
    assert load(path, other)[1] == {"again": True}
    assert folders(tmp_path) == ["step_000010"]


@pytest.mark.parametrize(
    "like",
    [
        {"weight": torch.ones(4)},
        {"weight": torch.ones(3, dtype=torch.bfloat16)},
        {"weights": torch.ones(3)},
        {"weight": torch.ones(3), "bias": torch.ones(1)},
    ],
    ids=["shape", "dtype", "name", "one more"],
)
def test_another_model_is_refused(tmp_path: Path, like: dict[str, Tensor]) -> None:
    path = save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="holds other parameters than this model"):
        load(path, like)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "bit flip in weights": lambda p: flip(p / SHARD),
    "bit flip in state": lambda p: flip(p / "state.json"),
    "truncated weights": lambda p: os.truncate(p / SHARD, 50),
    "weights deleted": lambda p: (p / SHARD).unlink(),
    "manifest deleted": lambda p: (p / "manifest.json").unlink(),
    "manifest not JSON": lambda p: (p / "manifest.json").write_text("{"),
    "manifest a list": lambda p: (p / "manifest.json").write_text("[]"),
    "manifest empty": lambda p: (p / "manifest.json").write_text('{"format": 2, "step": 20}'),
    "a dtype changed": lambda p: replace_text(p / "manifest.json", "float32", "float64"),
    "a shard more": lambda p: shutil.copy(p / SHARD, p / "shard-00002-model.safetensors"),
    "another step's folder": lambda p: p.rename(p.with_name("step_000021")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_the_previous_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    previous = save(tmp_path, 10)
    damage(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == previous
    (said,) = [r.getMessage() for r in caplog.records if r.name == "xopd.checkpoint"]
    assert "skipping a damaged checkpoint" in said
    newest = max(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=newest.name):
        verified(newest, ALONE)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["files"].pop(SHARD)
    (path / SHARD).rename(tmp_path / SHARD)
    manifest["files"][f"../{SHARD}"] = entry
    del manifest["digest"]
    content = json.dumps(manifest, sort_keys=True).encode()
    manifest["digest"] = hashlib.sha256(content).hexdigest()  # not an accident
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="missing"):
        verified(path, ALONE)


def test_absent_checkpoints(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="manifest"):
        verified(tmp_path / "step_000001", ALONE)
    with pytest.raises(CheckpointError, match="expected a folder named step_NNNNNN"):
        verified(tmp_path, ALONE)


def test_leftovers_of_an_interrupted_save_are_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".tmp_step_000030").mkdir()
    replaced = save(tmp_path, 20)
    replaced.rename(tmp_path / ".replaced_step_000020")  # killed between the two renames
    assert latest(tmp_path) == replaced
    (tmp_path / ".replaced_step_000020").mkdir()  # killed after them
    assert latest(tmp_path) == replaced
    assert folders(tmp_path) == ["step_000020"]


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": (1, 2)}, {1: 2}, {"x": {1, 2}}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save_these(tmp_path, 1, {}, state)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, ALONE, keep=0)
    with pytest.raises(ValueError, match="step=-1"):
        save(tmp_path, -1)


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
    assert latest(tmp_path) == previous


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
        save_these(tmp_path, 10, {"other": torch.ones(2)}, {"again": True})
    monkeypatch.undo()
    assert latest(tmp_path) == path
    assert load(path, {"weight": torch.ones(3)})[1] == {"step": 10}


def test_a_full_disk_is_named_and_leaves_the_previous_one(tmp_path: Path) -> None:
    """A real limit: no file of this process may grow beyond 100 kB."""
    previous = save(tmp_path, 10)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails instead
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step_000020: cannot write .* File too large"):
            save_these(tmp_path, 20, {"weight": torch.ones(100_000)}, {"step": 20}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal_before)
    assert folders(tmp_path) == ["step_000010"]
    assert latest(tmp_path) == previous


def step(model: torch.nn.Linear, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()


def whole_state(model: torch.nn.Linear, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return {name: p.detach() for name, p in named.items()} | moments(optimizer, named)


@pytest.mark.parametrize("steps", [0, 3])
def test_optimizer_continues_bit_for_bit(tmp_path: Path, steps: int) -> None:
    torch.manual_seed(0)
    config = OptimConfig(learning_rate=0.1, weight_decay=0.1)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model.parameters(), config)
    for _ in range(steps):
        step(model, optimizer)
    made = updates_made(optimizer, dict(model.named_parameters()))
    assert made == {"weight": steps, "bias": steps}
    path = save_these(tmp_path, steps, whole_state(model, optimizer), {"made": made})
    torch.manual_seed(1)
    step(model, optimizer)
    expected = [raw(p.detach()) for p in model.parameters()]

    other = torch.nn.Linear(3, 2)
    other_optimizer = build_optimizer(other.parameters(), config)
    tensors = whole_state(other, other_optimizer)
    state = load_checkpoint(verified(path, ALONE), tensors, ALONE)
    named = dict(other.named_parameters())
    set_updates_made(other_optimizer, named, state["made"])
    torch.manual_seed(1)
    step(other, other_optimizer)
    assert updates_made(other_optimizer, named) == dict.fromkeys(named, steps + 1)
    assert [raw(p.detach()) for p in other.parameters()] == expected


def test_a_parameter_without_gradient_keeps_its_own_count() -> None:
    model = torch.nn.Linear(3, 2)
    named = dict(model.named_parameters())
    optimizer = build_optimizer(named.values(), OptimConfig())
    model.weight.sum().backward()
    optimizer.step()
    moments(optimizer, named)
    assert updates_made(optimizer, named) == {"weight": 1, "bias": 0}
