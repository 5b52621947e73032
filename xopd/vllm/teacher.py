"""A teacher behind one or more vLLM servers: log-probs of sampled tokens on the text prompt.

vLLM scores a prompt at temperature 1 whatever is asked, so a run with a server for a teacher has
``rollout.temperature`` 1. All trajectories of a prompt go to one replica, picked by a hash that
does not change from run to run: where vLLM can reuse the prompt's keys and values, it finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xopd.vllm.answers import scored
from xopd.vllm.http import Deadline, HttpClient, ServerError
from xopd.vllm.options import HttpOptions, TeacherOptions, VllmError
from xopd.vllm.server import check_server, in_parallel


class Trajectory(NamedTuple):
    """What a teacher scores."""

    number: int  # of the prompt in its split: decides which replica scores it
    prompt_ids: tuple[int, ...]  # the text prompt, whatever the student heard
    response_ids: tuple[int, ...]


class VllmTeacher:
    """Scores on one or more replicas. Not for all ranks at once: each scores its own rows."""

    def __init__(
        self,
        options: TeacherOptions,
        http: HttpOptions,
        *,
        temperature: float,
        max_model_len: int,
    ) -> None:
        """Refuses a replica that is away, too old, or serves something else."""
        if temperature != 1.0:
            raise VllmError(
                f"rollout.temperature is {temperature}, and vLLM scores prompts at 1 only: set it "
                "to 1, or let the trainer run the teacher."
            )
        self._options, self._http = options, http
        self._clients = [HttpClient(url, http) for url in options.urls]
        deadline = Deadline(http.deadline_s)
        for client in self._clients:
            check_server(client, options.model, max_model_len, deadline)

    def replica(self, number: int) -> int:
        """Which replica scores the trajectories of that prompt."""
        digest = hashlib.blake2b(str(number).encode(), digest_size=8).digest()
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

    def _scored(self, row: Trajectory, deadline: Deadline) -> Tensor:
        client = self._clients[self.replica(row.number)]
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
        try:
            values = scored(reply, row.prompt_ids, row.response_ids)
        except ServerError as error:
            raise ServerError(
                f"server {client.name} gave a score that cannot be used: {error}."
            ) from error
        return torch.tensor(values, dtype=torch.float32)
