"""Every fault of transport, at start-up, while a server samples or scores, and while weights are
sent: each ends in an error before the deadline, and none in a sample or a score.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.vllm.fake_server import (
    PASSING,
    PHASES,
    TRANSPORT,
    FakeServer,
    running,
    score_of,
    tokens_of,
)
from tests.vllm.shared import (
    CALLS,
    MAX_TOKENS,
    ROWS,
    SAMPLING,
    SLACK_S,
    Weights,
    backend_of,
    in_time,
    teacher_of,
)
from xopd.vllm.http import ServerError
from xopd.vllm.options import HttpConfig

Tally = Counter[str]
pytestmark = pytest.mark.server_faults


def test_samples_and_scores_without_a_fault(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path
) -> None:
    backend = backend_of(server[1], patient, tmp_path)
    weights = Weights(1.5)
    backend.load(weights, 3)
    backend.check(weights.fingerprint, 3)
    found = backend.generate(CALLS, SAMPLING)
    assert [list(one.token_ids) for one in found] == [
        tokens_of(call.seed, MAX_TOKENS) for call in CALLS
    ]
    assert [one.is_finished for one in found] == [False, True, False]
    scores = teacher_of(server[1], patient).score(ROWS)
    expected = torch.tensor([score_of(token) for token in ROWS[0].response_ids])
    for one in scores:
        assert isinstance(one, Tensor)
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("fault", TRANSPORT)
def test_at_start(
    server: tuple[FakeServer, str], short: HttpConfig, tmp_path: Path, fault: str, tally: Tally
) -> None:
    server[0].state.transport, server[0].state.routes = fault, PHASES["start"]
    with in_time(1, short):
        backend_of(server[1], short, tmp_path)
    with in_time(1, short):
        teacher_of(server[1], short)
    tally["transport, at start"] += 1


@pytest.mark.parametrize("fault", TRANSPORT)
def test_while_sampling(
    server: tuple[FakeServer, str], short: HttpConfig, tmp_path: Path, fault: str, tally: Tally
) -> None:
    backend = backend_of(server[1], short, tmp_path)
    server[0].state.transport, server[0].state.routes = fault, PHASES["call"]
    with in_time(1, short):
        backend.generate(CALLS, SAMPLING)
    tally["transport, while sampling"] += 1


@pytest.mark.parametrize("fault", TRANSPORT)
def test_while_scoring(
    server: tuple[FakeServer, str], short: HttpConfig, fault: str, tally: Tally
) -> None:
    teacher = teacher_of(server[1], short)
    server[0].state.transport, server[0].state.routes = fault, PHASES["call"]
    start_s = time.monotonic()
    scores = teacher.score(ROWS)
    assert time.monotonic() - start_s < short.deadline_s + SLACK_S
    assert len(scores) == len(ROWS)
    assert all(isinstance(one, ServerError) for one in scores)
    tally["transport, while scoring"] += 1


@pytest.mark.parametrize("fault", TRANSPORT)
def test_while_weights_are_sent(
    server: tuple[FakeServer, str], short: HttpConfig, tmp_path: Path, fault: str, tally: Tally
) -> None:
    backend = backend_of(server[1], short, tmp_path)
    server[0].state.transport, server[0].state.routes = fault, PHASES["sync"]
    weights = Weights(2.0)
    with in_time(2, short):  # one for load, one for check
        backend.load(weights, 1)
        backend.check(weights.fingerprint, 1)
    tally["transport, while weights are sent"] += 1


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path, fault: str
) -> None:
    state = server[0].state
    state.transport, state.strikes = fault, 2
    # An order to load weights takes as long as it takes: a server that hangs there stops the run.
    takes_long = fault.startswith(("hang", "drip"))
    sync = [route for route in PHASES["sync"] if not (takes_long and route == "/collective_rpc")]
    state.routes = (*PHASES["start"], *PHASES["call"], *sync)
    backend = backend_of(server[1], patient, tmp_path)
    weights = Weights(0.5)
    state.strikes = 2
    backend.load(weights, 7)
    backend.check(weights.fingerprint, 7)
    state.strikes = 2
    found = backend.generate(CALLS, SAMPLING)
    assert [list(one.token_ids) for one in found] == [
        tokens_of(call.seed, MAX_TOKENS) for call in CALLS
    ]


@pytest.mark.parametrize("phase", ["start", "call", "score", "sync"])
def test_a_server_that_is_gone(short: HttpConfig, tmp_path: Path, phase: str) -> None:
    with running(tmp_path) as (_, url):
        backend, teacher = backend_of(url, short, tmp_path), teacher_of(url, short)
    if phase == "score":
        assert all(isinstance(one, ServerError) for one in teacher.score(ROWS))
        return
    with in_time(1, short):
        if phase == "start":
            backend_of(url, short, tmp_path)
        elif phase == "call":
            backend.generate(CALLS, SAMPLING)
        else:
            backend.load(Weights(1.0), 1)


def test_a_port_that_accepts_and_reads_nothing(short: HttpConfig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with in_time(1, short):
            backend_of(url, short, tmp_path)


def test_a_teacher_that_comes_back_as_another_is_noticed(
    server: tuple[FakeServer, str], patient: HttpConfig
) -> None:
    teacher = teacher_of(server[1], patient)
    assert all(isinstance(one, Tensor) for one in teacher.score(ROWS))
    server[0].state.scores = lambda ids: [-3.0] * len(ids)
    for one in teacher.score(ROWS):
        assert isinstance(one, ServerError)
        assert "not the teacher that it was" in str(one)
