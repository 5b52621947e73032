"""What imports what: kernels never know the trainer, and cheap commands stay cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def loaded_after(code: str, root: Path) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport sys; print('\\n'.join({{m.split('.')[0] for m in sys.modules}}))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return set(done.stdout.split())


def test_the_kernels_never_import_the_trainer(repository: Path) -> None:
    files = sorted((repository / "xopd_kernels").rglob("*.py"))
    assert files
    for path in files:
        tops = {name.split(".")[0] for name in imported_names(path)}
        assert not tops & {"xopd", "xopd_bench", "transformers", "benchmarks", "tests"}, path


def test_the_benchmarks_never_import_the_trainer(repository: Path) -> None:
    files = sorted((repository / "xopd_bench").rglob("*.py"))
    assert files
    for path in files:
        tops = {name.split(".")[0] for name in imported_names(path)}
        assert not tops & {"xopd", "benchmarks", "tests"}, path


def test_the_trainer_imports_only_the_public_kernels(repository: Path) -> None:
    """Names that the trainer may take besides the package's own; anything deeper is private."""
    allowed = {"xopd_kernels", "xopd_kernels.backend"}
    for path in sorted((repository / "xopd").rglob("*.py")):
        kernels = {n for n in imported_names(path) if n.split(".")[0] == "xopd_kernels"}
        assert kernels <= allowed, path


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import xopd_kernels", {"triton", "transformers", "xopd", "yaml", "rich"}),
        ("import xopd.cli", {"triton", "transformers", "datasets", "matplotlib", "tensorboard"}),
        ("from xopd.cli import main; main(['config'])", {"transformers", "matplotlib"}),
    ],
)
def test_heavy_packages_load_when_they_are_used(
    repository: Path, code: str, absent: set[str]
) -> None:
    loaded = loaded_after(code, repository)
    assert "torch" in loaded
    assert not loaded & absent
