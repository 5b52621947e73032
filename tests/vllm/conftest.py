"""A fake server for each test, and two sets of deadlines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.fake_server import KEY, FakeServer, running
from tests.vllm.real import KEY as SERVED_KEY
from tests.vllm.real import KEY_ENV
from xopd.vllm.options import HttpConfig


@pytest.fixture(scope="session")
def tally() -> Iterator[Counter[str]]:
    """Faults of servers, by kind, that ended as they should; printed when all have run."""
    counts: Counter[str] = Counter()
    yield counts
    for kind, count in counts.items():
        print(f"\nserver faults, {kind}: {count} ended in an error before the deadline", end="")
    print(f"\n{counts.total()} server faults, and no sample or score came of one")


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


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> HttpConfig:
    """How the servers of a real vLLM are called."""
    monkeypatch.setenv(KEY_ENV, SERVED_KEY)
    return HttpConfig(api_key_env=KEY_ENV, connections=8)
