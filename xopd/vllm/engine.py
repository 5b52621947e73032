"""Rollouts by vLLM: one engine for the trainer, over a backend in this process or in a server.

The first rank holds the backend and tells the others what was sampled. Spoken prompts go in as the
embeddings that the trainer scores them with, so rollout and training cannot hear different audio.
After each update the engine proves that it has the new weights: bit sums of tensors that every
update moves must agree, and so must the log-probs of a few fresh tokens, within a tolerance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from xopd.config import RolloutConfig
from xopd.errors import UserError
from xopd.models import SpeechLM
from xopd.prompts import PromptStore
from xopd.rollout import Request, Sampled
from xopd.sharding import gathered
from xopd.types import Modality, Prompt, Rollout
from xopd.vllm.answers import Generated, Wanted
from xopd.vllm.options import EngineOptions, VllmError, check_temperature
from xopd.vllm.sync import Fingerprint, LanguageModel
from xopd.ranks import World

T = TypeVar("T")
Scorer = Callable[[Sequence[Rollout]], Sequence[Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROBE_SEED = 20_250_601  # any fixed number

_log = logging.getLogger(__name__)


class Call(NamedTuple):
    """One trajectory for a backend."""

    prompt_ids: tuple[int, ...]
    embeds: Tensor | None  # [T, D] on the CPU: given in place of the ids of a spoken prompt
    seed: int


class Sampling(NamedTuple):
    """What all calls of a run have in common."""

    temperature: float
    max_tokens: int
    vocabulary: int
    eos_id: int
    reserved: frozenset[int]

    def wanted(self, call: Call) -> Wanted:
        """What an answer to that call must agree with."""
        return Wanted(
            len(call.prompt_ids), self.max_tokens, self.vocabulary, self.eos_id, self.reserved
        )


class Backend(Protocol):
    """What holds the weights and samples; the first rank has one."""

    def load(self, weights: LanguageModel, version: int) -> None:
        """Take these weights, forget what older ones computed, and label samples from now on."""

    def check(self, expected: dict[str, Fingerprint], version: int) -> None:
        """Raise VllmError unless these are the weights, of that version."""

    def generate(self, calls: Sequence[Call], sampling: Sampling) -> list[Generated]:
        """One checked trajectory for each call, in order."""

    def rest(self) -> None:
        """No sample is wanted until weights are loaded."""

    def close(self) -> None:
        """Release everything."""


class VllmEngine:
    """`xopd.rollout.Engine` over vLLM. All ranks call each method together."""

    def __init__(
        self,
        student: SpeechLM,
        prompts: PromptStore,
        config: RolloutConfig,
        world: World,
        *,
        options: EngineOptions,
        backend: Backend | None,
        score: Scorer,
    ) -> None:
        """backend: on the first rank. score: the trainer's own log-probs of the student, at the
        temperature of the run and over what can be sampled; all ranks call it with equal rows.
        """
        if (backend is not None) != world.is_first:
            raise ValueError(f"rank {world.rank}: the first rank, and it alone, has a backend")
        self._student, self._prompts, self._world = student, prompts, world
        self._options, self._backend, self._score = options, backend, score
        self._sampling = sampling_of(student, config)
        self._weights = LanguageModel(student, DTYPES[options.dtype])
        self._version: int | None = None
        self._is_stale = True
        self.mismatch = 0.0  # largest difference of a log-prob to the trainer's, at the last sync

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        """See `Engine`. A seed gives the same noise in every batch; the log-probs that it is added
        to may differ in the last bits from batch to batch, so a near tie may fall the other way.
        """
        version = self._version
        if version is None or self._is_stale:
            raise VllmError("the engine has no current weights: call update() before sample().")
        calls, found = self._generate(requests, self._sampling)
        self._on_first(lambda backend: backend.check(self._weights.fingerprint, version))
        self._on_first(lambda backend: backend.rest())
        self._is_stale = self._options.sleep
        return [
            Sampled(
                request,
                len(call.prompt_ids),
                one.token_ids,
                one.is_finished,
                logprob=one.logprob,
                version=version,
            )
            for request, call, one in zip(requests, calls, found, strict=True)
        ]

    def update(self, version: int) -> None:
        """Send the weights, compare fingerprints, then log-probs; VllmError if they differ."""
        self._version, self._is_stale = None, True
        self._send(version)
        self._on_first(lambda backend: backend.check(self._weights.fingerprint, version))
        self.mismatch = self._probe()
        self._version, self._is_stale = version, False
        _log.info("weights %d are in vLLM; log-probs differ by up to %.1e", version, self.mismatch)

    def close(self) -> None:
        """Release what the backend holds."""
        if self._backend is not None:
            self._backend.close()

    def _send(self, version: int) -> None:
        def load(backend: Backend) -> None:
            try:
                backend.load(self._weights, version)
            finally:
                self._weights.finish()

        self._weights.begin()
        if self._backend is None:
            self._weights.finish()  # each tensor is gathered from all ranks
        self._on_first(load)

    def _probe(self) -> float:
        """The largest difference between the engine's and the trainer's log-probs of new tokens."""
        config = self._sampling._replace(
            max_tokens=min(self._options.probe_tokens, self._sampling.max_tokens)
        )
        requests = [Request(0, modality, PROBE_SEED) for modality in Modality]
        _, found = self._generate(requests, config)
        (prompt,) = self._prompts.load([0])
        rows = [
            Rollout(prompt, request.modality, one.token_ids, one.is_finished)
            for request, one in zip(requests, found, strict=True)
        ]
        worst = 0.0
        for row, one, own in zip(rows, found, self._score(rows), strict=True):
            gap = float((own.cpu().double() - torch.tensor(one.logprob).double()).abs().max())
            if not gap <= self._options.probe_tolerance:  # also refuses NaN
                raise VllmError(
                    f"after the weights were sent, vLLM's log-probs of a {row.modality.value} "
                    f"prompt differ from the trainer's by {gap:.3g} nat, more than probe_tolerance "
                    f"{self._options.probe_tolerance}. A wrong temperature, precision or model "
                    "does that; see docs/vllm.md."
                )
            worst = max(worst, gap)
        return worst

    def _generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> tuple[list[Call], list[Generated]]:
        calls = self._calls(requests)
        return calls, self._on_first(lambda backend: backend.generate(calls, sampling))

    def _calls(self, requests: Sequence[Request]) -> list[Call]:
        numbers = list(dict.fromkeys(request.number for request in requests))
        prompts = dict(zip(numbers, self._prompts.load(numbers), strict=True))
        spoken = dict.fromkeys(r.number for r in requests if r.modality is Modality.SPEECH)
        embeds = self._embedded([prompts[number] for number in spoken])
        by_number = dict(zip(spoken, embeds, strict=True))
        return [
            Call(
                prompts[request.number].ids(request.modality),
                by_number[request.number] if request.modality is Modality.SPEECH else None,
                request.seed,
            )
            for request in requests
        ]

    @torch.no_grad()
    def _embedded(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Spoken prompts as the student's language model reads them, [T, D] each."""
        model, device = self._student.model, self._student.device
        dtype = DTYPES[self._options.dtype]
        with gathered(model, [model.get_input_embeddings()]):
            return [
                self._student.embed(
                    torch.tensor([prompt.speech_ids], device=device), [prompt.audio]
                )[0].to("cpu", dtype)
                for prompt in prompts
            ]

    def _on_first(self, work: Callable[[Backend], T]) -> T:
        """What the first rank's backend says, on every rank; its error too, so that none waits."""
        outcome: tuple[T | None, str | None] = (None, None)
        if self._backend is not None:
            if self._world.size == 1:
                return work(self._backend)
            try:
                outcome = (work(self._backend), None)
            except UserError as error:
                outcome = (None, str(error))
        value, problem = self._world.first(outcome)
        if problem is not None:
            raise VllmError(problem)
        return value  # type: ignore[return-value]  # None only where T is


def sampling_of(student: SpeechLM, config: RolloutConfig) -> Sampling:
    """The policy that is trained, as an engine must sample it."""
    check_temperature(config.temperature)
    return Sampling(
        temperature=config.temperature,
        max_tokens=config.max_new_tokens,
        vocabulary=student.lm_head.out_features,
        eos_id=student.eos_id,
        reserved=frozenset(student.reserved_ids),
    )
