"""A small world of spoken instructions whose answers a program can check.

Every text is made of the words in :data:`VOCABULARY`, so a language model of a few hundred thousand
parameters with one token per word can learn it. Five task families come with a worked solution that
ends in ``so answer X``; three probes ask about the *sound* of a prompt, which its text cannot
answer, and so measure what a speech model forgets. The module is pure: no files, no global random
state.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, Protocol

TaskName = Literal["calc", "extreme", "reverse", "sort", "count"]
ProbeName = Literal["transcribe", "speaker", "speed"]
PromptSplit = Literal["train", "dev", "test"]

TASKS: Final[tuple[TaskName, ...]] = ("calc", "extreme", "reverse", "sort", "count")
PROMPT_SPLITS: Final[tuple[PromptSplit, ...]] = ("train", "dev", "test")
NUMBERS: Final[tuple[str, ...]] = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
MAX_RESPONSE_TOKENS: Final = 36
"""Longest response in words, end-of-sequence token included."""

_MAX_NUMBER: Final = len(NUMBERS) - 1
_TASK_WORDS: Final = (
    "start with add take away which is the largest smallest of say backwards put in order "
    "how many times do you hear"
)
_SOLUTION_WORDS: Final = "plus minus gives yes no so answer ."
_PROBE_WORDS: Final = "repeat words who speaks fast male female slow"
VOCABULARY: Final[tuple[str, ...]] = tuple(
    dict.fromkeys([*NUMBERS, *f"{_TASK_WORDS} {_SOLUTION_WORDS} {_PROBE_WORDS}".split()])
)
"""Every word of every text, solution, answer, probe question and probe answer, without repeats."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One instruction in words, its worked solution (ending in ``so answer X``) and X."""

    task: TaskName
    text: str
    solution: str
    answer: str


class HeardPrompt(Protocol):
    """What a probe may ask about: the words of an utterance and how they were spoken."""

    @property
    def text(self) -> str: ...
    @property
    def speaker(self) -> str: ...
    @property
    def speed(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Probe:
    """A question, asked in text after the audio, that only the audio answers."""

    name: ProbeName
    question: str
    choices: tuple[str, ...]
    """The possible answers; empty for an open answer."""


PROBES: Final[tuple[Probe, ...]] = (
    Probe("transcribe", "repeat the words", ()),
    Probe("speaker", "who speaks", ("male", "female")),
    Probe("speed", "how fast", ("slow", "fast")),
)
_PROBE_NAMES: Final = frozenset(probe.name for probe in PROBES)


def answer_of(probe: Probe, row: HeardPrompt) -> str:
    """Returns the expected response to `probe` for one utterance."""
    if probe.name == "transcribe":
        return row.text
    return row.speaker if probe.name == "speaker" else row.speed


def split_of(text: str) -> PromptSplit:
    """Returns the split of a prompt, a function of its text alone.

    ``u = int(sha256(text)[:8 bytes]) mod 100``: test for u < 15, dev for u < 20, else train. No
    seed or corpus size can therefore put one prompt in two splits.
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    if bucket < 15:
        return "test"
    return "dev" if bucket < 20 else "train"


def draw(rng: random.Random, task: TaskName | None = None, split: PromptSplit = "train") -> Problem:
    """Draws one problem of `task` (any task when None) that belongs to `split`.

    Problems of other splits are drawn and rejected, so the cost is 1/0.80, 1/0.05 or 1/0.15 draws.

    Raises:
        ValueError: `task` or `split` is not one of TASKS or PROMPT_SPLITS.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task is {task!r}; use one of {', '.join(TASKS)}, or None for any")
    if split not in PROMPT_SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(PROMPT_SPLITS)}")
    while True:
        name = rng.choice(TASKS) if task is None else task
        body = _MAKERS[name](rng)
        if split_of(body.text) == split:
            solution = f"{body.steps} so answer {body.answer}"
            return Problem(name, body.text, solution, body.answer)


def extract_answer(response: str) -> str | None:
    """Returns the words after the last ``answer`` in `response`, or None when there is none."""
    words = response.split()
    if "answer" not in words:
        return None
    last = len(words) - words[::-1].index("answer")
    return " ".join(words[last:])


def is_correct(kind: str, response: str, reference: str) -> bool:
    """Whether `response` gives `reference`, compared word by word.

    Args:
        kind: the name of a probe; every other name is taken for a task, so that a corpus may bring
            tasks of its own. A task response must say ``answer`` first. A probe response may also
            be the bare answer: a probe measures what a model hears, not the form in which it tells.
        response: words that the model wrote, special tokens removed.
        reference: the expected answer.
    """
    answer = extract_answer(response)
    if answer is None:
        if kind not in _PROBE_NAMES:
            return False
        answer = response
    return answer.split() == reference.split()


class _Body(NamedTuple):
    text: str
    steps: str
    answer: str


def _words(numbers: list[int]) -> str:
    return " ".join(NUMBERS[number] for number in numbers)


def _digits(rng: random.Random) -> list[int]:
    return [rng.randint(0, 9) for _ in range(rng.randint(3, 5))]


def _calc(rng: random.Random) -> _Body:
    value = rng.randint(0, 9)
    text, steps = [f"start with {NUMBERS[value]}"], []
    for _ in range(rng.randint(2, 4)):
        operand = rng.randint(1, 9)
        wants_add = rng.random() < 0.5
        # One of the two always stays within 0..20, because the operand is at most 9.
        add = value < operand or (wants_add and value + operand <= _MAX_NUMBER)
        result = value + operand if add else value - operand
        text.append(f"{'add' if add else 'take away'} {NUMBERS[operand]}")
        sign = "plus" if add else "minus"
        steps.append(f"{NUMBERS[value]} {sign} {NUMBERS[operand]} gives {NUMBERS[result]} .")
        value = result
    return _Body(" ".join(text), " ".join(steps), NUMBERS[value])


def _extreme(rng: random.Random) -> _Body:
    largest = rng.random() < 0.5
    digits = _digits(rng)
    best, steps = digits[0], []
    for digit in digits[1:]:
        better = max(best, digit) if largest else min(best, digit)
        steps.append(f"{NUMBERS[best]} {NUMBERS[digit]} gives {NUMBERS[better]} .")
        best = better
    text = f"which is the {'largest' if largest else 'smallest'} of {_words(digits)}"
    return _Body(text, " ".join(steps), NUMBERS[best])


def _reverse(rng: random.Random) -> _Body:
    digits = _digits(rng)
    return _Body(f"say backwards {_words(digits)}", f"{_words(digits)} .", _words(digits[::-1]))


def _sort(rng: random.Random) -> _Body:
    digits = _digits(rng)
    return _Body(f"put in order {_words(digits)}", f"{_words(digits)} .", _words(sorted(digits)))


def _count(rng: random.Random) -> _Body:
    target = rng.randint(0, 9)
    # Independent digits would make "zero times" the answer most of the time.
    digits = [target if rng.random() < 0.4 else digit for digit in _digits(rng)]
    found, steps = 0, []
    for digit in digits:
        found += digit == target
        verdict = "yes" if digit == target else "no"
        steps.append(f"{NUMBERS[digit]} {verdict} {NUMBERS[found]} .")
    text = f"how many times do you hear {NUMBERS[target]} in {_words(digits)}"
    return _Body(text, " ".join(steps), NUMBERS[found])


_MAKERS: Final[Mapping[TaskName, Callable[[random.Random], _Body]]] = MappingProxyType(
    {"calc": _calc, "extreme": _extreme, "reverse": _reverse, "sort": _sort, "count": _count}
)
