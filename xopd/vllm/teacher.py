"""A teacher behind one or more vLLM servers: log-probs of sampled tokens on the text prompt.

vLLM scores a prompt at temperature 1 whatever is asked, so a run with a server for a teacher has
``rollout.temperature`` 1 (`xopd.config` sees to it). All trajectories of a prompt go to one
replica, picked by a hash that does not change from run to run: where vLLM can reuse the prompt's
keys and values, it finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xopd.vllm.answers import Wanted, generated, scored
from xopd.vllm.http import Deadline, HttpClient, ServerError
from xopd.vllm.options import HttpConfig, TeacherConfig
from xopd.vllm.server import check_server, in_parallel, naming, unless_failed


class Trajectory(NamedTuple):
    """What a teacher scores."""

    prompt: str  # its id: decides which replica scores it
    prompt_ids: tuple[int, ...]  # the text prompt, whatever the student heard
    response_ids: tuple[int, ...]


class VllmTeacher:
    """Scores on one or more replicas. Not for all ranks at once: each scores its own rows."""

    def __init__(
        self, options: TeacherConfig, http: HttpConfig, *, classes: int, eos_id: int
    ) -> None:
        """Refuses a replica that is away, too old, or serves something else.

        classes, eos_id: of its vocabulary, which the student's has been checked against.
        """
        self._options, self._http = options, http
        self._classes, self._eos_id = classes, eos_id
        self._clients = [HttpClient(url, http) for url in options.addresses()]
        deadline = Deadline(http.deadline_s)
        for client in self._clients:
            check_server(client, options.model, options.max_model_len, deadline)

    def replica(self, prompt: str) -> int:
        """Which replica scores the trajectories of that prompt."""
        digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
        return int.from_bytes(digest) % len(self._clients)

    def score(self, rows: Sequence[Trajectory]) -> list[Tensor | ServerError]:
        """Log-probs [n_i] fp32 of each response, in order, or why a row has none.

        A row without a score is an error object and never a number: the caller drops it and counts
        it, or stops. All calls together end by the deadline.
        """
        deadline = Deadline(self._http.deadline_s)
        return in_parallel(
            lambda row: self._scored(row, deadline),
            rows,
            self._http.connections,
            stop_at_first=False,
        )

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, ...]]:
        """Greedy responses to prompts, in order; raises ServerError where one has none."""
        deadline = Deadline(self._http.deadline_s)
        found = in_parallel(
            lambda item: self._answered(*item, max_tokens, deadline),
            list(enumerate(prompts)),
            self._http.connections,
            stop_at_first=True,
        )
        return unless_failed(found)

    def _answered(
        self, number: int, prompt_ids: Sequence[int], max_tokens: int, deadline: Deadline
    ) -> tuple[int, ...]:
        client = self._clients[number % len(self._clients)]
        body = {
            "model": self._options.model,
            "prompt": list(prompt_ids),
            "add_special_tokens": False,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": 0,
            "stop_token_ids": [self._eos_id],
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        reply = client.post("/v1/completions", body, deadline)
        wanted = Wanted(len(prompt_ids), max_tokens, self._classes, self._eos_id, frozenset())
        with naming(client, "an answer"):
            return generated(reply, wanted, prompt_ids).token_ids

    def _scored(self, row: Trajectory, deadline: Deadline) -> Tensor:
        client = self._clients[self.replica(row.prompt)]
        body = {
            "model": self._options.model,
            "prompt": [*row.prompt_ids, *row.response_ids],
            "add_special_tokens": False,
            "max_tokens": 1,  # vLLM samples at least one, which nobody reads
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        reply = client.post("/v1/completions", body, deadline)
        with naming(client, "a score"):
            values = scored(reply, row.prompt_ids, row.response_ids)
        return torch.tensor(values, dtype=torch.float32)
