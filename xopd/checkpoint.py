"""Checkpoints that survive a kill at any instant, never load a damaged file, and fit any ranks.

Each rank writes its own shards as safetensors (torch.distributed.checkpoint, Hugging Face format),
behind the training, from a copy in host memory. A checkpoint is a folder `step_000040` of those
files, `state.json` and a manifest with the size and SHA-256 of each. It is written under another
name, forced to disk and renamed, so a folder with the final name is complete. The manifest is
checked before anything is loaded: safetensors itself accepts a flipped bit in silence. As shards
carry their offsets, another number of ranks can read them.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from xopd.manifest import (
    STATE,
    STEP_FOLDER,
    TEMPORARY,
    CheckpointError,
    FileEntry,
    Manifest,
    clean_up,
    file_entries,
    fsync,
    prune,
    read_manifest,
    rename_into_place,
    tensor_specs,
    write_manifest,
)
from xopd.ranks import World

_log = logging.getLogger(__name__)
# A run of one process is meant; DCP says so at each save, from a thread of its own.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
# What a full disk, a lost folder or a lost rank raise. CheckpointException is no Exception.
_FAILURES = (OSError, RuntimeError, ValueError, SafetensorError, CheckpointException)


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    final: Path
    temporary: Path
    specs: dict[str, list[Any]]  # tensor name -> [dtype, shape], of the whole tensor
    written: Future[dict[str, FileEntry]]  # this rank's files


class Checkpoints:
    """The checkpoints of one folder, which all ranks share; all ranks call each method together.

    keep: how many of the newest stay. A folder on several machines is one shared file system.
    """

    def __init__(self, directory: Path, world: World, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"expected keep >= 1, got keep={keep}")
        self._directory, self._world, self._keep = directory, world, keep
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Writing plans itself by collectives, which must not mix with those of the training.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._mesh = init_device_mesh("cpu", (world.size,)) if world.size > 1 else None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        """Copy the tensors to host memory and begin to write `step_NNNNNN`; see `finish`.

        tensors: sharded or whole, of any dtype. state: JSON-able, finite numbers only. When the
        call returns the tensors may change. A checkpoint that is still being written is finished
        first. Raises CheckpointError on all ranks where it cannot be written.
        """
        if step < 0:
            raise ValueError(f"expected step >= 0, got step={step}")
        self.finish()
        final = self._directory / f"step_{step:06d}"
        temporary = final.with_name(f"{TEMPORARY}{final.name}")
        self._on_first(lambda: _begin(temporary, _state_text(state)), final)
        copies = _copied(tensors, self._mesh)
        written = self._thread.submit(self._write, copies, temporary)
        self._pending = _Pending(final, temporary, tensor_specs(tensors), written)

    def poll(self) -> None:
        """Publish the checkpoint that is being written if every rank has written its part."""
        if self._pending is not None and not self._world.any(not self._pending.written.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it: manifest, then rename.

        When the call returns, it is on disk. Raises CheckpointError on all ranks if a rank could
        not write its part; older checkpoints are then untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        entries: dict[str, FileEntry] = {}
        error = None
        try:
            entries = pending.written.result()
        except _FAILURES as failure:
            error = _reason(failure)
        self._agree(error, pending.final)
        of_all = {name: e for part in self._world.gather(entries) for name, e in part.items()}
        step = int(pending.final.name.removeprefix("step_"))
        manifest = Manifest(pending.temporary, step, of_all, pending.specs)
        self._on_first(lambda: self._publish(manifest, pending.final), pending.final)

    def close(self) -> None:
        """Give up what is being written and not yet published."""
        self._thread.shutdown(wait=True)
        self._pending = None
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def latest(self) -> Manifest | None:
        """The newest checkpoint whose every file matches its manifest; None where there is none.

        Logs one line for each newer one that it skips, and removes what an interrupted save left.
        """
        self._on_first(lambda: clean_up(self._directory), self._directory)
        names = [path.name for path in self._directory.iterdir()] if self._world.is_first else []
        found = [name for name in self._world.first(names) if STEP_FOLDER.fullmatch(name)]
        for name in sorted(found, key=lambda name: int(name.removeprefix("step_")), reverse=True):
            try:
                return verified(self._directory / name, self._world)
            except CheckpointError as error:
                if self._world.is_first:
                    _log.warning("skipping a damaged checkpoint: %s", error)
        return None

    def _write(self, tensors: dict[str, Tensor], folder: Path) -> dict[str, FileEntry]:
        """Write this rank's shards, force them to disk and hash them; in the thread."""
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        is_alone = self._group is None
        save(tensors, storage_writer=writer, process_group=self._group, no_dist=is_alone)
        mine = sorted(folder.glob(f"shard-{self._world.rank + 1:05d}-*"))
        paths = [*mine, folder / STATE] if self._world.is_first else mine
        for path in paths:
            fsync(path)
        return file_entries(paths)

    def _publish(self, manifest: Manifest, final: Path) -> None:
        write_manifest(manifest)
        rename_into_place(manifest.path, final)
        prune(self._directory, manifest.step, self._keep)

    def _on_first(self, work: Callable[[], None], path: Path) -> None:
        """The first rank works, and all of them learn whether it could."""
        error = None
        if self._world.is_first:
            try:
                work()
            except (CheckpointError, *_FAILURES) as failure:
                error = _reason(failure)
        self._agree(error, path)

    def _agree(self, error: str | None, path: Path) -> None:
        """Raise on all ranks together if one of them says why."""
        errors = [reason for reason in self._world.gather(error) if reason is not None]
        if not errors:
            return
        if self._world.is_first:
            shutil.rmtree(path.with_name(f"{TEMPORARY}{path.name}"), ignore_errors=True)
        raise CheckpointError(
            f"{path}: cannot write the checkpoint: {errors[0]}; check free space and permissions"
        )


