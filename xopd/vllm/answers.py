"""What an answer of vLLM must look like before it counts as a sample or a score.

A server that was restarted, mixes up requests or runs with other settings answers with status 200
and plausible numbers. Everything that can be checked against the request is checked here, once for
every way to reach vLLM, so that a wrong answer stops the run and never becomes training data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from xopd.vllm.http import Json, Reply, ServerError

# vLLM writes -inf as this number in JSON.
CLAMPED_LOGPROB = -9999.0
# A log-prob is at most 0; log-softmax in fp32 may round it to just above.
MAX_LOGPROB = 1e-4


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for, as far as the answer must agree with it."""

    prompt_tokens: int
    max_tokens: int
    vocabulary: int  # rows of lm_head
    eos_id: int
    reserved: Collection[int]  # ids that must never be sampled; a set, for speed


@dataclass(frozen=True, slots=True)
class Generated:
    """One trajectory as an engine reports it, checked."""

    token_ids: tuple[int, ...]
    logprob: tuple[float, ...]
    is_finished: bool


def checked(
    wanted: Wanted, token_ids: Sequence[int], logprob: Sequence[float], finish_reason: object
) -> Generated:
    """A trajectory that agrees with its request and with itself; else ServerError says what not."""
    count = len(token_ids)
    if not 1 <= count <= wanted.max_tokens:
        raise ServerError(f"{count} tokens were sampled where 1 to {wanted.max_tokens} were asked")
    if len(logprob) != count:
        raise ServerError(f"{count} tokens came with {len(logprob)} log-probs")
    for token in token_ids:
        if not 0 <= token < wanted.vocabulary:
            raise ServerError(f"id {token} is outside the vocabulary of {wanted.vocabulary}")
        if token in wanted.reserved:
            raise ServerError(f"id {token} was sampled although it is reserved")
    for value in logprob:
        check_logprob(value)
    if wanted.eos_id in token_ids[:-1]:
        raise ServerError(f"tokens follow the end of sequence (id {wanted.eos_id})")
    is_finished = token_ids[-1] == wanted.eos_id
    expected = "stop" if is_finished else "length"
    if finish_reason != expected:
        raise ServerError(f"it stopped by {finish_reason!r} where its tokens say {expected!r}")
    if not is_finished and count < wanted.max_tokens:
        raise ServerError(
            f"it was cut after {count} of {wanted.max_tokens} tokens behind a prompt of "
            f"{wanted.prompt_tokens}: raise max_model_len"
        )
    return Generated(tuple(token_ids), tuple(logprob), is_finished)


def check_logprob(value: float) -> None:
    """Refuse what is no log-probability of a token that can occur."""
    if not math.isfinite(value) or value > MAX_LOGPROB or value <= CLAMPED_LOGPROB:
        raise ServerError(f"{value} is no log-probability of a sampled token")


def generated(reply: Reply, wanted: Wanted, prompt_ids: Sequence[int] | None) -> Generated:
    """The trajectory in an answer of ``/v1/completions``.

    prompt_ids: what the server must have read; None where it got embeddings.
    """
    choice = _choice(reply)
    _check_usage(reply, "prompt_tokens", wanted.prompt_tokens)
    if prompt_ids is not None and _integers(choice, "prompt_token_ids") != list(prompt_ids):
        raise ServerError("it answered another prompt than the one that was sent")
    token_ids = _integers(choice, "token_ids")
    _check_usage(reply, "completion_tokens", len(token_ids))
    logprobs = _object(choice, "logprobs")
    # The same ids once more, from another part of the server.
    names = [f"token_id:{token}" for token in token_ids]
    if _list(logprobs, "tokens") != names:
        raise ServerError("its log-probs belong to other tokens than those it sampled")
    logprob = [_number(value) for value in _list(logprobs, "token_logprobs")]
    return checked(wanted, token_ids, logprob, choice.get("finish_reason"))


def scored(reply: Reply, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
    """Log-probs of the response in an answer with ``prompt_logprobs``, in order."""
    choice = _choice(reply)
    sent = [*prompt_ids, *response_ids]
    _check_usage(reply, "prompt_tokens", len(sent))
    if _integers(choice, "prompt_token_ids") != sent:
        raise ServerError("it scored other tokens than those that were sent")
    rows = _list(choice, "prompt_logprobs")
    if len(rows) != len(sent):
        raise ServerError(f"{len(sent)} tokens came back with {len(rows)} rows of log-probs")
    if rows[0] is not None:
        raise ServerError("its first row is not empty, although nothing precedes the first token")
    values = []
    for token, row in zip(response_ids, rows[len(prompt_ids) :], strict=True):
        entry = row.get(str(token)) if isinstance(row, dict) else None
        if not isinstance(entry, dict):
            raise ServerError(f"it gives no log-prob for id {token} of the response")
        values.append(_number(entry.get("logprob")))
        check_logprob(values[-1])
    return values


def _choice(reply: Reply) -> dict[str, Json]:
    """The one completion; its answer must be to this request."""
    identity = reply.body.get("id")
    if not isinstance(identity, str) or reply.request_id not in identity:
        raise ServerError(f"its answer is to request {str(identity)[:80]!r}, not to this one")
    choices = _list(reply.body, "choices")
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerError(f"it gives {len(choices)} completions where 1 was asked")
    if choices[0].get("index") != 0:
        raise ServerError(f"its completion has index {choices[0].get('index')!r}, not 0")
    return choices[0]


def _check_usage(reply: Reply, name: str, expected: int) -> None:
    count = _object(reply.body, "usage").get(name)
    if isinstance(count, bool) or count != expected:
        raise ServerError(f"it counts {name} {count!r} where there are {expected}")


def _list(values: dict[str, Json], name: str) -> list[Json]:
    found = values.get(name)
    if not isinstance(found, list):
        raise ServerError(f"its answer has no list {name!r}")
    return found


def _object(values: dict[str, Json], name: str) -> dict[str, Json]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise ServerError(f"its answer has no object {name!r}")
    return found


def _integers(values: dict[str, Json], name: str) -> list[int]:
    found = []
    for value in _list(values, name):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ServerError(f"its {name!r} holds {str(value)[:40]!r}, which is no id")
        found.append(value)
    return found


def _number(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ServerError(f"it gives {str(value)[:40]!r} where a log-prob belongs")
    try:
        return float(value)
    except OverflowError as error:  # JSON has integers of any size
        raise ServerError("it gives a number that is no log-prob") from error
