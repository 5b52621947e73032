"""A run: its folder, its models and data, and everything it writes besides checkpoints."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xopd.config import (
    BackendChoice,
    Config,
    Dtype,
    ModelConfig,
    config_to_dict,
    load_config,
)
from xopd.data.corpus import SpokenPrompt, available_splits, load_corpus
from xopd.data.world import is_correct
from xopd.errors import UserError
from xopd.evaluate import EvaluationSet, build_evaluation_set, decoded, evaluate_student
from xopd.files import write_atomically
from xopd.guards import check_audio_dependence, check_pair, check_prompts
from xopd.loss import TokenStats
from xopd.metrics import MetricsLog, TrainProgress, read_jsonl
from xopd.models import SpeechLM, TextLM, load_student, load_teacher
from xopd.prompts import encode_prompts
from xopd.types import Modality, Prompt
from xopd_kernels import Backend

_log = logging.getLogger(__name__)

HELD_OUT_VOICE_SPLIT = "test_heldout_voice"
SAMPLED_TASKS = 5
SAMPLES = "samples.jsonl"
AFTER = "eval/after.json"
LOCK = ".lock"
# Fields that a resumed run may change: they do not enter the mathematics.
MAY_CHANGE = frozenset(
    f"train.{name}"
    for name in (
        *("micro_batch", "threads", "eval_every", "checkpoint_every", "keep_checkpoints"),
        *("out_dir", "tensorboard"),
    )
)


class RunError(UserError):
    """A run folder that cannot be used as asked."""


@dataclass(frozen=True, slots=True)
class Run:
    """Models, encoded prompts and the folder of one training run."""

    config: Config
    directory: Path
    student: SpeechLM
    teacher: TextLM
    prompts: list[Prompt]
    evaluation: EvaluationSet

    def modalities(self) -> list[Modality]:
        """The halves of the objective that have weight; lambda 0 or 1 drops one."""
        weight = self.config.loss.text_weight
        shares = ((Modality.TEXT, weight), (Modality.SPEECH, 1.0 - weight))
        return [modality for modality, share in shares if share > 0]

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 mixed precision for the student (fp32 master weights), or nothing."""
        if self.config.model.dtype is Dtype.FP32:
            return nullcontext()
        device = next(self.student.model.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16)

    def sample_steps(self) -> set[int]:
        """Steps whose rollouts are kept for people to read: first, middle, last."""
        steps = self.config.train.steps
        return {0, steps // 2, steps - 1}

    def log(self, step: int) -> MetricsLog:
        return MetricsLog(self.directory, step, tensorboard=self.config.train.tensorboard)

    def progress(self, step: int) -> TrainProgress:
        return TrainProgress(self.config.train.steps, step)

    def evaluate(self, name: str, *, step: int) -> None:
        """Evaluate the student as it is now into ``eval/<name>.json``."""
        record = evaluate_student(
            self.student,
            self.evaluation,
            step=step,
            max_new_tokens=self.config.rollout.max_new_tokens,
        )
        path = self.directory / "eval" / f"{name}.json"
        write_atomically(path, json.dumps(record, indent=1).encode())

    def save_student(self) -> None:
        """The student as a loadable folder: safetensors, config, tokenizer, feature extractor."""
        save_speech_lm(self.student, self.directory / "student")


def save_speech_lm(student: SpeechLM, folder: Path) -> None:
    """Write a speech LLM so that ``load_student`` reads it back; a crash leaves no half folder."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in (student.model, student.tokenizer, student.feature_extractor):
        part.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def prepare(config: Config) -> Run:
    """Check everything, then load and encode: models, pair, prompts, audio, evaluation set."""
    torch.set_num_threads(config.train.threads)
    teacher, student = load_pair(config.model)
    student.freeze_all_but_language_model()
    records = load_corpus(Path(config.data.path), config.data.train_split)
    if not records:
        raise RunError(f"split {config.data.train_split!r} of {config.data.path} has no rows.")
    answer = student.tokenizer(records[0].solution, add_special_tokens=False).input_ids
    change = check_audio_dependence(
        student, records[0], response_ids=answer, backend=kernel_backend(config)
    )
    _log.info("audio dependence: log-probs move by up to %.2f nat", change)
    prompts = encode_prompts(student, records)
    check_prompts(student, prompts)
    evaluation = load_evaluation_set(config, student, teacher)
    return Run(config, Path(config.train.out_dir), student, teacher, prompts, evaluation)


def load_pair(model: ModelConfig) -> tuple[TextLM, SpeechLM]:
    """Teacher and student of a config, checked against each other, on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The student keeps fp32 master weights and computes in bf16; the frozen teacher needs none.
    dtype = torch.float32 if model.dtype is Dtype.FP32 else torch.bfloat16
    revision, trust = model.revision, model.trust_remote_code
    teacher = load_teacher(
        model.teacher, dtype=dtype, device=device, revision=revision, trust_remote_code=trust
    )
    student = load_student(model.student, device=device, revision=revision, trust_remote_code=trust)
    return teacher, check_pair(student, teacher)


def kernel_backend(config: Config) -> Backend | Literal["auto"]:
    """The configured backend as the kernels take it."""
    choice = config.train.backend
    return "auto" if choice is BackendChoice.AUTO else Backend(choice.value)


def load_evaluation_set(config: Config, student: SpeechLM, teacher: TextLM) -> EvaluationSet:
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
    )


