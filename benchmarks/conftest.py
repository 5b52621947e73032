"""The option of the pytest-benchmark groups."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--bench-shape: tokens x hidden size x classes."""
    parser.addoption("--bench-shape", default="512x1024x32000", metavar="NxDxV")
