"""A fake server for each test, and two sets of deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.fake_server import KEY, FakeServer, running
from xopd.vllm.options import HttpConfig


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[FakeServer, str]]:
    with running(tmp_path) as found:
        yield found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> HttpConfig:
    """Deadlines for what cannot succeed."""
    monkeypatch.setenv("XOPD_TEST_KEY", KEY)
    return HttpConfig(
        api_key_env="XOPD_TEST_KEY",
        attempt_s=0.25,
        deadline_s=0.6,
        retries=2,
        backoff_s=0.01,
        max_response_bytes=1_000_000,
    )


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> HttpConfig:
    """Deadlines for what can."""
    monkeypatch.setenv("XOPD_TEST_KEY", KEY)
    return HttpConfig(
        api_key_env="XOPD_TEST_KEY", attempt_s=0.7, deadline_s=20.0, retries=4, backoff_s=0.01
    )
