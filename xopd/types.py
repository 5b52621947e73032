"""The records that travel through a training step, one per prompt and one per rollout.

Everything that belongs to a rollout lives in its record, so that nothing can be misaligned: there
are no parallel lists. Stages take records and return new ones; only the training loop owns state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Modality(Enum):
    """How the student receives the prompt. The teacher always reads the text."""

    TEXT = "text"
    SPEECH = "speech"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One instruction in both forms, strictly aligned in intent."""

    id: str
    task: str
    text_ids: tuple[int, ...]  # student and teacher read this in the text modality
    speech_ids: tuple[int, ...]  # the same turn with one audio placeholder per audio embedding
    audio: Tensor  # [A, D] fp32: audio tower + adapter output, computed once per clip
    text: str  # for people: the words of the instruction
    reference: str  # checkable answer; used by evaluation and reports, never by the loss

    def ids(self, modality: Modality) -> tuple[int, ...]:
        """Token ids of the student's prompt in the given modality."""
        return self.text_ids if modality is Modality.TEXT else self.speech_ids


@dataclass(frozen=True, slots=True)
class Rollout:
    """One trajectory y sampled by the student from one prompt in one modality."""

    prompt: Prompt
    modality: Modality
    response_ids: tuple[int, ...]  # n sampled tokens; EOS included when it was sampled
    is_finished: bool  # False: cut at max_new_tokens
    teacher_logprob: Tensor | None = None  # [n] fp32: log pi_T(y_t | x_text, y_<t)
    old_logprob: Tensor | None = None  # [n] fp32: log pi_old(y_t | x, y_<t); None: on-policy
    engine_logprob: Tensor | None = None  # [n] fp32: what sampled it says; None: it says nothing
    importance: Tensor | None = None  # [n] fp32: weight of each token; None: 1
    weight: float = 1.0  # in the loss; 0: a row that only fills a pass of this rank
