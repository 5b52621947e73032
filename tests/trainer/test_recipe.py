"""The recipe of the demo's base pair: every stage learns, and frame labels are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from xopd.data.corpus import SpokenPrompt
from xopd.models import SpeechLM, TextLM
from xopd.models.demo import build_student
from xopd.models.speech_lm import leaf_modules
from xopd.recipes import base_pair
from xopd.recipes.base_pair import (
    Clip,
    Stage,
    align_tower,
    load_clips,
    nll,
    spoken_word_of_embedding,
    train_base,
    train_teacher,
)
from xopd.types import Modality, Prompt, Rollout

STEPS = 15
TINY = Stage(steps=STEPS, batch=8, learning_rate=3e-3)


class LossLog:
    """Collects the losses of one stage."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.stages: set[str] = set()

    def __call__(self, stage: str, step: int, loss: float) -> None:
        assert step == len(self.losses)
        self.stages.add(stage)
        self.losses.append(loss)

    def assert_falls(self, stage: str) -> None:
        assert self.stages == {stage}
        assert len(self.losses) == STEPS
        assert sum(self.losses[-3:]) < 0.95 * sum(self.losses[:3])


@pytest.fixture(scope="module")
def clips(student: SpeechLM, records: list[SpokenPrompt]) -> list[Clip]:
    return load_clips(student, records)


def test_the_teacher_learns(tokenizer: PreTrainedTokenizerFast) -> None:
    log = LossLog()
    train_teacher(tokenizer, seed=0, log=log, stage=TINY)
    log.assert_falls("teacher")


def test_the_tower_learns_and_nothing_else_moves(
    tokenizer: PreTrainedTokenizerFast, clips: list[Clip]
) -> None:
    student, log = build_student(tokenizer, 1), LossLog()
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    align_tower(student, clips, seed=0, log=log, stage=TINY)
    log.assert_falls("align")
    for name, parameter in student.model.named_parameters():
        in_tower = "audio_tower" in name.split(".")
        assert in_tower or torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in student.model.named_parameters())


def test_the_base_student_learns(tokenizer: PreTrainedTokenizerFast, clips: list[Clip]) -> None:
    student, log = build_student(tokenizer, 1), LossLog()
    (vision,) = leaf_modules(student.model, ["visual"])
    before = [p.detach().clone() for p in vision.parameters()]
    train_base(student, clips, seed=0, log=log, stage=TINY)
    log.assert_falls("base")
    assert all(torch.equal(a, b) for a, b in zip(before, vision.parameters(), strict=True))


def test_frame_labels_by_hand(
    tokenizer: PreTrainedTokenizerFast, records: list[SpokenPrompt]
) -> None:
    """1.2 s of features: 13 embeddings for the first second, centres 60, 140, ...; 3 for 200 ms."""
    record = replace(records[0], text="add one", word_start_ms=(150, 1000))
    clip = Clip(record, np.zeros((64, 120), dtype=np.float32))
    silence, add, one = (tokenizer.convert_tokens_to_ids(w) for w in ("<pad>", "add", "one"))
    # Centres: 60, 140 are before the first word; 220 .. 1020 - 1; then 1060, 1140, 1220.
    expected = [silence] * 2 + [add] * 10 + [one] + [one] * 3
    assert spoken_word_of_embedding(clip, tokenizer).tolist() == expected


def test_nll_is_the_mean_over_response_tokens(
    teacher: TextLM, rollouts: Callable[[list[Modality]], list[Rollout]]
) -> None:
    rows = rollouts([Modality.TEXT, Modality.TEXT])
    total, tokens = 0.0, 0
    for row in rows:
        prompt: Prompt = row.prompt
        ids = torch.tensor([prompt.text_ids + row.response_ids])
        table = teacher.model(input_ids=ids).logits[0].log_softmax(-1)
        for t, token in enumerate(row.response_ids):
            total -= float(table[len(prompt.text_ids) - 1 + t, token])
            tokens += 1
    assert nll(teacher, rows).item() == pytest.approx(total / tokens, rel=1e-5)


def test_the_bundled_models_are_those_of_their_provenance(repository: Path) -> None:
    folder = repository / "xopd" / "assets" / "demo"
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    for name, expected in provenance["sha256"].items():
        weights = (folder / name / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == expected
        assert len(weights) <= 10 * 2**20
    stages = {"teacher": base_pair.TEACHER, "align": base_pair.ALIGN, "base": base_pair.BASE}
    assert provenance["stages"] == {name: asdict(stage) for name, stage in stages.items()}
