"""What must hold before the first step; each check ends a run that could only waste compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from xopd.data.corpus import SpokenPrompt, decode_audio, log_mel
from xopd.errors import UserError
from xopd.models import SpeechLM, TextLM, Vocabulary
from xopd.models.prompting import speech_prompt, text_prompt
from xopd.scoring import score
from xopd.sharding import gathered
from xopd.types import Modality, Prompt, Rollout
from xopd_kernels.backend import BackendChoice

MAX_UNSHARED_SHARE = 0.01
# Nat. A model that ignores its audio scores both passes bit for bit alike.
MIN_LOGPROB_CHANGE = 1e-6


class GuardError(UserError):
    """A run that must not start, why, and what to change."""


def check_pair(student: SpeechLM, teacher: TextLM | Vocabulary) -> SpeechLM:
    """Student and teacher must mean the same token by an id, and end on the same one.

    Returns the student with every id that the teacher cannot score (padding rows of lm_head,
    ids with another token) reserved, so that no rollout samples it. Media placeholders are
    reserved already. Raises GuardError when EOS differs or over 1 % of the vocabulary does.
    """
    if student.eos_id != teacher.eos_id:
        raise GuardError(
            f"student ends on id {student.eos_id}, teacher on {teacher.eos_id}: lengths would "
            "run away. Use a teacher of the student's family, or align eos_token_id."
        )
    student_token = {i: token for token, i in student.tokenizer.get_vocab().items()}
    teacher_token = {i: token for token, i in teacher.tokenizer.get_vocab().items()}
    shared = {
        i
        for i, token in student_token.items()
        if i < teacher.classes and teacher_token.get(i) == token
    }
    unshared = set(student_token) - shared - set(student.reserved_ids)
    if len(unshared) > MAX_UNSHARED_SHARE * len(student_token):
        example = min(unshared)
        raise GuardError(
            f"{len(unshared)} of {len(student_token)} ids mean another token to the teacher "
            f"(first: {example} is {student_token[example]!r} and {teacher_token.get(example)!r}). "
            "The advantage compares the same token under both models: use the same tokenizer."
        )
    rows = range(student.lm_head.weight.shape[0])
    reserved = (set(rows) - shared) | set(student.reserved_ids)
    return replace(student, reserved_ids=tuple(sorted(reserved - {student.eos_id})))


def check_prompts(student: SpeechLM, records: Sequence[SpokenPrompt]) -> None:
    """The text prompt that the teacher reads must hold no media placeholder."""
    for record in records:
        if student.audio_id in text_prompt(student.tokenizer, record.text):
            raise GuardError(
                f"prompt {record.id!r}: its text renders to an audio placeholder; remove the "
                "special token from the text."
            )


def check_audio_dependence(
    student: SpeechLM, record: SpokenPrompt, *, response_ids: Sequence[int], backend: BackendChoice
) -> float:
    """Another clip must give other log-probs, through tower, embedding and fused head.

    The record's log-mel is scored as it is and reversed in time. Returns the largest change of a
    token's log-prob in nats; raises GuardError when it is below ``MIN_LOGPROB_CHANGE``. A fused
    head that drops the audio is a known fault of other trainers: no error, only a student that
    learns to answer a question it never heard.
    """
    (clip,) = log_mel([decode_audio(record)], student.feature_extractor)
    with torch.no_grad(), gathered(student.model, student.towers()):
        heard = [student.encode_audio([f])[0] for f in (clip, clip[:, ::-1].copy())]
    scored = []
    for audio in heard:
        ids = speech_prompt(student.tokenizer, student.audio_id, audio.shape[0])
        prompt = Prompt(record.id, record.task, ids, ids, audio, record.text, record.answer)
        rollout = Rollout(prompt, Modality.SPEECH, tuple(response_ids), is_finished=True)
        ((logprob,),) = score(student, [[rollout]], temperature=1.0, backend=backend)
        scored.append(logprob)
    change = float((scored[0] - scored[1]).abs().max())
    if not change >= MIN_LOGPROB_CHANGE:  # also refuses NaN
        raise GuardError(
            f"log-probs move by {change:.1e} nat when the audio is reversed (at least "
            f"{MIN_LOGPROB_CHANGE:.0e} expected): the student does not hear its prompts. Check "
            "that input embeddings, not only token ids, reach the language model."
        )
    return change
