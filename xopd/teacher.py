"""Who scores what the student sampled: a model of the trainer's own, or servers.

The teacher reads the text prompt whatever the student heard: that is the cross-modal half of X-OPD
(paper, eq. 2). A server may fail to score a row; then the row has an error in place of a score, and
never a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xopd.errors import UserError
from xopd.models import TextLM
from xopd.rollout import generate
from xopd.scoring import score
from xopd.types import Modality, Prompt, Rollout
from xopd.vllm.teacher import Trajectory, VllmTeacher
from xopd_kernels.backend import BackendChoice

Score = Tensor | UserError  # [n] fp32: log pi_T(y_t | x_text, y_<t), or why there is none


class Teacher(Protocol):
    """What scores and, for the text base of an evaluation, answers."""

    def score(self, passes: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """A score of each rollout of this rank; all ranks call it with as many passes."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Greedy responses to the text prompts."""


@dataclass(frozen=True, slots=True)
class LocalTeacher:
    """A frozen model, sharded where the student is; scores through our kernels."""

    lm: TextLM
    temperature: float
    backend: BackendChoice

    def score(self, passes: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """See `Teacher`; each row has a score."""
        found = score(self.lm, passes, temperature=self.temperature, backend=self.backend)
        return [list(values) for values in found]

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[tuple[int, ...]]:
        """See `Teacher`."""
        return generate(self.lm, prompts, Modality.TEXT, max_new_tokens=max_new_tokens)


@dataclass(frozen=True, slots=True)
class ServedTeacher:
    """vLLM servers; each rank calls them for its own rows."""

    servers: VllmTeacher

    def score(self, passes: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """See `Teacher`; a row of no weight, which only fills a pass, is not sent."""
        sent = [row for rows in passes for row in rows if row.weight]
        found = iter(
            self.servers.score(
                [Trajectory(r.prompt.id, r.prompt.text_ids, r.response_ids) for r in sent]
            )
        )
        return [
            [next(found) if row.weight else torch.zeros(len(row.response_ids)) for row in rows]
            for rows in passes
        ]

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[tuple[int, ...]]:
        """See `Teacher`."""
        return self.servers.answer([prompt.text_ids for prompt in prompts], max_new_tokens)
