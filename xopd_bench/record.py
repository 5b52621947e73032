"""JSON lines: one for each cell, with where it comes from; a second run goes on where one ended.

A cell counts as done if a line has the same cell, commit, device, versions, kernel sources and
limits. The date and what was measured are not compared.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import xopd_kernels
from xopd_bench.cell import Cell
from xopd_bench.clock import Ceiling
from xopd_bench.errors import BenchError
from xopd_bench.measure import Limits, Outcome
from xopd_kernels.native_library import runnable_objects

Line = dict[str, Any]  # a line of the file, parsed
CELL_FIELDS = (
    *("job", "shape", "rows", "dim", "vocab_size", "dtype"),
    *("distribution", "masked_percent"),
)
_MEASURED = (
    *("date", "outcomes", "gemm_tflop_s", "gemm_dtype", "copy_gb_s"),
    *("entropy_nat", "certain_share"),
)
_REQUIRED = frozenset((*CELL_FIELDS, "outcomes"))
# With another version of these a cell has to be measured again.
_PEERS = (
    *("liger-kernel", "verl", "cut-cross-entropy", "quack-kernels", "flash-linear-attention"),
    *("nvidia-cutlass-dsl", "transformers"),
)
# What changes how threads and allocators behave, and with them the times.
_ENVIRONMENT = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "MKL_NUM_THREADS", "LD_PRELOAD"),
    *("GLIBC_TUNABLES", "MALLOC_CONF", "THP_MEM_ALLOC_ENABLE", "CUDA_VISIBLE_DEVICES"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING"),
)
_ROOT = Path(xopd_kernels.__file__).parent.parent


def origin(device: torch.device, limits: Limits, commit: str = "") -> Line:
    """Device, driver, versions, commit, date and limits of this run.

    commit: of sources that were copied here without their repository; else git says it.
    """
    is_cuda = device.type == "cuda"
    found = _output("git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*")
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_model(),
        "device_type": device.type,
        "driver": _driver() if is_cuda else "",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "capability": _capability(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "trl": _version("trl"),
        "peers": {x: _version(x) for x in _PEERS},
        "xopd_kernels": xopd_kernels.__version__,
        "commit": found or commit or "none",
        "kernel_hash": kernel_hash(),
        "native_hash": _native_hash(),
        "environment": {x: os.environ[x] for x in _ENVIRONMENT if x in os.environ},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **limits._asdict(),
    }


def kernel_hash() -> str:
    """The first 12 digits of the SHA-256 of xopd_kernels/ and csrc/: names and contents.

    "" in an installed package, which has no csrc/.
    """
    if not (_ROOT / "csrc").is_dir():
        return ""
    suffixes = (".py", ".cpp", ".h", ".hpp", ".cu")
    files = [p for name in ("xopd_kernels", "csrc") for p in (_ROOT / name).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.suffix in suffixes):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _native_hash() -> str:
    """The same of the shared object that runs: it may be older than its sources. "" without one."""
    objects = runnable_objects()
    return hashlib.sha256(objects[0].read_bytes()).hexdigest()[:12] if objects else ""


def cell_line(run: Line, cell: Cell, outcomes: Sequence[Outcome], ceiling: Ceiling) -> Line:
    """The line of a finished cell, with the rates that its times are."""
    fastest = [cell.all_flop / x.median_ms * 1e-9 for x in outcomes if x.is_floor and x.median_ms]
    rows = []
    for outcome in outcomes:
        row = dataclasses.asdict(outcome)
        row["status"] = outcome.status.value
        if outcome.median_ms:
            # The bare GEMMs multiply the ignored tokens too.
            flop = cell.all_flop if outcome.is_floor else cell.least_flop
            row["tflop_s"] = round(flop / outcome.median_ms * 1e-9, 4)
            row["gb_s"] = round(cell.least_bytes / outcome.median_ms * 1e-6, 4)
        rows.append(row)
    rates = {
        "gemm_tflop_s": round(max(ceiling.tflop_s, *fastest, 0.0), 4),
        "gemm_dtype": ceiling.dtype,
        "copy_gb_s": round(ceiling.gb_s, 4),
    }
    return {**run, **cell.record(), **rates, "outcomes": rows}


def key(line: Line) -> str:
    """What must be equal for a cell not to be measured again."""
    same = {name: x for name, x in line.items() if name not in _MEASURED}
    return json.dumps(same, sort_keys=True)


def read(path: Path, fields: frozenset[str] = _REQUIRED) -> list[Line]:
    """The cells of a file, [] if there is none; BenchError names a line that is none of ours.

    A last line without its end was cut off when a run was killed: it is left out. `fields`: what
    every line must have.
    """
    if not path.exists():
        return []
    return list(_parse(path, path.read_text(encoding="utf-8"), fields))


def append(path: Path, line: Line) -> None:
    """Add a line; one that was cut off is removed."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")


def check_writable(path: Path) -> None:
    """Make the file if there is none, before any work; BenchError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise BenchError(f"--output {path} cannot be written ({error}); choose another") from error


def _parse(path: Path, text: str, fields: frozenset[str]) -> Iterator[Line]:
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchError(f"{path}:{number} is not JSON: {error}; remove the line") from error
        if not isinstance(parsed, dict) or not fields <= parsed.keys():
            raise BenchError(f"{path}:{number} is no line of this benchmark; remove the line")
        yield parsed


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    """What a command prints, "" if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _capability(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return str(torch.backends.cpu.get_cpu_capability())


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
