"""Checkpoints that survive a kill at any instant and never load a damaged file.

A checkpoint is a folder `step_000040` of safetensors files, `state.json` and a manifest with the
size and SHA-256 of each. It is written under another name, forced to disk and renamed, so a folder
with the final name is complete. The manifest is checked before anything is loaded: safetensors
itself accepts a flipped bit in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xopd.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
_FORMAT = 1
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_STEM = re.compile(r"[A-Za-z0-9_]+")
_TEMPORARY = ".tmp_"
_REPLACED = ".replaced_"

_log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be written, is missing or is damaged; the message says which."""


class Checkpoint(NamedTuple):
    """What load_checkpoint returns."""

    tensors: dict[str, dict[str, Tensor]]  # file stem -> state dict, on the CPU
    state: dict[str, Any]  # the JSON object that was saved


class Packed(NamedTuple):
    """An object taken apart into what safetensors holds and what JSON holds."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    keep: int,
) -> Path:
    """Writes `directory/step_NNNNNN` and deletes all but the `keep` newest up to this step.

    tensors: file stem -> state dict, any dtype, shape and device; storage that several tensors
    share (tied weights) is written once for each. state: JSON-able, finite numbers only. When the
    call returns, the checkpoint is on disk. Raises CheckpointError where it cannot be written;
    older checkpoints are then untouched.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step={step}, keep={keep}")
    for stem in tensors:
        if not _STEM.fullmatch(stem):
            raise ValueError(f"file stem {stem!r}: use letters, digits and underscores only")
    text = _state_text(state)
    final = directory / f"step_{step:06d}"
    temporary = directory / f"{_TEMPORARY}{final.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for stem, entries in tensors.items():
            save_file(_unshared(entries), temporary / f"{stem}.safetensors")
        (temporary / STATE).write_text(text, encoding="utf-8")
        _write_manifest(temporary, step)
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        _rename_into_place(temporary, final)
        _prune(directory, step, keep)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: cannot write the checkpoint: {error}; check free space and permissions"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; None where there is none.

    Logs one line for each newer one that it skips, and removes what an interrupted save left.
    """
    if not directory.is_dir():
        return None
    _clean_up(directory)
    for _, path in sorted(_step_folders(directory), reverse=True):
        try:
            _verify(path)
        except CheckpointError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
            continue
        return path
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Tensors (on the CPU, bit for bit) and state of one checkpoint.

    Raises CheckpointError where the folder or a file is missing or differs from the manifest.
    """
    names = _verify(path)
    try:
        tensors = {
            Path(name).stem: load_file(path / name)
            for name in names
            if name.endswith(".safetensors")
        }
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error}") from error
    return Checkpoint(tensors, state)


def pack_optimizer(state_dict: Mapping[str, Any]) -> Packed:
    """An optimizer's state_dict (Adam: exp_avg, exp_avg_sq, step per parameter), taken apart.

    Tensors are named `state.<parameter index>.<name>` and `group.<group index>.<name>`.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {"state": {}, "group": {}}
    groups = dict(enumerate(state_dict["param_groups"]))
    for kind, entries in (("state", state_dict["state"]), ("group", groups)):
        for index, entry in entries.items():
            rest[kind][str(index)] = {}
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{name}"] = value
                else:
                    rest[kind][str(index)][name] = _tuples_to_json(value)
    return Packed(tensors, rest)


def unpack_optimizer(packed: Packed) -> dict[str, Any]:
    """The state_dict that pack_optimizer took apart, for `optimizer.load_state_dict`."""
    entries: dict[str, dict[int, dict[str, Any]]] = {
        kind: {
            int(index): {name: _tuples_from_json(value) for name, value in entry.items()}
            for index, entry in packed.state[kind].items()
        }
        for kind in ("state", "group")
    }
    for key, tensor in packed.tensors.items():
        kind, index, name = key.split(".", 2)
        entries[kind][int(index)][name] = tensor
    groups = [entries["group"][index] for index in sorted(entries["group"])]
    return {"state": entries["state"], "param_groups": groups}


def _state_text(state: Mapping[str, object]) -> str:
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state is not JSON: {error}") from error
    if json.loads(text) != state:
        raise CheckpointError(
            "the state would not come back from JSON as it is: use lists for tuples and text keys"
        )
    return text


def _tuples_to_json(value: object) -> object:
    # JSON has no tuple, and Adam's betas must come back as one.
    return {"tuple": list(value)} if isinstance(value, tuple) else value


def _tuples_from_json(value: Any) -> Any:
    return tuple(value["tuple"]) if isinstance(value, dict) and "tuple" in value else value


def _unshared(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares storage: safetensors refuses those that do."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in entries.items():
        whole = tensor.detach().cpu().contiguous()
        if whole.untyped_storage().data_ptr() in seen:
            whole = whole.clone()
        seen.add(whole.untyped_storage().data_ptr())
        result[name] = whole
    return result


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _verify(path: Path) -> list[str]:
    """The files that the manifest lists, each of them there and unchanged."""
    match = _STEP_FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint; expected a folder named step_NNNNNN")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["step"] != int(match[1]):
            raise CheckpointError(f"{path}: the manifest is of another step or format")
        if STATE not in manifest["files"]:
            raise CheckpointError(f"{path}: the manifest does not list {STATE}")
        for name, entry in manifest["files"].items():
            file = path / name
            if Path(name).name != name or not file.is_file():
                raise CheckpointError(f"{path}: file {name!r} is missing")
            if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{path}: file {name!r} differs from the manifest")
        return list(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no usable {MANIFEST}: {error!r}") from error


def _rename_into_place(temporary: Path, final: Path) -> None:
    """Renames; a folder already there steps aside first, since rename cannot replace a full one."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(directory: Path, step: int, keep: int) -> None:
    # Steps above this one are of another run in the same folder: not this run's to delete.
    older = sorted((entry for entry in _step_folders(directory) if entry[0] <= step), reverse=True)
    for _, path in older[keep:]:
        # Renamed first, so that a kill half-way leaves no folder that looks like a checkpoint.
        doomed = path.rename(path.with_name(f"{_TEMPORARY}pruned_{path.name}"))
        shutil.rmtree(doomed)


def _clean_up(directory: Path) -> None:
    """Finishes what an interrupted save began: restores a replaced folder, drops temporary ones."""
    for path in list(directory.iterdir()):
        if path.name.startswith(_REPLACED):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        elif path.name.startswith(_TEMPORARY):
            shutil.rmtree(path)


def _step_folders(directory: Path) -> list[tuple[int, Path]]:
    found = ((_STEP_FOLDER.fullmatch(path.name), path) for path in directory.iterdir())
    return [(int(match[1]), path) for match, path in found if match]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
