"""Starts ranks for the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.vllm.fake_server import KEY, MODEL, answer_of, running, scores_of
from xopd.config import Config
from xopd.models import demo, load_teacher
from xopd.run import save_speech_lm

WORKER = Path(__file__).with_name("worker.py")
DEADLINE_S = 600
Launch = Callable[[int, list[dict[str, str]]], None]
MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def make_config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """The trainer tests' config with a pair of one layer: what a layer costs here is messages."""
    folder = tmp_path_factory.mktemp("thin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "LAYERS", 1)
        tokenizer = demo.build_tokenizer()
        teacher, student = demo.build_teacher(tokenizer, 0), demo.build_student(tokenizer, 1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(5.0)  # sharp enough that tokens differ in probability
        student.lm_head.weight.mul_(4.0)
    save_speech_lm(student, folder / "student")
    for part in teacher, tokenizer:
        part.save_pretrained(folder / "teacher")
    models = (f"model.student={folder / 'student'}", f"model.teacher={folder / 'teacher'}")

    def make(out: Path, *overrides: str) -> Config:
        return make_config(out, *models, *overrides)

    return make


@pytest.fixture(scope="session")
def served(
    make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ...]]:
    """Overrides that have the pair's teacher score behind HTTP."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "key").write_text(KEY)
    lm = load_teacher(make_config(folder / "run").model.teacher)
    with running(folder) as (server, url):
        server.state.scores = lambda ids: scores_of(lm, ids)
        server.state.answers = lambda ids, limit: answer_of(lm, ids, limit)
        server.state.max_model_len = 4096
        yield (
            f"teacher.urls={url}",
            f"teacher.model={MODEL}",
            f"http.api_key_file={folder / 'key'}",
        )


@pytest.fixture(scope="session")
def lossy(
    served: tuple[str, ...], make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ...]]:
    """Overrides after `served`: a server that cannot score one row in three or so."""
    folder = tmp_path_factory.mktemp("lossy")
    lm = load_teacher(make_config(folder / "run").model.teacher)
    with running(folder) as (server, url):
        server.state.scores = lambda ids: scores_of(lm, ids)
        server.state.answers = lambda ids, limit: answer_of(lm, ids, limit)
        server.state.max_model_len = 4096
        server.state.refuses = lambda ids: len(set(ids)) > 1 and sum(ids) % 3 == 0
        yield (f"teacher.urls={url}", "teacher.max_dropped=0.9")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs jobs on that many ranks of this machine and waits for them; 0: without torchrun."""

    def start(ranks: int, jobs: list[dict[str, str]]) -> None:
        file = tmp_path_factory.mktemp("jobs") / "jobs.json"
        file.write_text(json.dumps(jobs))
        elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *(elastic if ranks else []), str(WORKER), str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, env=environment, timeout=DEADLINE_S, capture_output=True, text=True
        )
        # What a rank says, without the launcher's own account of it.
        said = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
        assert done.returncode == 0, "\n".join(said[-60:]) or done.stderr[-4000:]

    return start
