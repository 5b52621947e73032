"""The student's language model on its way to an engine, and the proof that it got there.

Only the language model travels: the audio tower is frozen and runs in the trainer. Each tensor
goes under the name that the checkpoint gives it, in the precision of the engine, and is gathered
from its shards when its turn comes, so that no rank ever holds a second copy of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from xopd.models import SpeechLM
from xopd.models.speech_lm import VISION_LEAVES, leaf_modules
from xopd.sharding import reshard, whole
from xopd.vllm.options import VllmError
from xopd.vllm.worker import bit_sum

# Checkpoint names of a language model; all else belongs to the towers.
LANGUAGE_MODEL = ("model.", "lm_head.")
# Parameters that every backend of vLLM keeps as they were loaded: neither fused with others nor
# repacked for a kernel. Each update moves them, so old weights show.
COMPARED = ("norm.weight", "embed_tokens.weight", "lm_head.weight")


class TensorInfo(NamedTuple):
    """What a tensor will be, before it is gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Fingerprint(NamedTuple):
    """Of one tensor: its elements and `bit_sum`."""

    elements: int
    bits: int


class LanguageModel:
    """The language model's tensors by checkpoint name, as often as they are iterated over.

    All ranks iterate together, once for each `begin`; `finish` makes up what one of them has left
    out. `fingerprint` holds what the last complete pass has sent.
    """

    def __init__(self, student: SpeechLM, dtype: torch.dtype) -> None:
        self._student, self._dtype = student, dtype
        self._pass: Iterator[tuple[str, Tensor]] | None = None
        self.fingerprint: dict[str, Fingerprint] = {}

    def begin(self) -> None:
        """A new pass is due."""
        reshard(self._student.model)  # a forward pass may have left bf16 copies of some weights
        self._pass = None

    def finish(self) -> None:
        """Take the rest of the pass, so that no rank waits for this one in a gather."""
        for _ in self if self._pass is None else self._pass:
            pass

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._tensors()
        return self._pass

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        self.fingerprint = {}
        for name, parameter in self._parameters():
            with torch.no_grad():
                tensor = whole(parameter.detach()).to(self._dtype)
            # One parameter may hold several tensors of the checkpoint: experts are stacked.
            for checkpoint_name, part in self._converted(name, tensor):
                if checkpoint_name.endswith(COMPARED):
                    self.fingerprint[checkpoint_name] = Fingerprint(part.numel(), bit_sum(part))
                yield checkpoint_name, part.contiguous()

    def infos(self) -> list[TensorInfo]:
        """What iteration will yield, in its order, without gathering anything."""
        return [
            TensorInfo(checkpoint_name, self._dtype, tuple(part.shape))
            for name, parameter in self._parameters()
            for checkpoint_name, part in self._converted(
                name, torch.empty(parameter.shape, dtype=self._dtype, device="meta")
            )
        ]

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """What belongs to the language model, trained or not."""
        frozen = {id(p) for tower in self._towers() for p in tower.parameters()}
        for name, parameter in self._student.model.named_parameters():
            if id(parameter) not in frozen:
                yield name, parameter

    def _towers(self) -> list[torch.nn.Module]:
        model = self._student.model
        return [*self._student.towers(), *leaf_modules(model, VISION_LEAVES)]

    def _converted(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        found = list(revert_weight_conversion(self._student.model, {name: tensor}).items())
        strange = [n for n, _ in found if not n.startswith(LANGUAGE_MODEL)]
        if strange or not found:
            raise VllmError(
                f"parameter {name!r} of {type(self._student.model).__name__} has no place in a "
                f"language model's checkpoint (it becomes {strange}): this family cannot be sent "
                "to vLLM yet; sample with generate."
            )
        return found


def fingerprint_request(expected: Mapping[str, Fingerprint]) -> str:
    """What `Fingerprints.xopd_fingerprint` takes."""
    return json.dumps(sorted(expected))


def check_fingerprint(
    expected: Mapping[str, Fingerprint], workers: Sequence[Mapping[str, Sequence[str]]]
) -> None:
    """Compare what was sent with what each worker of an engine holds; VllmError if it differs.

    A tensor is whole on a worker (perhaps padded by rows of zeros), or cut over all of them.
    """
    if not expected:
        raise VllmError("no weights were sent that could be compared: call update() first.")
    for name, sent in expected.items():
        held = [_fingerprint(name, worker[name]) for worker in workers if name in worker]
        if not held:
            raise VllmError(
                f"the engine has no parameter {name!r}: it serves another model than the student's "
                "language model, or renames it. Serve the folder that `write_folder` writes."
            )
        is_cut = any(part.elements < sent.elements for part in held)
        bits = [_wrapped(sum(p.bits for p in held))] if is_cut else [p.bits for p in held]
        if any(value != sent.bits for value in bits):
            raise VllmError(
                f"the engine's {name!r} is not what was sent: its weights are older, come from "
                "another run, or did not arrive whole. Restart the engine and resume the run."
            )


def _fingerprint(name: str, values: Sequence[str]) -> Fingerprint:
    try:
        elements, bits = (int(value) for value in values)
    except (TypeError, ValueError) as error:
        raise VllmError(f"the engine gives no fingerprint of {name!r} but {values!r}.") from error
    return Fingerprint(elements, bits)


def _wrapped(value: int) -> int:
    """A sum of 64-bit integers as their own addition would give it."""
    return (value + 2**63) % 2**64 - 2**63
