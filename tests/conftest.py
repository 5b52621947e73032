"""One thread and no network for every test: results must not depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from xopd_kernels import Backend, backend

# Before any test imports transformers: a test that would download something fails instead.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The lane of the other CPU backend."""
    parser.addoption(
        "--reference",
        action="store_true",
        help="where a test leaves the backend to auto, take REFERENCE in place of NATIVE",
    )


@pytest.fixture(autouse=True)
def _reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("--reference"):
        monkeypatch.setattr(backend, "_resolve_auto", lambda device, dtype: Backend.REFERENCE)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Before each test, because a run sets the threads of its own config."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[1]
