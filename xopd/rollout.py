"""Rollouts: the student answers each prompt, in speech and in text.

Sampling is from the whole distribution at the given temperature (no top-k, no top-p): a truncated
support would bias the ratio and the reverse KL. Ids of media placeholders can never be sampled,
because re-scoring would take them for audio. Each trajectory has a seed of its own, so that the
same ones are drawn whatever the batch size, the number of ranks, and wherever a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from xopd.config import RolloutConfig
from xopd.models import SpeechLM, TextLM
from xopd.prompts import PromptStore
from xopd.ranks import World
from xopd.sharding import is_sharded
from xopd.types import Modality, Prompt


class Request(NamedTuple):
    """One trajectory to sample."""

    number: int  # of the prompt in its split
    modality: Modality
    seed: int


class Sampled(NamedTuple):
    """What an engine answers to a request; small, because every rank gets all of a step."""

    request: Request
    prompt_tokens: int
    response_ids: tuple[int, ...]  # EOS included when it was sampled
    is_finished: bool  # False: cut at max_new_tokens
    logprob: tuple[float, ...] | None = None  # of each token, by the engine; None: it gives none
    version: int = 0  # of the weights that sampled: the number of updates behind them

    @property
    def modality(self) -> Modality:
        """How the student received the prompt."""
        return self.request.modality

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        logprob = None if self.logprob is None else list(self.logprob)
        return self._asdict() | {
            "request": self.request._asdict() | {"modality": self.modality.value},
            "response_ids": list(self.response_ids),
            "logprob": logprob,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sampled:
        """What `to_dict` wrote."""
        request = values["request"]
        logprob = values["logprob"]
        return cls(
            Request(request["number"], Modality(request["modality"]), request["seed"]),
            values["prompt_tokens"],
            tuple(values["response_ids"]),
            values["is_finished"],
            None if logprob is None else tuple(logprob),
            values["version"],
        )


Pending: TypeAlias = Callable[[], list[Sampled]]  # waits for what was begun


class Engine(Protocol):
    """What samples. All ranks call each method together, with the same requests."""

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        """One trajectory for each request, in their order, on every rank."""

    def begin(self, requests: Sequence[Request]) -> Pending:
        """Start on these with the weights of now; `update` comes after the result is asked for."""

    def update(self, version: int) -> float:
        """Sample from now on with the student's weights as they are.

        Returns the largest difference of a log-prob to the trainer's own, in nat; 0 for an engine
        that is the student itself.
        """

    def close(self) -> None:
        """Release what the engine holds."""


def requests_of_step(
    numbers: Sequence[int],
    modalities: Sequence[Modality],
    *,
    rollouts_per_prompt: int,
    seed: int,
    step: int,
) -> list[Request]:
    """G requests for each prompt and modality; a pure function of its arguments."""
    return [
        Request(number, modality, _seed(f"{seed}/{step}/{modality.value}/{place}/{sample}"))
        for modality in modalities
        for place, number in enumerate(numbers)
        for sample in range(rollouts_per_prompt)
    ]


def _seed(name: str) -> int:
    """63 bits that depend on every part of the name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


class GenerateEngine:
    """`transformers.generate` on the student itself; each rank takes a share of the batches."""

    def __init__(
        self, student: SpeechLM, prompts: PromptStore, config: RolloutConfig, world: World
    ) -> None:
        self._student, self._prompts, self._config, self._world = student, prompts, config, world
        self._version = 0

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        """See `Engine`; the same trajectories for any number of ranks."""
        batches = list(_batches(requests, self._config.batch_size))
        answers = self._world.deal(len(batches), lambda number: self._batch(batches[number]))
        return [sampled for answer in answers for sampled in answer]

    def begin(self, requests: Sequence[Request]) -> Pending:
        """See `Engine`; it computes where the trainer does, so nothing is left to wait for."""
        sampled = self.sample(requests)
        return lambda: sampled

    def update(self, version: int) -> float:
        """The weights are the student's own."""
        self._version = version
        return 0.0

    def close(self) -> None:
        """Nothing is held."""

    def _batch(self, batch: Sequence[Request]) -> list[Sampled]:
        prompts = self._prompts.load([request.number for request in batch])
        modality = batch[0].modality
        responses = generate(
            self._student,
            prompts,
            modality,
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            seeds=[request.seed for request in batch],
        )
        return [
            Sampled(
                request,
                len(prompt.ids(modality)),
                response,
                response[-1] == self._student.eos_id,
                version=self._version,
            )
            for request, prompt, response in zip(batch, prompts, responses, strict=True)
        ]


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Runs of one modality: a batch of both would be padded to the length of the spoken ones."""
    for _, group in groupby(requests, key=lambda request: request.modality):
        of_modality = list(group)
        for start in range(0, len(of_modality), size):
            yield of_modality[start : start + size]


class _Gumbel(LogitsProcessor):  # type: ignore[misc]  # transformers has no stubs for it
    """Scores whose arg-max is a sample: logits / T + Gumbel noise (the Gumbel-max trick).

    Each row draws from a generator of its own, one value for each class and token, so that what a
    row samples depends on its seed and its logits alone.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)  # [B, V] fp32
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        # 0 is drawn where the uniform number behind it rounds to 0, and would always win.
        return scores / self._temperature - noise.clamp_min_(2.0**-25).log_()


def left_padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, T] int64, padded on the left for generation."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def generate(
    lm: SpeechLM | TextLM,
    prompts: Sequence[Prompt],
    modality: Modality,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[tuple[int, ...]]:
    """Responses to prompts in one modality; EOS is part of a response that ended.

    temperature: 0 is greedy decoding. seeds: one for each prompt where the temperature is above 0.
    """
    if temperature > 0 and len(seeds) != len(prompts):
        raise ValueError(f"temperature {temperature} needs a seed a prompt, got {len(seeds)} seeds")
    model = lm.model
    model.eval()
    device = lm.device
    pad_id = int(lm.tokenizer.pad_token_id)
    ids, mask = left_padded([prompt.ids(modality) for prompt in prompts], pad_id, device)
    if isinstance(lm, SpeechLM):
        is_speech = modality is Modality.SPEECH
        embedded = lm.embed(ids, [prompt.audio for prompt in prompts] if is_speech else [])
    else:
        embedded = lm.embed(ids)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the noise below samples
        suppress_tokens=list(lm.reserved_ids) if isinstance(lm, SpeechLM) else None,
        pad_token_id=pad_id,
        eos_token_id=lm.eos_id,
        use_cache=True,
    )
    noise = [_Gumbel(seeds, temperature, device)] if temperature > 0 else []
    # What settings leaves open, generate would take from the checkpoint's own generation config: a
    # repetition penalty there would sample another policy than the one that is scored.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            inputs_embeds=embedded,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList(noise),
            # Ranks whose batch has ended go on until the last one has: they hold its weights.
            synced_gpus=is_sharded(model),
        )
    finally:
        model.generation_config = own
    return [_until_eos(row, lm.eos_id) for row in output.tolist()]


def _until_eos(row: list[int], eos_id: int) -> tuple[int, ...]:
    return tuple(row[: row.index(eos_id) + 1]) if eos_id in row else tuple(row)
