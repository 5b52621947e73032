"""The instruction world: answers against an independent solver, closed vocabulary, splits."""

import random
from dataclasses import dataclass

import pytest

from xopd.data.world import (
    MAX_RESPONSE_TOKENS,
    NUMBERS,
    PROBES,
    PROMPT_SPLITS,
    TASKS,
    VOCABULARY,
    Probe,
    Problem,
    answer_of,
    draw,
    extract_answer,
    is_correct,
    split_of,
)

VALUE = {word: value for value, word in enumerate(NUMBERS)}


def problems(count: int) -> list[Problem]:
    rng = random.Random(11)
    return [
        draw(rng, task, split) for _ in range(count) for task in TASKS for split in PROMPT_SPLITS
    ]


PROBLEMS = problems(60)


def solve(text: str) -> str:
    """Solves a text from its words alone, sharing no code with the world."""
    words = text.split()
    numbers = [VALUE[word] for word in words if word in VALUE]
    if text.startswith("start with"):
        total = numbers[0]
        signs = [1 if word == "add" else -1 for word in words if word in ("add", "take")]
        for sign, number in zip(signs, numbers[1:], strict=True):
            total += sign * number
            assert 0 <= total <= 20
        return NUMBERS[total]
    if text.startswith("which is the"):
        return NUMBERS[sorted(numbers)[-1 if "largest" in words else 0]]
    if text.startswith("how many times"):
        return NUMBERS[numbers[1:].count(numbers[0])]
    kept = sorted(numbers) if text.startswith("put in order") else list(reversed(numbers))
    return " ".join(NUMBERS[number] for number in kept)


def test_answers_agree_with_an_independent_solver() -> None:
    for problem in PROBLEMS:
        assert problem.answer == solve(problem.text), problem


def test_solution_ends_in_the_answer_and_fits_the_response_limit() -> None:
    for problem in PROBLEMS:
        assert extract_answer(problem.solution) == problem.answer
        assert is_correct(problem.task, problem.solution, problem.answer)
        assert problem.solution.endswith(f"so answer {problem.answer}")
        assert len(problem.solution.split()) + 1 <= MAX_RESPONSE_TOKENS
        assert len(problem.text.split()) + 1 <= MAX_RESPONSE_TOKENS  # the transcribe probe


def test_calc_steps_are_true_equations() -> None:
    for problem in (p for p in PROBLEMS if p.task == "calc"):
        for step in problem.solution.split(" . ")[:-1]:
            left, sign, right, gives, result = step.split()
            expected = VALUE[left] + (1 if sign == "plus" else -1) * VALUE[right]
            assert (gives, VALUE[result]) == ("gives", expected)


def test_calc_answers_reach_both_ends() -> None:
    rng = random.Random(2)
    answers = {VALUE[draw(rng, "calc").answer] for _ in range(600)}
    assert {0, 1, 18, 19} <= answers


def test_vocabulary_is_closed_and_has_no_repeats() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    used = {w for p in PROBLEMS for w in f"{p.text} {p.solution} {p.answer}".split()}
    used |= {w for probe in PROBES for w in f"{probe.question} {' '.join(probe.choices)}".split()}
    assert used <= set(VOCABULARY)


def test_split_depends_on_the_text_alone() -> None:
    texts = {split: set[str]() for split in PROMPT_SPLITS}
    for seed in range(3):
        rng = random.Random(seed)
        for split in PROMPT_SPLITS:
            texts[split] |= {draw(rng, split=split).text for _ in range(150)}
    for split, members in texts.items():
        assert {split_of(text) for text in members} == {split}
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & (texts["train"] | texts["test"])


def test_split_shares() -> None:
    counts = dict.fromkeys(PROMPT_SPLITS, 0)
    for number in range(20_000):
        counts[split_of(f"text {number}")] += 1
    # Five standard deviations of a binomial with 20,000 trials are at most 1.5 %.
    for split, share in {"train": 0.80, "dev": 0.05, "test": 0.15}.items():
        assert abs(counts[split] / 20_000 - share) < 0.015


def test_draw_repeats_with_the_seed_and_covers_the_tasks() -> None:
    first = [draw(random.Random(5)) for _ in range(2)]
    assert first[0] == first[1]
    rng = random.Random(0)
    assert {draw(rng).task for _ in range(100)} == set(TASKS)


@pytest.mark.parametrize(("task", "split"), [("clac", "train"), ("calc", "valid")])
def test_draw_refuses_unknown_names(task: str, split: str) -> None:
    with pytest.raises(ValueError, match="use one of"):
        draw(random.Random(0), task, split)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("one plus two gives three . so answer three", "three"),
        ("so answer one . so answer two", "two"),
        ("so answer one three", "one three"),
        ("so answer", ""),
        ("three", None),
    ],
)
def test_extract_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_is_correct() -> None:
    assert is_correct("sort", "so answer one  two", "one two")
    assert not is_correct("sort", "one two", "one two")  # a task must say "answer"
    assert not is_correct("sort", "so answer one two two", "one two")
    assert is_correct("speaker", "male", "male")
    assert is_correct("speaker", "so answer male", "male")
    assert not is_correct("speaker", "male slow", "male")
    assert not is_correct("speaker", "female", "male")


@dataclass(frozen=True)
class Row:
    text: str = "say backwards one two three"
    speaker: str = "female"
    speed: str = "fast"


def test_probe_answers() -> None:
    answers = {probe.name: answer_of(probe, Row()) for probe in PROBES}
    assert answers == {"transcribe": Row().text, "speaker": "female", "speed": "fast"}
    for probe in PROBES:
        assert isinstance(probe, Probe)
        assert not probe.choices or answers[probe.name] in probe.choices
