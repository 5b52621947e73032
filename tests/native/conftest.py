"""The shared objects under test: each one that this CPU can run, or the one that is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xopd_kernels import native_library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native-library",
        type=Path,
        default=None,
        help="run tests/native against this shared object, for example one with sanitizers",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "library" in metafunc.fixturenames:
        given = metafunc.config.getoption("--native-library", default=None)
        paths = native_library.runnable_objects() if given is None else [given]
        ids = [path.stem for path in paths]
        metafunc.parametrize("library", paths, ids=ids, indirect=True, scope="module")


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The shared object that the calls of this module's tests run."""
    native_library.load(request.param)
    yield request.param
    native_library.load(None)
