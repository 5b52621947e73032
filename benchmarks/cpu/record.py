"""JSON lines: one for each cell, with where it comes from; a second run goes on where one ended.

A cell counts as done if a line has the same cell, commit, device, versions, kernel sources and
limits. The date is not compared.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import xopd_kernels
from benchmarks.cpu.measure import Limits, Outcome
from benchmarks.cpu.problem import Cell
from benchmarks.cpu.providers import GEMM, GEMM_FP32
from benchmarks.harness import provenance

Line = dict[str, Any]  # a line of the file, parsed
_CELL_FIELDS = ("job", "shape", "rows", "dim", "vocab_size", "dtype")
CELL_FIELDS = (*_CELL_FIELDS, "distribution", "masked_percent")


def origin(limits: Limits) -> Line:
    """Device, versions, commit, date and limits of this run."""
    return {
        **provenance(torch.device("cpu")),
        "device": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "trl": _version("trl"),
        "kernel_hash": kernel_hash(),
        **limits._asdict(),
    }


def kernel_hash() -> str:
    """The first 12 digits of the SHA-256 of xopd_kernels/ and csrc/: names and contents."""
    package = Path(xopd_kernels.__file__).parent
    root = package.parent
    suffixes = (".py", ".cpp", ".h", ".hpp", ".cu")
    files = [p for folder in (package, root / "csrc") for p in folder.rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.suffix in suffixes):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cell_line(run: Line, cell: Cell, outcomes: Sequence[Outcome]) -> Line:
    """The line of a finished cell, with each time as a multiple of the bare GEMMs' too."""
    medians = {x.provider: x.median_ms for x in outcomes}
    floor, floor_fp32 = medians.get(GEMM), medians.get(GEMM_FP32, medians.get(GEMM))
    rows = []
    for outcome in outcomes:
        row = dataclasses.asdict(outcome)
        row["status"] = outcome.status.value
        row["of_gemms"] = _ratio(outcome.median_ms, floor)
        row["of_fp32_gemms"] = _ratio(outcome.median_ms, floor_fp32)
        rows.append(row)
    return {**run, **cell.record(), "outcomes": rows}


def key(line: Line) -> str:
    """What must be equal for a cell not to be measured again."""
    same = {name: x for name, x in line.items() if name not in ("date", "outcomes")}
    return json.dumps(same, sort_keys=True)


def read(path: Path) -> list[Line]:
    """The cells of a file, [] if there is none; ValueError names a line that is none of ours.

    A last line without its end was cut off when a run was killed: it is left out.
    """
    if not path.exists():
        return []
    return list(_parse(path, path.read_text(encoding="utf-8")))


def append(path: Path, line: Line) -> None:
    """Add a cell; a line that was cut off is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")


def _parse(path: Path, text: str) -> Iterator[Line]:
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}; remove the line") from error
        if not isinstance(parsed, dict) or not {*CELL_FIELDS, "outcomes"} <= parsed.keys():
            raise ValueError(f"{path}:{number} is no cell of this benchmark; remove the line")
        yield parsed


def _ratio(value: float | None, floor: float | None) -> float | None:
    return None if value is None or not floor else round(value / floor, 4)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
