"""A run: its folder, its models and data, and everything it writes besides checkpoints."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from xopd.config import (
    Config,
    HttpConfig,
    ServerConfig,
    ShardingConfig,
    VllmConfig,
    config_to_dict,
    load_config,
)
from xopd.data.corpus import load_corpus
from xopd.data.world import is_correct
from xopd.errors import UserError
from xopd.evaluate import EvaluationSet, decoded, evaluate_student
from xopd.files import write_atomically
from xopd.guards import check_audio_dependence, check_prompts
from xopd.loss import TokenStats
from xopd.metrics import MetricsLog, TrainProgress, read_jsonl
from xopd.models import SpeechLM
from xopd.parts import (
    autocast,
    check_reachable,
    kernel_backend,
    load_evaluation_set,
    load_pair,
    make_engine,
)
from xopd.prompts import PromptStore
from xopd.ranks import ALONE, World
from xopd.rollout import Engine
from xopd.teacher import Teacher
from xopd.trackers import check_trackers, open_trackers
from xopd.types import Modality
from xopd.usage import Usage
from xopd_kernels import Backend

_log = logging.getLogger(__name__)

SAMPLED_TASKS = 5
SAMPLES = "samples.jsonl"
AFTER = "eval/after.json"
LOCK = ".lock"
# Fields that a resumed run may change: they do not enter the mathematics.
MAY_CHANGE = frozenset(
    f"train.{name}"
    for name in (
        *("micro_batch", "threads", "eval_every", "checkpoint_every", "keep_checkpoints"),
        *("out_dir", "max_skipped_updates", "rank_timeout_s"),
        *("tensorboard", "trackio", "wandb", "project"),
    )
) | frozenset(
    (
        "data.kept_clips",
        *(
            f"{section}.{field.name}"
            for section, cls in (
                *(("sharding", ShardingConfig), ("vllm", VllmConfig)),
                *(("server", ServerConfig), ("http", HttpConfig)),
            )
            for field in dataclasses.fields(cls)
            if (section, field.name) != ("vllm", "dtype")  # it samples from another policy
        ),
        "teacher.max_model_len",
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
    teacher: Teacher
    prompts: PromptStore
    evaluation: EvaluationSet
    engine: Engine
    world: World
    usage: Usage

    @property
    def backend(self) -> Backend | Literal["auto"]:
        """The configured backend as the kernels take it."""
        return kernel_backend(self.config)

    def modalities(self) -> list[Modality]:
        """The halves of the objective that have weight; lambda 0 or 1 drops one."""
        weight = self.config.loss.text_weight
        shares = ((Modality.TEXT, weight), (Modality.SPEECH, 1.0 - weight))
        return [modality for modality, share in shares if share > 0]

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 mixed precision for the student (fp32 master weights), or nothing."""
        return autocast(self.config, self.world)

    def sample_steps(self) -> set[int]:
        """Steps whose rollouts are kept for people to read: first, middle, last."""
        steps = self.config.train.steps
        return {0, steps // 2, steps - 1}

    @contextmanager
    def shown(self, step: int) -> Iterator[Callable[[Mapping[str, float | int]], None]]:
        """Gives a function for the metrics of each step from this one on: log and progress."""
        if not self.world.is_first:
            yield lambda record: None
            return
        trackers = open_trackers(self.config, self.directory, step)
        with (
            MetricsLog(self.directory, step, trackers) as log,
            TrainProgress(self.config.train.steps, step) as progress,
        ):

            def show(record: Mapping[str, float | int]) -> None:
                log.write(record)
                progress.update(int(record["step"]) + 1, record)

            yield show

    def evaluate(self, name: str, *, step: int) -> None:
        """Evaluate the student as it is now into ``eval/<name>.json``."""
        record = evaluate_student(
            self.student,
            self.evaluation,
            step=step,
            max_new_tokens=self.config.rollout.max_new_tokens,
            world=self.world,
        )
        if self.world.is_first:
            path = self.directory / "eval" / f"{name}.json"
            write_atomically(path, json.dumps(record, indent=1).encode())

    def save_student(self) -> None:
        """The student as a loadable folder: safetensors, config, tokenizer, feature extractor."""
        save_speech_lm(self.student, self.directory / "student", self.world)


def save_speech_lm(student: SpeechLM, folder: Path, world: World = ALONE) -> None:
    """Write a speech LLM so that ``load_student`` reads it back; a crash leaves no half folder.

    The shards of a sharded model come together in the host memory of the first rank.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    world.barrier()
    student.model.save_pretrained(temporary, is_main_process=world.is_first)
    if world.is_first:
        for part in (student.tokenizer, student.feature_extractor):
            part.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    world.barrier()


def prepare(config: Config, world: World) -> Run:
    """Check everything, then load and encode: models, pair, prompts, audio, evaluation set."""
    torch.set_num_threads(config.train.threads)
    check_trackers(config)
    check_reachable(config, world)
    teacher, student = load_pair(config, world)
    records = load_corpus(Path(config.data.path), config.data.train_split)
    if not records:
        raise RunError(f"split {config.data.train_split!r} of {config.data.path} has no rows.")
    check_prompts(student, records)
    answer = student.tokenizer(records[0].solution, add_special_tokens=False).input_ids
    change = check_audio_dependence(
        student, records[0], response_ids=answer, backend=kernel_backend(config)
    )
    if world.is_first:
        _log.info("audio dependence: log-probs move by up to %.2f nat", change)
    prompts = PromptStore(student, records, kept_clips=config.data.kept_clips)
    return Run(
        config=config,
        directory=Path(config.train.out_dir),
        student=student,
        teacher=teacher,
        prompts=prompts,
        evaluation=load_evaluation_set(config, student, teacher, world),
        engine=make_engine(config, student, prompts, world),
        world=world,
        usage=Usage(student, world, config),
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
        # Other addresses of the same teacher; not one in place of the trainer's own.
        if before["teacher"]["urls"] is not None and now["teacher"]["urls"] is not None:
            changed = [change for change in changed if not change.startswith("teacher.urls:")]
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
def exclusive(directory: Path, world: World = ALONE) -> Iterator[None]:
    """Make the run folder and hold it; the lock ends with the process, however that ends.

    The first rank holds it for all of them.
    """
    if not world.is_first:
        yield
        return
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
    mine = [sample_record(run.student, item) for item in stats]
    found = [record for part in run.world.gather(mine) for record in part]
    if not run.world.is_first:
        return
    path = run.directory / SAMPLES
    # A resumed run may repeat a step: what it wrote before is replaced.
    kept = [s for s in read_jsonl(path) if s["step"] < step] if path.exists() else []
    # An order that does not depend on which rank held a row.
    found.sort(key=lambda r: (len(r["token"]), r["prompt_id"], r["token"]))
    for modality in Modality:
        of_task: dict[str, list[dict[str, Any]]] = {}
        for record in found:
            if record["modality"] == modality.value:
                of_task.setdefault(record["task"], []).append(record)
        picked = [records[len(records) // 2] for records in of_task.values()][:SAMPLED_TASKS]
        kept += [{"step": step, **record} for record in picked]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(path, lines.encode())


def sample_record(student: SpeechLM, item: TokenStats) -> dict[str, Any]:
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(device=device)
    teacher, student = load_pair(config, world)
    data = load_evaluation_set(config, student, teacher, world)
    return evaluate_student(student, data, step=0, max_new_tokens=config.rollout.max_new_tokens)
