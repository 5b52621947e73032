"""Evaluation: the paper's own table, probes, and counting of correct answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from xopd import evaluate
from xopd.data.corpus import SpokenPrompt
from xopd.data.world import PROBES
from xopd.evaluate import (
    Accuracy,
    answer_accuracy,
    average_drop,
    build_evaluation_set,
    evaluate_student,
    probe_prompt,
)
from xopd.models import SpeechLM, TextLM
from xopd.teacher import LocalTeacher
from xopd.types import Modality, Prompt

# arXiv 2603.24596, table 1: BIG Bench Audio, Audio MultiChallenge, VoiceBench.
BASE = {
    "gpt4o": (90.27, 32.13, 92.61),
    "ministral": (59.70, 22.67, 76.03),
    "qwen25": (74.07, 17.00, 81.06),
    "qwen3": (97.72, 29.31, 91.00),
    "gemini25": (98.50, 43.22, 94.32),
    "gemini3": (95.28, 49.21, 95.32),
}
TABLE = [  # model and modality (S speech, T text), text base, scores, average drop as printed
    ("GPT-4o-Audio S", "gpt4o", (88.50, 24.57, 89.69), 9.55),
    ("Gemini 2.5 S", "gemini25", (81.42, 26.37, 86.13), 21.67),
    ("Gemini 3 S", "gemini3", (80.77, 42.70, 92.21), 10.57),
    ("Voxtral S", "ministral", (47.73, 12.80, 49.55), 32.81),
    ("Voxtral T", "ministral", (59.80, 17.27, 71.41), 9.91),
    ("Qwen2.5-Omni-7B S", "qwen25", (62.22, 13.56, 72.35), 15.66),
    ("Qwen2.5-Omni-7B T", "qwen25", (66.49, 12.66, 74.77), 14.51),
    ("Qwen3-Omni-A3B S", "qwen3", (85.67, 23.57, 89.22), 11.29),
    ("Qwen3-Omni-A3B T", "qwen3", (92.10, 26.14, 91.04), 5.51),
    ("SFT S", "qwen3", (87.52, 15.04, 82.66), 22.76),
    ("SFT T", "qwen3", (85.30, 19.25, 86.06), 17.49),
    ("offline KD S", "qwen3", (87.08, 17.73, 83.31), 19.62),
    ("offline KD T", "qwen3", (86.18, 21.27, 85.71), 15.02),
    ("GKD S", "qwen3", (84.26, 18.13, 83.03), 20.23),
    ("GKD T", "qwen3", (85.43, 20.76, 85.82), 15.81),
    ("X-OPD S", "qwen3", (93.41, 28.14, 89.29), 3.43),
    ("X-OPD T", "qwen3", (96.85, 28.66, 91.18), 0.97),
    ("X-OPD, A22B teacher S", "qwen3", (91.91, 26.62, 89.60), 5.55),
    ("X-OPD, A22B teacher T", "qwen3", (95.29, 27.86, 91.67), 2.23),
    ("text-only OPD S", "qwen3", (91.76, 25.44, 89.70), 6.91),
    ("text-only OPD T", "qwen3", (96.01, 27.62, 91.21), 2.43),
    ("speech-only OPD S", "qwen3", (92.74, 27.02, 88.89), 5.08),
    ("speech-only OPD T", "qwen3", (95.22, 27.74, 91.31), 2.52),
]


def named(scores: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("bba", "amc", "voicebench"), scores, strict=True))


@pytest.mark.parametrize(("base", "scores", "printed"), [row[1:] for row in TABLE])
def test_average_drop_is_that_of_the_paper(
    base: str, scores: tuple[float, float, float], printed: float
) -> None:
    # The table is rounded to two digits, and so are the scores it was made from.
    assert average_drop(named(BASE[base]), named(scores)) == pytest.approx(printed, abs=0.011)


def test_average_drop_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="same benchmarks"):
        average_drop({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        average_drop({}, {})
    with pytest.raises(ValueError, match="score of 0"):
        average_drop({"a": 0.0}, {"a": 1.0})


def test_accuracy_counts_by_task_in_any_batch_size(
    student: SpeechLM, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt of each task is answered wrongly, the others rightly."""
    picked = prompts[:10]
    tasks = sorted({p.task for p in picked})
    wrong = {next(p for p in picked if p.task == task).id for task in tasks}

    def answer(batch: Sequence[Prompt]) -> list[tuple[int, ...]]:
        assert len(batch) <= 4
        responses = []
        for prompt in batch:
            words = "no" if prompt.id in wrong else f"so answer {prompt.reference}"
            responses.append((*student.tokenizer(words).input_ids, student.eos_id))
        return responses

    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)
    found = answer_accuracy(answer, student.tokenizer, picked, Modality.TEXT)
    assert found.accuracy == pytest.approx(100 * (10 - len(wrong)) / 10)
    for task in tasks:
        count = sum(p.task == task for p in picked)
        assert found.by_task[task] == pytest.approx(100 * (count - 1) / count)
    nothing = answer_accuracy(answer, student.tokenizer, [], Modality.SPEECH)
    assert nothing == Accuracy(0.0, {})


def test_probes_keep_the_clip_and_ask_in_text(
    student: SpeechLM, prompts: list[Prompt], records: list[SpokenPrompt]
) -> None:
    prompt, record = prompts[0], records[0]
    expected = {"transcribe": record.text, "speaker": record.speaker, "speed": record.speed}
    for probe in PROBES:
        asked = probe_prompt(student, prompt, record, probe)
        assert asked.audio is prompt.audio
        assert asked.reference == expected[probe.name]
        assert asked.task == probe.name
        assert asked.speech_ids.count(student.audio_id) == prompt.audio.shape[0]
        question = tuple(student.tokenizer(probe.question).input_ids)
        assert asked.speech_ids[-len(question) - 1 : -1] == question


def test_an_evaluation_record(
    student: SpeechLM,
    teacher: TextLM,
    records: list[SpokenPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = build_evaluation_set(
        student,
        LocalTeacher(teacher, 1.0, "auto"),
        records[:4],
        records[4:6],
        split="test",
        max_new_tokens=3,
    )
    record = evaluate_student(student, data, step=7, max_new_tokens=3)
    assert (record["step"], record["split"], record["count"]) == (7, "test", 4)
    assert set(record["probes"]) == {"transcribe", "speaker", "speed"}
    assert "held_out_voice" in record
    # A random teacher solves nothing, so a relative drop is undefined and left out.
    assert data.teacher_text.accuracy == 0.0
    assert "average_drop_speech" not in record
    half = dict.fromkeys(data.teacher_text.by_task, 50.0)
    object.__setattr__(data, "teacher_text", Accuracy(50.0, half))
    record = evaluate_student(student, data, step=7, max_new_tokens=3)
    assert record["average_drop_speech"] == record["average_drop_text"] == 100.0
