"""Whole runs of the demo's pair whose rollouts, and then whose teacher, come from a real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.real import BOUND, KEY_ENV, OPTIONS, REAL, free_port, serving
from xopd.config import Config, load_config
from xopd.data.synth import synthesize
from xopd.metrics import read_jsonl
from xopd.models import load_student
from xopd.sections import Dtype
from xopd.train import train
from xopd.vllm.engine import DTYPES
from xopd.vllm.folder import write_folder, write_weights
from xopd.vllm.options import HttpConfig, ServerConfig, TeacherConfig
from xopd.vllm.server import serve_command, teacher_command
from xopd.vllm.sync import LanguageModel

pytestmark = REAL
STEPS = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    synthesize(folder, sizes={"train": 24, "test": 4}, seed=1, workers=1, progress=False)
    return folder


def config_of(repository: Path, corpus: Path, out: Path, *overrides: str) -> Config:
    """Five steps of the demo's pair, with rollouts by a local engine of vLLM."""
    demo = repository / "xopd/assets/demo"
    return load_config(
        None,
        [
            f"model.student={demo / 'student'}",
            f"model.teacher={demo / 'teacher'}",
            f"data.path={corpus}",
            "data.eval_limit=2",
            "rollout.engine=vllm",
            "rollout.prompts_per_step=4",
            "rollout.rollouts_per_prompt=2",
            "rollout.max_new_tokens=24",
            "optim.learning_rate=3e-4",
            "optim.warmup_steps=1",
            f"train.steps={STEPS}",
            "train.threads=1",
            "train.tensorboard=false",
            f"train.out_dir={out}",
            f"vllm.max_model_len={OPTIONS.max_model_len}",
            f"vllm.max_num_seqs={OPTIONS.max_num_seqs}",
            f"vllm.kv_cache_bytes={OPTIONS.kv_cache_bytes}",
            "vllm.enforce_eager=true",
            f"vllm.probe_tolerance={BOUND}",
            *overrides,
        ],
    )


def check_syncs(run: Path, staleness: list[int]) -> None:
    """Weights arrived at each step, and every sampled token has the trainer's log-prob."""
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["staleness"] for line in lines] == staleness
    synced = [line for line in lines if line["sync_s"] > 0]
    assert len(synced) >= 4
    for line in synced:
        print(
            f"step {line['step']}: sync {line['sync_mismatch']:.1e} nat, mean mismatch "
            f"speech {line['mismatch_speech']:.1e}, text {line['mismatch_text']:.1e}"
        )
        assert 0 < line["sync_mismatch"] < BOUND
    if not any(staleness):
        for line in lines:
            assert max(abs(line["mismatch_speech"]), abs(line["mismatch_text"])) < BOUND


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_with_rollouts_of_a_local_engine(
    repository: Path, corpus: Path, tmp_path: Path, ahead: int
) -> None:
    config = config_of(repository, corpus, tmp_path / "run", f"rollout.max_staleness={ahead}")
    check_syncs(train(config), [0, *[ahead] * (STEPS - 1)])


def test_a_run_over_http(repository: Path, corpus: Path, tmp_path: Path, http: HttpConfig) -> None:
    """A server of the student, and one of the teacher; advantages are those of a local teacher."""
    demo, folder = repository / "xopd/assets/demo", tmp_path / "served"
    url, teacher_url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    student = load_student(str(demo / "student"))
    write_folder(student, folder, OPTIONS.dtype)
    write_weights(LanguageModel(student, DTYPES[OPTIONS.dtype]), folder)
    server = ServerConfig(url=url, folder=str(folder))
    command, environment = serve_command(str(folder), server, OPTIONS)
    settings = TeacherConfig(max_model_len=256, kv_cache_bytes=2**27, enforce_eager=True)
    words = teacher_command(str(demo / "teacher"), teacher_url, settings, Dtype.FP32)
    overrides = (
        "rollout.engine=server",
        f"server.url={url}",
        f"server.folder={folder}",
        f"http.api_key_env={KEY_ENV}",
    )
    served = (f"teacher.urls={teacher_url}", "teacher.max_model_len=256")
    with (
        serving(command, environment, url, tmp_path / "student.log"),
        serving(words, {}, teacher_url, tmp_path / "teacher.log"),
    ):
        runs = [
            train(config_of(repository, corpus, tmp_path / name, *overrides, *more))
            for name, more in (("far", served), ("near", ()))
        ]
    for run in runs:
        check_syncs(run, [0] * STEPS)
    # Until the first update both runs are the same but for who scores.
    gaps = []
    for far, near in zip(*(read_jsonl(run / "samples.jsonl") for run in runs), strict=True):
        if near["step"] == 0:
            assert far["token"] == near["token"]
            gaps += [abs(a - b) for a, b in zip(far["advantage"], near["advantage"], strict=True)]
    print(f"advantages differ by up to {max(gaps):.1e} nat over {len(gaps)} tokens")
    assert 0 < max(gaps) < BOUND
