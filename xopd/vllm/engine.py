"""Rollouts by vLLM: one engine for the trainer, over a backend in this process or in a server.

The first rank holds the backend and tells the others what was sampled. Spoken prompts go in as the
embeddings that the trainer scores them with, so rollout and training cannot hear different audio.
After each update the engine proves that it has the new weights: bit sums of tensors that every
update moves must agree, and so must the log-probs of a few fresh tokens, within a tolerance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from xopd.errors import UserError
from xopd.models import SpeechLM
from xopd.prompts import PromptStore
from xopd.ranks import World
from xopd.rollout import Pending, Request, Sampled
from xopd.sections import Dtype, RolloutConfig
from xopd.sharding import gathered
from xopd.types import Modality, Prompt, Rollout
from xopd.vllm.answers import Generated, Wanted
from xopd.vllm.options import VllmConfig, VllmError
from xopd.vllm.sync import Fingerprint, LanguageModel

T = TypeVar("T")
Scorer = Callable[[Sequence[Rollout]], Sequence[Tensor]]
DTYPES = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16}
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
        options: VllmConfig,
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
        self._is_sampling = False

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        """See `Engine`. A seed gives the same noise in every batch; the log-probs that it is added
        to may differ in the last bits from batch to batch, so a near tie may fall the other way.
        """
        version = self._current()
        calls, found = self._generate(requests, self._sampling)
        return self._sampled(requests, calls, found, version)

    def begin(self, requests: Sequence[Request]) -> Pending:
        """See `Engine`; the backend samples in a thread of the first rank meanwhile."""
        version = self._current()
        calls = self._calls(requests)
        backend, sampling = self._backend, self._sampling
        task = None if backend is None else _Task(lambda: backend.generate(calls, sampling))
        self._is_sampling = True

        def finish() -> list[Sampled]:
            self._is_sampling = False
            found = self._world.on_first(lambda: task.result() if task else [])
            return self._sampled(requests, calls, found, version)

        return finish

    def update(self, version: int) -> float:
        """Send the weights, compare fingerprints, then log-probs; VllmError if they differ."""
        if self._is_sampling:
            raise ValueError("new weights while rollouts are under way: ask for their result first")
        self._version, self._is_stale = None, True
        self._send(version)
        self._on_first(lambda backend: backend.check(self._weights.fingerprint, version))
        mismatch = self._probe()
        self._version, self._is_stale = version, False
        if self._world.is_first:
            _log.info("weights %d are in vLLM; log-probs differ by up to %.1e", version, mismatch)
        return mismatch

    def close(self) -> None:
        """Release what the backend holds."""
        if self._backend is not None:
            self._backend.close()

    def _current(self) -> int:
        """The version of the weights that sample now."""
        if self._version is None or self._is_stale:
            raise VllmError("the engine has no current weights: call update() before sample().")
        return self._version

    def _sampled(
        self,
        requests: Sequence[Request],
        calls: Sequence[Call],
        found: Sequence[Generated],
        version: int,
    ) -> list[Sampled]:
        """What was generated, once it is certain that those weights generated it."""
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

        def ask() -> T:
            if self._backend is None:
                raise ValueError("the first rank, and it alone, has a backend")
            return work(self._backend)

        return self._world.on_first(ask)


class _Task(Generic[T]):
    """Work in a thread that no exit of the process waits for."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._found: list[T] = []
        self._error: UserError | None = None
        self._thread = Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._work())
        except UserError as error:
            self._error = error

    def result(self) -> T:
        """Waits for it; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if not self._found:
            raise RuntimeError("sampling failed in its thread, whose traceback is above")
        return self._found[0]


def sampling_of(student: SpeechLM, config: RolloutConfig) -> Sampling:
    """The policy that is trained, as an engine must sample it."""
    return Sampling(
        temperature=config.temperature,
        max_tokens=config.max_new_tokens,
        vocabulary=student.lm_head.out_features,
        eos_id=student.eos_id,
        reserved=frozenset(student.reserved_ids),
    )
