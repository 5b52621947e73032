"""What a local engine leaves behind, without vLLM."""

from __future__ import annotations

import fcntl
from pathlib import Path

from xopd.vllm.local import LOCK, PREFIX, remove_leftovers


def test_folders_of_dead_processes_go_and_others_stay(tmp_path: Path) -> None:
    dead, alive, new, foreign = (tmp_path / f"{PREFIX}{n}" for n in "abcd")
    for folder in (dead, alive):
        folder.mkdir()
        (folder / LOCK).touch()
    new.mkdir()  # being made: no lock yet
    foreign.symlink_to(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with (alive / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        (alive.name, new.name, foreign.name, "other")
    )
