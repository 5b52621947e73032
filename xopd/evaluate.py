"""Evaluation: accuracy from speech and from text, average drop, and the forgetting probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from xopd.data.corpus import SpokenPrompt
from xopd.data.world import PROBES, Probe, answer_of, is_correct
from xopd.models import SpeechLM
from xopd.models.prompting import speech_prompt
from xopd.prompts import encode_prompts
from xopd.ranks import ALONE, World
from xopd.rollout import generate
from xopd.teacher import Teacher
from xopd.types import Modality, Prompt

BATCH_SIZE = 200


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Percent of correct greedy answers, over all prompts and by task family."""

    accuracy: float
    by_task: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        return {"accuracy": self.accuracy, "by_task": self.by_task}


def average_drop(text_base: Mapping[str, float], scores: Mapping[str, float]) -> float:
    """Average drop in percent: mean over benchmarks of (base - score) / base * 100.

    ``text_base`` holds the text-only model's scores. Not clipped: a benchmark where the model
    beats the base counts negatively (arXiv 2603.24596, table 1). Raises ValueError when the two
    do not name the same benchmarks or a base score is 0.
    """
    if set(text_base) != set(scores) or not text_base:
        raise ValueError(
            f"text_base has {sorted(text_base)}, scores has {sorted(scores)}: they must name the "
            "same benchmarks, at least one."
        )
    if any(base == 0 for base in text_base.values()):
        raise ValueError("text_base has a score of 0; a relative drop is undefined.")
    drops = [100.0 * (base - scores[name]) / base for name, base in text_base.items()]
    return sum(drops) / len(drops)


Answer = Callable[[Sequence[Prompt]], list[tuple[int, ...]]]  # responses to a batch of prompts


def answer_accuracy(
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    modality: Modality,
    *,
    world: World = ALONE,
) -> Accuracy:
    """Answers to ``prompts`` in one modality, checked against their references.

    Batches of ``BATCH_SIZE`` are dealt out over the ranks.
    """
    order = sorted(prompts, key=lambda p: len(p.ids(modality)))
    batches = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]

    def marks(number: int) -> list[tuple[str, bool]]:
        batch = batches[number]
        return [
            (p.task, is_correct(p.task, decoded(tokenizer, response), p.reference))
            for p, response in zip(batch, answer(batch), strict=True)
        ]

    correct: dict[str, list[bool]] = {}
    for task, mark in (item for part in world.deal(len(batches), marks) for item in part):
        correct.setdefault(task, []).append(mark)
    every = [mark for found in correct.values() for mark in found]
    by_task = {task: _percent(found) for task, found in sorted(correct.items())}
    return Accuracy(accuracy=_percent(every), by_task=by_task)


def decoded(tokenizer: PreTrainedTokenizerBase, response: Sequence[int]) -> str:
    """The words of a response, without special tokens."""
    return str(tokenizer.decode(list(response), skip_special_tokens=True))


def _percent(marks: Sequence[bool]) -> float:
    return 100.0 * sum(marks) / len(marks) if marks else 0.0


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Everything that an evaluation reads, encoded once per run (the tower is frozen)."""

    split: str
    prompts: list[Prompt]
    held_out_voice: list[Prompt]
    probes: dict[str, list[Prompt]]  # probe name -> prompts with its written question
    teacher_text: Accuracy  # the text base of the average drop


def probe_prompt(student: SpeechLM, prompt: Prompt, record: SpokenPrompt, probe: Probe) -> Prompt:
    """The same clip followed by the probe's written question; no text form exists for it."""
    ids = speech_prompt(student.tokenizer, student.audio_id, prompt.audio.shape[0], probe.question)
    reference = answer_of(probe, record)
    return replace(prompt, task=probe.name, text_ids=(), speech_ids=ids, reference=reference)


def build_evaluation_set(
    student: SpeechLM,
    teacher: Teacher,
    records: Sequence[SpokenPrompt],
    held_out_voice: Sequence[SpokenPrompt],
    *,
    split: str,
    max_new_tokens: int,
    world: World = ALONE,
) -> EvaluationSet:
    """Encode the clips, render the probes and measure the teacher's text accuracy."""
    prompts = encode_prompts(student, records)
    probes: dict[str, list[Prompt]] = {
        probe.name: [
            probe_prompt(student, prompt, record, probe)
            for prompt, record in zip(prompts, records, strict=True)
        ]
        for probe in PROBES
    }
    return EvaluationSet(
        split=split,
        prompts=prompts,
        held_out_voice=encode_prompts(student, held_out_voice) if held_out_voice else [],
        probes=probes,
        teacher_text=answer_accuracy(
            partial(teacher.answer, max_new_tokens=max_new_tokens),
            student.tokenizer,  # `check_pair` has seen that both mean the same
            prompts,
            Modality.TEXT,
            world=world,
        ),
    )


def evaluate_student(
    student: SpeechLM,
    data: EvaluationSet,
    *,
    step: int,
    max_new_tokens: int,
    world: World = ALONE,
) -> dict[str, object]:
    """All figures of one evaluation as a JSON-able record (``eval/*.json`` of a run)."""

    def accuracy(prompts: Sequence[Prompt], modality: Modality) -> Accuracy:
        def answer(batch: Sequence[Prompt]) -> list[tuple[int, ...]]:
            return generate(student, batch, modality, max_new_tokens=max_new_tokens)

        return answer_accuracy(answer, student.tokenizer, prompts, modality, world=world)

    speech = accuracy(data.prompts, Modality.SPEECH)
    text = accuracy(data.prompts, Modality.TEXT)
    record: dict[str, object] = {
        "step": step,
        "split": data.split,
        "count": len(data.prompts),
        "speech": speech.to_dict(),
        "text": text.to_dict(),
        "teacher_text": data.teacher_text.to_dict(),
        "probes": {
            name: accuracy(prompts, Modality.SPEECH).accuracy
            for name, prompts in data.probes.items()
        },
    }
    if all(base > 0 for base in data.teacher_text.by_task.values()):
        # Left out for a teacher that fails a whole family: a relative drop is undefined then.
        record["average_drop_speech"] = average_drop(data.teacher_text.by_task, speech.by_task)
        record["average_drop_text"] = average_drop(data.teacher_text.by_task, text.by_task)
    if data.held_out_voice:
        record["held_out_voice"] = accuracy(data.held_out_voice, Modality.SPEECH).to_dict()
    return record
