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

PROBE_TOKENS = 8
# Nat. Scores of the same weights differ by what batches and kernels do to the last bits.
SAME_TEACHER = 0.2


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
            check_server(client, "teacher", options.model, options.max_model_len, http)
        # The end of sequence alone: every teacher has it, and two that are not one differ there.
        self._probe = Trajectory("", (eos_id,), (eos_id,) * PROBE_TOKENS)
        self._known = [self._scored(self._probe, client, deadline) for client in self._clients]
        for client, scores in zip(self._clients, self._known, strict=True):
            gap = float((scores - self._known[0]).abs().max())
            if not gap <= SAME_TEACHER:
                raise ServerError(
                    f"server {client.name} is another teacher than {self._clients[0].name}: their "
                    f"scores of the same tokens differ by {gap:.3g} nat."
                )

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
        found = in_parallel(
            lambda row: self._scored(row, self._clients[self.replica(row.prompt)], deadline),
            rows,
            self._http.connections,
            stop_at_first=False,
        )
        problems = [self._problem(number, deadline) for number in range(len(self._clients))]
        return [
            problems[self.replica(row.prompt)] or one for one, row in zip(found, rows, strict=True)
        ]

    def _problem(self, number: int, deadline: Deadline) -> ServerError | None:
        """None, or why what a replica said cannot be the scores of the teacher of the start."""
        client = self._clients[number]
        try:
            scores = self._scored(self._probe, client, deadline)
        except ServerError as error:
            return error
        gap = float((scores - self._known[number]).abs().max())
        if gap <= SAME_TEACHER:
            return None
        return ServerError(
            f"server {client.name} is not the teacher that it was: its scores of the same tokens "
            f"have moved by {gap:.3g} nat. It was restarted with other weights."
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

    def _scored(self, row: Trajectory, client: HttpClient, deadline: Deadline) -> Tensor:
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
