"""What a checkpoint folder consists of, and how it is published, replaced and thrown away.

Plain files only; who writes the tensors in them is `xopd.checkpoint`'s business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from xopd.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
STEP_FOLDER = re.compile(r"step_(\d{6,})")
TEMPORARY = ".tmp_"
_FORMAT = 2  # 2: shards of any number of ranks
_REPLACED = ".replaced_"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, is missing or is damaged; the message says which."""


class FileEntry(TypedDict):
    """What the manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One checkpoint: its folder, files and tensors."""

    path: Path
    step: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, list[Any]]  # name -> [dtype, shape] of the whole tensor

    def check(self, names: Iterable[str]) -> None:
        """Raise CheckpointError unless each of these files is there and unchanged."""
        for name in names:
            file, entry = self.path / name, self.files[name]
            try:
                is_same = file.stat().st_size == entry["bytes"] and _sha256(file) == entry["sha256"]
            except OSError as error:
                raise CheckpointError(f"{self.path}: file {name!r} is missing: {error}") from error
            if not is_same:
                raise CheckpointError(f"{self.path}: file {name!r} differs from the manifest")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a folder, checked in itself and against the names in the folder."""
    match = STEP_FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint; expected a folder named step_NNNNNN")
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != _FORMAT or found["step"] != int(match[1]):
            raise CheckpointError(f"{path}: the manifest is of another step or format")
        if found.pop("digest") != _digest(found):
            raise CheckpointError(f"{path}: the manifest is not as it was written")
        files = {name: _entry(entry) for name, entry in found["files"].items()}
        tensors = {name: [str(spec[0]), list(spec[1])] for name, spec in found["tensors"].items()}
        present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: no usable {MANIFEST}: {error!r}") from error
    # A file more would be read with the others, as safetensors files are found by their names.
    if present != set(files) or STATE not in files:
        names = sorted(present ^ set(files)) or [STATE]
        raise CheckpointError(f"{path}: file {names[0]!r} is missing, or is not in the manifest")
    return Manifest(path, int(match[1]), files, tensors)


def _entry(entry: Mapping[str, Any]) -> FileEntry:
    return {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}


def write_manifest(manifest: Manifest) -> None:
    """Write it into its folder and force both to disk; the folder must hold just its files."""
    present = {entry.name for entry in manifest.path.iterdir()}
    if present != set(manifest.files):
        raise CheckpointError(f"{manifest.path}: holds {sorted(present)}, not what was written")
    content = {
        "format": _FORMAT,
        "step": manifest.step,
        "files": dict(manifest.files),
        "tensors": dict(manifest.tensors),
    }
    text = json.dumps(content | {"digest": _digest(content)}, indent=1)
    (manifest.path / MANIFEST).write_text(text, encoding="utf-8")
    fsync(manifest.path / MANIFEST)
    fsync(manifest.path)


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Name -> [dtype, shape]; of a sharded tensor the shape of all of it."""
    return {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}


def file_entries(paths: Sequence[Path]) -> dict[str, FileEntry]:
    """Size and SHA-256 of each file, by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def rename_into_place(temporary: Path, final: Path) -> None:
    """Renames; a folder already there steps aside first, since rename cannot replace a full one."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(directory: Path, step: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to this step."""
    found = ((STEP_FOLDER.fullmatch(path.name), path) for path in directory.iterdir())
    # Steps above this one are of another run in the same folder: not this run's to delete.
    older = [(int(m[1]), path) for m, path in found if m and int(m[1]) <= step]
    for _, path in sorted(older, reverse=True)[keep:]:
        # Renamed first, so that a kill half-way leaves no folder that looks like a checkpoint.
        doomed = path.rename(path.with_name(f"{TEMPORARY}pruned_{path.name}"))
        shutil.rmtree(doomed)


def clean_up(directory: Path) -> None:
    """Finishes what an interrupted save began: restores a replaced folder, drops temporary ones."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in list(directory.iterdir()):
        if path.name.startswith(_REPLACED):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        elif path.name.startswith(TEMPORARY):
            shutil.rmtree(path)


def fsync(path: Path) -> None:
    """Force a file or a folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the rest of the manifest: it guards the files, and nothing else guards it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
