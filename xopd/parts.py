"""The parts of a run as its config names them: models, rollout engine, evaluation set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from xopd.config import BackendChoice, Config, Dtype, RolloutEngine
from xopd.data.corpus import SpokenPrompt, available_splits, load_corpus
from xopd.evaluate import EvaluationSet, build_evaluation_set
from xopd.guards import check_pair
from xopd.models import (
    SpeechLM,
    TextLM,
    Vocabulary,
    load_student,
    load_teacher,
    load_vocabulary,
)
from xopd.prompts import PromptStore
from xopd.ranks import World
from xopd.rollout import Engine, GenerateEngine
from xopd.scoring import score
from xopd.sharding import Placement, placement, settle
from xopd.teacher import LocalTeacher, ServedTeacher, Teacher
from xopd.types import Rollout
from xopd.vllm.engine import Backend as VllmBackend
from xopd.vllm.engine import VllmEngine
from xopd.vllm.local import LocalBackend, installed_version
from xopd.vllm.server import ServerBackend
from xopd.vllm.teacher import VllmTeacher
from xopd.vllm.version import check_version
from xopd_kernels import Backend

HELD_OUT_VOICE_SPLIT = "test_heldout_voice"


def load_pair(config: Config, world: World) -> tuple[Teacher, SpeechLM]:
    """Teacher and student of a config, checked against each other, each where it computes."""
    model = config.model
    where = placement(world, model.dtype, config.sharding)
    words, teacher = world.together(lambda: _load_teacher(config, where))
    # The student keeps fp32 master weights and computes in bf16.
    student = load_student(
        model.student,
        placement=where,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    student = check_pair(student, words)
    student.freeze_all_but_language_model()
    settle(student.model, recompute=config.sharding.checkpoint_activations)
    return teacher, student


def _load_teacher(config: Config, where: Placement) -> tuple[TextLM | Vocabulary, Teacher]:
    """What scores, and what its ids mean."""
    path, revision = config.model.teacher, config.model.revision
    trust = config.model.trust_remote_code
    if config.teacher.urls is not None:
        words = load_vocabulary(path, revision=revision, trust_remote_code=trust)
        servers = VllmTeacher(
            config.teacher, config.http, classes=words.classes, eos_id=words.eos_id
        )
        return words, ServedTeacher(servers)
    # Frozen, so it needs no master weights.
    dtype = torch.float32 if config.model.dtype is Dtype.FP32 else torch.bfloat16
    lm = load_teacher(
        path, dtype=dtype, placement=where, revision=revision, trust_remote_code=trust
    )
    settle(lm.model, recompute=False)
    return lm, LocalTeacher(lm, config.rollout.temperature, kernel_backend(config))


def check_reachable(config: Config, world: World) -> None:
    """Refuse a rollout engine that is not there, before any model is loaded."""

    def connect() -> None:
        if config.rollout.engine is RolloutEngine.SERVER:
            ServerBackend(config.server, config.http, config.vllm)
        elif config.rollout.engine is RolloutEngine.VLLM:
            check_version(installed_version(), "the installed package")

    world.on_first(connect)


def make_engine(config: Config, student: SpeechLM, prompts: PromptStore, world: World) -> Engine:
    """The rollout engine of a config; one of vLLM gets its first weights with its first update."""
    if config.rollout.engine is RolloutEngine.GENERATE:
        return GenerateEngine(student, prompts, config.rollout, world)

    def own(rows: Sequence[Rollout]) -> list[torch.Tensor]:
        temperature = config.rollout.temperature
        with autocast(config, world):
            (found,) = score(
                student, [rows], temperature=temperature, backend=kernel_backend(config)
            )
        return found

    backends: list[VllmBackend] = []

    def connect() -> None:
        if config.rollout.engine is RolloutEngine.SERVER:
            backends.append(ServerBackend(config.server, config.http, config.vllm))
        else:
            backends.append(LocalBackend(student, config.vllm, ranks=world.size))

    world.on_first(connect)
    return VllmEngine(
        student,
        prompts,
        config.rollout,
        world,
        options=config.vllm,
        backend=backends[0] if backends else None,
        score=own,
    )


def load_evaluation_set(
    config: Config, student: SpeechLM, teacher: Teacher, world: World
) -> EvaluationSet:
    """The evaluation split, and the same families in voices that training never hears."""
    folder, limit = Path(config.data.path), config.data.eval_limit
    held_out: list[SpokenPrompt] = []
    if HELD_OUT_VOICE_SPLIT in available_splits(folder):
        held_out = load_corpus(folder, HELD_OUT_VOICE_SPLIT)[:limit]
    return build_evaluation_set(
        student,
        teacher,
        load_corpus(folder, config.data.eval_split)[:limit],
        held_out,
        split=config.data.eval_split,
        max_new_tokens=config.rollout.max_new_tokens,
        world=world,
    )


def autocast(config: Config, world: World) -> AbstractContextManager[object]:
    """How the student of a config computes; see `Run.autocast`."""
    if config.model.dtype is Dtype.FP32:
        return nullcontext()
    return torch.autocast(world.device.type, dtype=torch.bfloat16)


def kernel_backend(config: Config) -> Backend | Literal["auto"]:
    """The configured backend as the kernels take it."""
    choice = config.train.backend
    return "auto" if choice is BackendChoice.AUTO else Backend(choice.value)