def verified(path: Path, world: World) -> Manifest:
    """The manifest of one checkpoint after every file was checked against it; ranks share the work.

    Raises CheckpointError on all ranks where the folder or a file is missing or differs.
    """
    manifest, error = None, None
    try:
        manifest = read_manifest(path)
        manifest.check(sorted(manifest.files)[world.rank :: world.size])
    except CheckpointError as failure:
        error = str(failure)
    errors = [reason for reason in world.gather(error) if reason is not None]
    if errors or manifest is None:
        raise CheckpointError(errors[0])
    return manifest


def load_checkpoint(
    manifest: Manifest, tensors: Mapping[str, Tensor], world: World
) -> dict[str, Any]:
    """Fill `tensors` in place, each rank its shards, from a verified checkpoint; returns the state.

    Raises CheckpointError where the checkpoint holds other names, dtypes or shapes.
    """
    wanted = tensor_specs(tensors)
    if wanted != manifest.tensors:
        names = sorted(set(wanted) ^ set(manifest.tensors)) or sorted(
            name for name, spec in wanted.items() if manifest.tensors[name] != spec
        )
        raise CheckpointError(
            f"{manifest.path} holds other parameters than this model ({len(names)} differ, first "
            f"{names[0]!r}); use another out_dir."
        )
    try:
        load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(manifest.path)),
            no_dist=world.size == 1,
        )
        state: dict[str, Any] = json.loads((manifest.path / STATE).read_text(encoding="utf-8"))
    except _FAILURES as error:
        raise CheckpointError(f"{manifest.path}: cannot read it: {_reason(error)}") from error
    return state


def _copied(tensors: Mapping[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Copies in host memory, contiguous and each with storage of its own; of a shard the shard.

    mesh: the ranks as CPUs. The copy of a shard says which part it is, wherever it was.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = tensor.detach()
        local = part.to_local() if isinstance(part, DTensor) else part
        copy = torch.empty(local.shape, dtype=local.dtype).copy_(local)
        if isinstance(part, DTensor):
            found[name] = DTensor.from_local(
                copy, mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
            )
        else:
            found[name] = copy
    return found


def _begin(temporary: Path, text: str) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    (temporary / STATE).write_text(text, encoding="utf-8")


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


def _reason(failure: BaseException) -> str:
    """One line; of a failure of several ranks the first."""
    if isinstance(failure, CheckpointException):
        failure = next(iter(failure.failures.values()))[0]
    lines = str(failure).splitlines()
    return lines[0][:300] if lines else type(failure).__name__
