"""Every answer that is well-formed and wrong: none becomes a sample, a score or a sync."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests.vllm.fake_server import (
    EOS,
    PHASES,
    RESERVED,
    VOCABULARY,
    Body,
    FakeServer,
    tokens_of,
)
from tests.vllm.shared import CALLS, MAX_TOKENS, ROWS, SAMPLING, Weights, backend_of, teacher_of
from xopd.vllm.http import ServerError
from xopd.vllm.options import HttpConfig, VllmError

Tally = Counter[str]
pytestmark = pytest.mark.server_faults


def choice_of(body: Body) -> Body:
    (choice,) = body["choices"]
    assert isinstance(choice, dict)
    return choice


def logprobs_of(body: Body) -> Body:
    found = choice_of(body)["logprobs"]
    assert isinstance(found, dict)
    return found


def with_logprob(value: object) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        logprobs_of(body)["token_logprobs"][1] = value

    return change


def with_tokens(ids: list[object], finish_reason: str) -> Callable[[Body], None]:
    """Another trajectory, told the same way in all of its parts."""

    def change(body: Body) -> None:
        choice_of(body).update(token_ids=ids, finish_reason=finish_reason)
        logprobs_of(body)["tokens"] = [f"token_id:{token}" for token in ids]
        logprobs_of(body)["token_logprobs"] = [-1.0] * len(ids)
        body["usage"]["completion_tokens"] = len(ids)

    return change


SAMPLES: dict[str, Callable[[Body], object]] = {
    "one_logprob_too_few": lambda b: logprobs_of(b)["token_logprobs"].pop(),
    "one_logprob_too_many": lambda b: logprobs_of(b)["token_logprobs"].append(-1.0),
    "null_logprob": with_logprob(None),
    "text_logprob": with_logprob("-1.0"),
    "boolean_logprob": with_logprob(True),
    "positive_logprob": with_logprob(0.5),
    "clamped_logprob": with_logprob(-9999.0),
    "infinite_logprob": with_logprob(float("-inf")),
    "nan_logprob": with_logprob(float("nan")),
    "huge_logprob": with_logprob(-(10**400)),
    "no_logprobs": lambda b: choice_of(b).update(logprobs=None),
    "tokens_in_another_order": lambda b: choice_of(b)["token_ids"].reverse(),
    "tokens_of_another": lambda b: choice_of(b).update(token_ids=tokens_of(99, MAX_TOKENS)),
    "no_tokens": with_tokens([], "length"),
    "too_few_tokens": with_tokens([5, 6], "length"),
    "too_many_tokens": with_tokens([5] * (MAX_TOKENS + 1), "length"),
    "reserved_token": with_tokens([5] * (MAX_TOKENS - 1) + [RESERVED[1]], "length"),
    "token_beyond_vocabulary": with_tokens([VOCABULARY] * MAX_TOKENS, "length"),
    "negative_token": with_tokens([-1] * MAX_TOKENS, "length"),
    "fractional_token": with_tokens([5.5] * MAX_TOKENS, "length"),
    "text_token": with_tokens(["5"] * MAX_TOKENS, "length"),
    "boolean_token": with_tokens([True] * MAX_TOKENS, "length"),
    "tokens_after_the_end": with_tokens([5, EOS, 5, EOS], "stop"),
    "stopped_without_end": with_tokens([5, 6], "stop"),
    "cut_at_the_end": with_tokens([5, EOS], "length"),
    "aborted": with_tokens([5] * MAX_TOKENS, "abort"),
    "no_finish_reason": lambda b: choice_of(b).pop("finish_reason"),
    "id_of_another_request": lambda b: b.update(id="cmpl-0123456789abcdef"),
    "no_id": lambda b: b.pop("id"),
    "two_choices": lambda b: b["choices"].append(b["choices"][0]),
    "no_choices": lambda b: b["choices"].clear(),
    "another_index": lambda b: choice_of(b).update(index=1),
    "choice_is_text": lambda b: b.update(choices=["x"]),
    "count_of_another": lambda b: b["usage"].update(completion_tokens=1),
    "prompt_count_of_another": lambda b: b["usage"].update(prompt_tokens=99),
    "no_usage": lambda b: b.pop("usage"),
}


@pytest.mark.parametrize("fault", SAMPLES)
def test_a_sample_that_is_wrong(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path, fault: str, tally: Tally
) -> None:
    backend = backend_of(server[1], patient, tmp_path)
    server[0].state.content, server[0].state.routes = SAMPLES[fault], PHASES["call"]
    for call in CALLS:
        with pytest.raises(ServerError):
            backend.generate([call], SAMPLING)
    tally["content of samples"] += 1


def test_a_sample_of_another_prompt(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path
) -> None:
    backend = backend_of(server[1], patient, tmp_path)
    server[0].state.content = lambda b: choice_of(b).update(prompt_token_ids=[5, 6, 9])
    server[0].state.routes = PHASES["call"]
    with pytest.raises(ServerError, match="another prompt"):
        backend.generate(CALLS[:1], SAMPLING)


def rows_of(body: Body) -> list[object]:
    rows = choice_of(body)["prompt_logprobs"]
    assert isinstance(rows, list)
    return rows


def with_score(value: object) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        rows_of(body)[4] = {"10": {"logprob": value}}

    return change


SCORES: dict[str, Callable[[Body], object]] = {
    "one_row_too_few": lambda b: rows_of(b).pop(),
    "one_row_too_many": lambda b: rows_of(b).append({}),
    "rows_in_another_order": lambda b: rows_of(b).reverse(),
    "rows_shifted": lambda b: rows_of(b).insert(1, rows_of(b).pop()),
    "null_row": lambda b: rows_of(b).__setitem__(4, None),
    "row_of_another_token": lambda b: rows_of(b).__setitem__(4, {"11": {"logprob": -1.0}}),
    "row_is_a_number": lambda b: rows_of(b).__setitem__(4, -1.0),
    "entry_is_a_number": lambda b: rows_of(b).__setitem__(4, {"10": -1.0}),
    "first_row_is_there": lambda b: rows_of(b).__setitem__(0, {"5": {"logprob": -1.0}}),
    "null_score": with_score(None),
    "text_score": with_score("-1"),
    "boolean_score": with_score(False),
    "positive_score": with_score(1.0),
    "clamped_score": with_score(-9999.0),
    "nan_score": with_score(float("nan")),
    "infinite_score": with_score(float("-inf")),
    "no_scores": lambda b: choice_of(b).update(prompt_logprobs=None),
    "tokens_of_another": lambda b: choice_of(b).update(prompt_token_ids=[1, 2, 3, 4, 5, 6]),
    "id_of_another_request": lambda b: b.update(id="cmpl-0123456789abcdef"),
    "two_choices": lambda b: b["choices"].append(b["choices"][0]),
    "count_of_another": lambda b: b["usage"].update(prompt_tokens=3),
}


@pytest.mark.parametrize("fault", SCORES)
def test_a_score_that_is_wrong(
    server: tuple[FakeServer, str], patient: HttpConfig, fault: str, tally: Tally
) -> None:
    teacher = teacher_of(server[1], patient)
    server[0].state.content, server[0].state.routes = SCORES[fault], PHASES["call"]
    assert all(isinstance(one, ServerError) for one in teacher.score(ROWS))
    tally["content of scores"] += 1


def test_one_wrong_score_leaves_the_others(
    server: tuple[FakeServer, str], patient: HttpConfig
) -> None:
    teacher = teacher_of(server[1], patient)
    state = server[0].state
    state.content, state.routes, state.strikes = with_score(None), PHASES["call"], 1
    scores = teacher.score(ROWS)
    assert sum(isinstance(one, ServerError) for one in scores) == 1
    assert sum(isinstance(one, Tensor) for one in scores) == 3


FINGERPRINTS: dict[str, Callable[[Body], object]] = {
    "another_tensor": lambda b: b["results"][0]["lm_head.weight"].__setitem__(1, "17"),
    "missing_tensor": lambda b: b["results"][0].pop("lm_head.weight"),
    "no_worker": lambda b: b["results"].clear(),
    "null_worker": lambda b: b["results"].__setitem__(0, None),
    "text_worker": lambda b: b["results"].__setitem__(0, "ok"),
    "half_of_it": lambda b: b["results"][0]["lm_head.weight"].__setitem__(0, "8"),
    "no_number": lambda b: b["results"][0]["lm_head.weight"].__setitem__(1, "many"),
    "one_number": lambda b: b["results"][0]["lm_head.weight"].pop(),
}


@pytest.mark.parametrize("fault", FINGERPRINTS)
def test_a_fingerprint_that_is_wrong(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path, fault: str, tally: Tally
) -> None:
    backend = backend_of(server[1], patient, tmp_path)
    weights = Weights(1.0)
    backend.load(weights, 1)

    def content(body: Body) -> None:
        # "half_of_it" keeps the bits, so that only the rule for shards of workers is left.
        FINGERPRINTS[fault](body)
        if fault == "half_of_it":
            body["results"][0]["lm_head.weight"][1] = "1"

    server[0].state.content, server[0].state.routes = content, ("/collective_rpc",)
    with pytest.raises(VllmError):
        backend.check(weights.fingerprint, 1)
    tally["content of weight syncs"] += 1


def test_weights_that_never_arrive(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path
) -> None:
    """The reload route answers, and does nothing."""
    backend = backend_of(server[1], patient, tmp_path)
    backend.load(Weights(1.0), 1)
    before = dict(server[0].state.weights)
    newer = Weights(2.0)
    backend.load(newer, 2)
    server[0].state.weights = before
    with pytest.raises(VllmError, match="not what was sent"):
        backend.check(newer.fingerprint, 2)


def test_a_restart_with_old_weights(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path
) -> None:
    backend = backend_of(server[1], patient, tmp_path)
    weights = Weights(1.0)
    backend.load(weights, 4)
    backend.check(weights.fingerprint, 4)
    server[0].state.restart()
    with pytest.raises(VllmError, match="restarted"):
        backend.check(weights.fingerprint, 4)
    server[0].state.label = "4"  # even one that claims the version
    with pytest.raises(VllmError, match="no parameter"):
        backend.check(weights.fingerprint, 4)


def test_a_cache_that_is_kept(
    server: tuple[FakeServer, str], patient: HttpConfig, tmp_path: Path
) -> None:
    backend = backend_of(server[1], patient, tmp_path)
    server[0].state.content = lambda b: b.update(success=False)
    server[0].state.routes = ("/reset_prefix_cache",)
    with pytest.raises(ServerError, match="prefix cache"):
        backend.load(Weights(1.0), 1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("version", "0.28.3", "or later"),
        ("version", "unknown", "expected one like"),
        ("model", "another", "serves"),
        ("max_model_len", 63, "max-model-len"),
        ("max_model_len", None, "max-model-len"),
        ("max_model_len", "64", "max-model-len"),
        ("max_model_len", True, "max-model-len"),
    ],
)
def test_a_server_that_does_not_fit(
    server: tuple[FakeServer, str],
    patient: HttpConfig,
    tmp_path: Path,
    name: str,
    value: object,
    words: str,
) -> None:
    setattr(server[0].state, name, value)
    with pytest.raises(VllmError, match=words):
        backend_of(server[1], patient, tmp_path)
    with pytest.raises(VllmError, match=words):
        teacher_of(server[1], patient)
