"""Whole runs whose teacher is behind HTTP, with a server that fails in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vllm.fake_server import KEY, MODEL, FakeServer, answer_of, running, scores_of
from xopd.config import Config
from xopd.errors import UserError
from xopd.metrics import read_jsonl
from xopd.models import TextLM
from xopd.train import train

MakeConfig = Callable[..., Config]
SHORT = (
    *("http.attempt_s=2", "http.deadline_s=6", "http.retries=1", "http.backoff_s=0.01"),
    "http.connections=2",
)


@pytest.fixture
def served(teacher: TextLM, tmp_path: Path) -> Iterator[tuple[FakeServer, tuple[str, ...]]]:
    """The trainer tests' own teacher behind HTTP, and the overrides that name it."""
    (tmp_path / "key").write_text(KEY)
    with running(tmp_path) as (server, url):
        server.state.scores = lambda ids: scores_of(teacher, ids)
        server.state.answers = lambda ids, limit: answer_of(teacher, ids, limit)
        server.state.max_model_len = 4096
        yield (
            server,
            (
                f"teacher.urls={url}",
                f"teacher.model={MODEL}",
                f"http.api_key_file={tmp_path / 'key'}",
                *SHORT,
                "train.checkpoint_every=1",
            ),
        )


def numbers(run: Path) -> list[dict[str, object]]:
    """Metrics but times and memory."""
    return [
        {name: v for name, v in line.items() if not name.endswith(("_s", "_gb"))}
        for line in read_jsonl(run / "metrics.jsonl")
    ]


def test_a_served_teacher_trains_as_a_local_one(
    make_config: MakeConfig, served: tuple[FakeServer, tuple[str, ...]], tmp_path: Path
) -> None:
    local = numbers(train(make_config(tmp_path / "local")))
    far = numbers(train(make_config(tmp_path / "far", *served[1])))
    for one, two in zip(local, far, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    records = [json.loads((tmp_path / n / "eval/after.json").read_text()) for n in ("local", "far")]
    assert records[0]["teacher_text"] == records[1]["teacher_text"]


@pytest.mark.parametrize("fault", ["status_500", "reset_in_body", "hang_in_body", "half_json"])
def test_a_server_that_fails_stops_the_run_and_the_same_command_goes_on(
    make_config: MakeConfig,
    served: tuple[FakeServer, tuple[str, ...]],
    tmp_path: Path,
    fault: str,
) -> None:
    server, overrides = served
    expected = train(make_config(tmp_path / "whole", *overrides))
    run = tmp_path / "run"
    # A probe and 12 scores a step, before them one and the evaluation: it strikes in step 2.
    state = server.state
    state.transport, state.routes = fault, ("/v1/completions",)
    state.spared = 1 + 4 + 2 * 13 + 5
    with pytest.raises(UserError, match=r"could not score 12 of 12 rollouts.*resumes"):
        train(make_config(run, *overrides))
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [0, 1]
    state.routes = ()
    train(make_config(run, *overrides))
    assert numbers(run) == numbers(expected)
    student = "student/model.safetensors"
    assert (run / student).read_bytes() == (expected / student).read_bytes()


def test_few_losses_are_counted_and_the_run_goes_on(
    make_config: MakeConfig, served: tuple[FakeServer, tuple[str, ...]], tmp_path: Path
) -> None:
    server, overrides = served
    state = server.state
    state.content = lambda answer: answer["choices"][0]["prompt_logprobs"].pop()
    state.routes, state.spared, state.strikes = ("/v1/completions",), 1 + 4 + 13, 2
    config = make_config(tmp_path / "run", *overrides, "teacher.max_dropped=0.2")
    lines = read_jsonl(train(config) / "metrics.jsonl")
    assert [line["dropped_rollouts"] for line in lines] == [0, 2, 0, 0]
    assert all(line["skipped_updates"] == 0 for line in lines)
