"""A rollout engine beside the trainer, for tests: generate that also says log-probs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from xopd import run as run_module
from xopd.config import Config
from xopd.models import SpeechLM
from xopd.parts import kernel_backend
from xopd.prompts import PromptStore
from xopd.ranks import World
from xopd.rollout import GenerateEngine, Pending, Request, Sampled
from xopd.scoring import score
from xopd.types import Rollout


class Telling(GenerateEngine):
    """Its log-probs are the student's, off by a given amount."""

    def __init__(
        self, student: SpeechLM, prompts: PromptStore, config: Config, world: World, offset: float
    ) -> None:
        super().__init__(student, prompts, config.rollout, world)
        self._backend, self._offset = kernel_backend(config), offset

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        found = super().sample(requests)
        prompts = self._prompts.load([s.request.number for s in found])
        rows = [
            Rollout(p, s.modality, s.response_ids, s.is_finished)
            for p, s in zip(prompts, found, strict=True)
        ]
        (scores,) = score(self._student, [rows], temperature=1.0, backend=self._backend)
        return [
            s._replace(logprob=tuple((row + self._offset).tolist()))
            for s, row in zip(found, scores, strict=True)
        ]

    def begin(self, requests: Sequence[Request]) -> Pending:
        found = self.sample(requests)
        return lambda: found


def tell(patch: pytest.MonkeyPatch, offset: float) -> None:
    """Runs whose config asks for vLLM get this engine."""

    def make(config: Config, student: SpeechLM, prompts: PromptStore, world: World) -> Telling:
        return Telling(student, prompts, config, world, offset)

    patch.setattr(run_module, "check_reachable", lambda config, world: None)
    patch.setattr(run_module, "make_engine", make)
