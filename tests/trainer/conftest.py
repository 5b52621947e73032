"""Shared by the trainer's tests: a tiny corpus, a random pair of models, and a base config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from xopd.config import Config, load_config
from xopd.data.corpus import SpokenPrompt, load_corpus
from xopd.data.synth import synthesize
from xopd.models import SpeechLM, TextLM
from xopd.models.demo import build_student, build_teacher, build_tokenizer, copy_language_model
from xopd.prompts import encode_prompts
from xopd.run import save_speech_lm
from xopd.types import Modality, Prompt, Rollout

MakeConfig = Callable[..., Config]


@dataclass(frozen=True)
class ModelFolders:
    """A saved pair; the student's language model is not the teacher's."""

    student: Path
    teacher: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sizes = {"train": 24, "test": 10, "test_heldout_voice": 6}
    synthesize(folder, sizes=sizes, seed=1, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def records(corpus: Path) -> list[SpokenPrompt]:
    return load_corpus(corpus, "train")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def teacher(tokenizer: PreTrainedTokenizerFast) -> TextLM:
    """A random teacher, sharp enough that tokens differ in probability. Not to be changed."""
    model = build_teacher(tokenizer, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    return TextLM(model.requires_grad_(False).eval(), tokenizer)


@pytest.fixture
def new_student(tokenizer: PreTrainedTokenizerFast, teacher: TextLM) -> SpeechLM:
    """A student of a test's own: the teacher's language model, disturbed, and a random tower."""
    return make_student(tokenizer, teacher)


@pytest.fixture(scope="session")
def student(tokenizer: PreTrainedTokenizerFast, teacher: TextLM) -> SpeechLM:
    """As ``new_student``, but shared. Not to be changed."""
    return make_student(tokenizer, teacher)


def make_student(tokenizer: PreTrainedTokenizerFast, teacher: TextLM) -> SpeechLM:
    student = build_student(tokenizer, 1)
    copy_language_model(teacher.model, student)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head = student.lm_head.weight
        head.add_(0.05 * torch.randn(head.shape, generator=generator))
    student.freeze_all_but_language_model()
    return student


@pytest.fixture(scope="session")
def prompts(student: SpeechLM, records: list[SpokenPrompt]) -> list[Prompt]:
    return encode_prompts(student, records)


@pytest.fixture(scope="session")
def model_folders(
    tmp_path_factory: pytest.TempPathFactory, student: SpeechLM, teacher: TextLM
) -> ModelFolders:
    folder = tmp_path_factory.mktemp("models")
    save_speech_lm(student, folder / "student")
    teacher.model.save_pretrained(folder / "teacher")
    teacher.tokenizer.save_pretrained(folder / "teacher")
    return ModelFolders(folder / "student", folder / "teacher")


@pytest.fixture(scope="session")
def make_config(model_folders: ModelFolders, corpus: Path) -> MakeConfig:
    """A config of 4 steps with 3 prompts and 2 rollouts each, in ``out``, with overrides."""

    def make(out: Path, *overrides: str) -> Config:
        base = (
            f"model.student={model_folders.student}",
            f"model.teacher={model_folders.teacher}",
            f"data.path={corpus}",
            "data.eval_limit=4",
            "rollout.prompts_per_step=3",
            "rollout.rollouts_per_prompt=2",
            "rollout.max_new_tokens=12",
            "optim.learning_rate=1e-3",
            "optim.warmup_steps=1",
            "train.steps=4",
            "train.threads=1",
            "train.tensorboard=false",
            f"train.out_dir={out}",
        )
        return load_config(None, [*base, *overrides])

    return make


@pytest.fixture(scope="session")
def rollouts(student: SpeechLM, prompts: list[Prompt]) -> Callable[[list[Modality]], list[Rollout]]:
    """Unscored rollouts of random tokens, lengths 3, 4, 5, ...; one per modality given."""

    def make(modalities: list[Modality]) -> list[Rollout]:
        generator = torch.Generator().manual_seed(3)
        allowed = torch.tensor([i for i in range(71) if i not in student.reserved_ids])
        made = []
        for i, modality in enumerate(modalities):
            picked = torch.randint(len(allowed), (3 + i,), generator=generator)
            ids = tuple(allowed[picked].tolist())
            made.append(Rollout(prompts[i], modality, ids, is_finished=False))
        return made

    return make