def check_folder(directory: Path, config: Config) -> None:
    """Refuse the run folder of another config, or one that is no run folder at all.

    The resolved config is what makes a resumed run the same run, so only fields that say how the
    work is cut up or stored may change.
    """
    path = directory / "config.yaml"
    if path.exists():
        before, now = config_to_dict(load_config(path, [])), config_to_dict(config)
        changed = [
            f"{section}.{name}: {before[section][name]!r} -> {value!r}"
            for section, values in now.items()
            for name, value in values.items()
            if before[section][name] != value and f"{section}.{name}" not in MAY_CHANGE
        ]
        if changed:
            raise RunError(
                f"{directory} holds a run with another config ({'; '.join(changed)}). "
                "Set train.out_dir to a new folder, or undo the change to resume."
            )
    elif directory.is_dir() and any(entry.name != LOCK for entry in directory.iterdir()):
        raise RunError(
            f"train.out_dir {directory} is not empty and holds no config.yaml; choose a new folder."
        )


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Make the run folder and hold it; the lock ends with the process, however that ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("w")
    except OSError as error:
        raise RunError(f"train.out_dir {directory} cannot be used: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{directory} is in use by another process; wait for it, or choose another "
                "train.out_dir."
            ) from error
        yield


def record_samples(run: Run, step: int, stats: Sequence[TokenStats]) -> None:
    """Keep one rollout, of median length, of each task and modality for the report."""
    path = run.directory / SAMPLES
    # A resumed run may repeat a step: what it wrote before is replaced.
    kept = [s for s in read_jsonl(path) if s["step"] < step] if path.exists() else []
    for modality in Modality:
        of_task: dict[str, list[TokenStats]] = {}
        for item in sorted(stats, key=lambda s: len(s.rollout.response_ids)):
            if item.rollout.modality is modality:
                of_task.setdefault(item.rollout.prompt.task, []).append(item)
        picked = [items[len(items) // 2] for items in of_task.values()][:SAMPLED_TASKS]
        kept += [{"step": step, **sample_record(run.student, item)} for item in picked]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(path, lines.encode())


def sample_record(student: SpeechLM, item: TokenStats) -> dict[str, object]:
    """One rollout with its tokens and per-token numbers, as ``samples.jsonl`` holds it."""
    rollout, tokenizer = item.rollout, student.tokenizer
    response = decoded(tokenizer, rollout.response_ids)
    teacher = rollout.teacher_logprob
    return {
        "prompt_id": rollout.prompt.id,
        "modality": rollout.modality.value,
        "task": rollout.prompt.task,
        "prompt": rollout.prompt.text,
        "token": tokenizer.convert_ids_to_tokens(list(rollout.response_ids)),
        "advantage": item.advantage.tolist(),
        "logprob": item.logprob.tolist(),
        "teacher_logprob": [] if teacher is None else teacher.tolist(),
        "reference": rollout.prompt.reference,
        "response": response,
        "is_correct": is_correct(rollout.prompt.task, response, rollout.prompt.reference),
    }


def evaluate_folder(config: Config) -> dict[str, object]:
    """Evaluate a student folder without training: the record of ``eval/*.json``."""
    teacher, student = load_pair(config.model)
    data = load_evaluation_set(config, student, teacher)
    return evaluate_student(student, data, step=0, max_new_tokens=config.rollout.max_new_tokens)
