"""Kills at random moments of a save, and random corruptions; prints what happened.

A dozen of each with the other tests, a hundred in a lane of their own (`make test-faults`).
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xopd.checkpoint import Checkpoints, load_checkpoint
from xopd.manifest import MANIFEST, STATE
from xopd.ranks import ALONE

COUNTS = pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.faults)])
SIZE = 200_000  # elements of each of two tensors: a save takes some milliseconds

# Imports torch once, then forks a fresh victim for each start step that it reads. A victim resumes
# as a run does, then saves for ever; it says when a save begins and when one is on disk.
LAUNCHER = f"""
import os, sys
from pathlib import Path
import torch
from xopd.checkpoint import Checkpoints
from xopd.ranks import ALONE

def save_for_ever(step):
    checkpoints = Checkpoints(Path(sys.argv[1]), ALONE, keep=2)
    while True:
        tensors = {{name: torch.full(({SIZE},), float(step)) for name in ("model", "optim")}}
        checkpoints.save(step, tensors, {{"step": step}})
        checkpoints.finish()
        os.write(1, f"saved {{step}}\\n".encode())
        step += 1

torch.set_num_threads(1)
for line in sys.stdin:
    victim = os.fork()
    if victim == 0:
        os.write(1, f"victim {{os.getpid()}}\\n".encode())
        save_for_ever(int(line))
    os.waitpid(victim, 0)
    os.write(1, b"killed 0\\n")
"""


def load_newest(directory: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Step and tensors of what a resumed run would take."""
    found = Checkpoints(directory, ALONE, keep=2).latest()
    if found is None:
        return None
    tensors = {name: torch.zeros(SIZE) for name in ("model", "optim")}
    state = load_checkpoint(found, tensors, ALONE)
    assert found.path.name == f"step_{state['step']:06d}"
    return int(state["step"]), tensors


@COUNTS
def test_kills_at_random_moments_of_a_save(tmp_path: Path, count: int) -> None:
    rng = random.Random(0)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert launcher.stdin is not None and launcher.stdout is not None
    start, moments = 0, Counter[str]()
    save_s = 0.05
    for _ in range(count):
        print(start, file=launcher.stdin, flush=True)
        victim = int(launcher.stdout.readline().removeprefix("victim "))
        begin_s = time.monotonic()
        acknowledged = int(launcher.stdout.readline().removeprefix("saved "))
        save_s = 0.5 * save_s + 0.5 * min(0.5, time.monotonic() - begin_s)
        time.sleep(rng.uniform(0.0, save_s))
        os.kill(victim, signal.SIGKILL)
        while (line := launcher.stdout.readline()) != "killed 0\n":
            acknowledged = int(line.removeprefix("saved "))
        names = sorted(path.name for path in tmp_path.iterdir())
        moments[where(names)] += 1
        newest = load_newest(tmp_path)
        assert newest is not None
        step, tensors = newest
        assert step >= acknowledged >= start
        for tensor in tensors.values():
            assert torch.equal(tensor, torch.full((SIZE,), float(step)))
        start = step
    launcher.communicate()
    print(f"\n{count} kills, no acknowledged checkpoint lost; the folder showed {dict(moments)}")
    assert moments.total() - moments["nothing under way"] >= count // 4


def where(names: list[str]) -> str:
    """What the folder showed when the victim was dead."""
    if any(name.startswith(".replaced_") for name in names):
        return "between two renames"
    if any(name.startswith(".tmp_pruned_") for name in names):
        return "pruning"
    return "writing" if any(name.startswith(".tmp_") for name in names) else "nothing under way"


def flip_a_bit(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut_short(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def scramble_a_block(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    begin = rng.randrange(len(data))
    part = data[begin : begin + 4096]
    data[begin : begin + 4096] = bytes(b ^ 0xFF for b in part)
    file.write_bytes(data)


def append(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(1 + rng.randrange(100)))


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def take_another_steps(file: Path, rng: random.Random) -> None:
    shutil.copy(file.parent.with_name("step_000010") / file.name, file)


def add_a_file(file: Path, rng: random.Random) -> None:
    shutil.copy(file, file.with_name(f"more_{file.name}"))


DAMAGE: list[Callable[[Path, random.Random], None]] = [
    *(flip_a_bit, cut_short, scramble_a_block, append, delete, take_another_steps, add_a_file)
]


@COUNTS
def test_no_corruption_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    rng = random.Random(1)
    checkpoints = Checkpoints(tmp_path / "sound", ALONE, keep=9)
    for step in (10, 20):
        tensors = {name: torch.full((SIZE,), float(step)) for name in ("model", "optim")}
        checkpoints.save(step, tensors, {"step": step})
        checkpoints.finish()
    checkpoints.close()
    done = Counter[str]()
    for number in range(count):
        folder = tmp_path / f"damaged_{number}"
        shutil.copytree(tmp_path / "sound", folder)
        newest = folder / "step_000020"
        shard = next(path.name for path in newest.glob("*.safetensors"))
        file = newest / rng.choice([shard, shard, STATE, MANIFEST])
        damage = rng.choice(DAMAGE)
        before = file.read_bytes()
        damage(file, rng)
        name = f"{damage.__name__} {'shard' if file.name == shard else file.name}"
        assert damage is add_a_file or not file.exists() or file.read_bytes() != before
        with caplog.at_level(logging.WARNING):
            found = load_newest(folder)
        assert found is not None, name
        step, tensors = found
        # Whatever was damaged: the step that is loaded is whole.
        assert all(torch.equal(t, torch.full((SIZE,), float(step))) for t in tensors.values()), name
        assert step == 10, name
        done[name] += 1
        shutil.rmtree(folder)
    print(f"\n{done.total()} corruptions, none loaded: {dict(sorted(done.items()))}")
    assert done.total() == count
