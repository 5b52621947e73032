"""A real vLLM (CPU build) samples from the demo's student and scores for its teacher.

Runs where vLLM is installed, which has an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch
from torch import Tensor

from tests.vllm.models import Store, demo_student, disturb, rollout_config, scorer
from tests.vllm.real import BOUND, OPTIONS, REAL, free_port, serving
from xopd.models import SpeechLM, load_teacher
from xopd.prompts import PromptStore
from xopd.ranks import World
from xopd.rollout import Request
from xopd.scoring import score
from xopd.sections import Dtype
from xopd.types import Modality, Rollout
from xopd.vllm.engine import Backend, VllmEngine
from xopd.vllm.folder import write_folder, write_weights
from xopd.vllm.http import Deadline, HttpClient
from xopd.vllm.local import LocalBackend
from xopd.vllm.options import HttpConfig, ServerConfig, TeacherConfig, VllmConfig, VllmError
from xopd.vllm.server import ServerBackend, serve_command, teacher_command
from xopd.vllm.sync import LanguageModel
from xopd.vllm.teacher import Trajectory, VllmTeacher
from xopd_kernels import Backend as Kernels

pytestmark = REAL

REQUESTS = [
    Request(number, modality, 1000 + i)
    for i, (number, modality) in enumerate(
        (n, m) for m in Modality for n in (0, 1, 2) for _ in range(4)
    )
]


def engine_of(
    student: SpeechLM, backend: Backend, temperature: float, options: VllmConfig = OPTIONS
) -> VllmEngine:
    return VllmEngine(
        student,
        cast(PromptStore, Store(student)),
        rollout_config(temperature),
        World(),
        options=options,
        backend=backend,
        score=scorer(student, temperature),
    )


def check_a_run(student: SpeechLM, engine: VllmEngine, temperature: float) -> None:
    """Four versions of the weights; after each, every log-prob is the trainer's."""
    store, seen = Store(student), set()
    for version in range(4):
        mismatch = engine.update(version)
        found = engine.sample(REQUESTS)
        rows = [
            Rollout(
                store.load([one.request.number])[0],
                one.modality,
                one.response_ids,
                one.is_finished,
            )
            for one in found
        ]
        own = scorer(student, temperature)(rows)
        gaps = [
            float((mine - torch.tensor(one.logprob)).abs().max())
            for mine, one in zip(own, found, strict=True)
        ]
        print(f"version {version}: sync {mismatch:.1e}, samples {max(gaps):.1e} nat")
        assert max(gaps) < BOUND
        responses = tuple(one.response_ids for one in found)
        assert len(set(responses)) > 1
        assert responses not in seen
        seen.add(responses)
        # The same seeds in smaller batches and in another order give the same trajectories.
        again = [one.response_ids for r in reversed(REQUESTS) for one in engine.sample([r])]
        assert tuple(reversed(again)) == responses
        disturb(student, version)


@pytest.fixture
def student(repository: Path) -> SpeechLM:
    return demo_student(repository)


def test_an_engine_in_a_child_process(student: SpeechLM) -> None:
    temperature = 0.7
    engine = engine_of(student, LocalBackend(student, OPTIONS, ranks=1), temperature)
    try:
        check_a_run(student, engine, temperature)
    finally:
        engine.close()


def test_tokens_come_as_often_as_their_log_probs_say(student: SpeechLM) -> None:
    """A sampler whose noise is biased would pass every test of log-probs."""
    disturb(student, 5, 0.05)
    drawn, temperature = 3000, 2.0
    engine = VllmEngine(
        student,
        cast(PromptStore, Store(student)),
        rollout_config(temperature, max_new_tokens=1),
        World(),
        options=OPTIONS,
        backend=LocalBackend(student, OPTIONS, ranks=1),
        score=scorer(student, temperature),
    )
    try:
        engine.update(0)
        found = engine.sample([Request(0, Modality.TEXT, seed) for seed in range(drawn)])
    finally:
        engine.close()
    counts = Counter(one.response_ids[0] for one in found)
    expected = {
        one.response_ids[0]: drawn * math.exp(one.logprob[0]) for one in found if one.logprob
    }
    common = [token for token, count in expected.items() if count >= 20]
    assert len(common) >= 5
    for token in common:
        deviation = math.sqrt(expected[token] * (1 - expected[token] / drawn))
        assert abs(counts[token] - expected[token]) < 5 * deviation


def test_an_engine_in_the_trainers_process(repository: Path) -> None:
    """In a process of its own here, because vLLM takes over the threads of whatever it is in."""
    code = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.vllm import test_real as t
student = t.demo_student(Path(sys.argv[1]))
options = replace(t.OPTIONS, own_process=False)
engine = t.engine_of(student, t.LocalBackend(student, options, ranks=1), 1.0, options)
t.check_a_run(student, engine, 1.0)
engine.close()
"""
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-c", code, str(repository)]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


def test_an_engine_ends_with_a_trainer_that_is_killed(repository: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from tests.vllm import test_real as t
student = t.demo_student(Path(sys.argv[1]))
engine = t.engine_of(student, t.LocalBackend(student, t.OPTIONS, ranks=1), 1.0)
engine.update(0)
print("ready", flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", code, str(repository)]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    trainer = subprocess.Popen(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    for line in trainer.stdout:
        if line.startswith("ready"):
            break
    children = psutil.Process(trainer.pid).children(recursive=True)
    assert children
    trainer.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    trainer.wait()
    assert not alive


def test_a_server(student: SpeechLM, http: HttpConfig, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    folder = tmp_path / "student"
    server = ServerConfig(url=url, folder=str(folder))
    write_folder(student, folder, OPTIONS.dtype)
    write_weights(LanguageModel(student, torch.float32), folder)
    command, environment = serve_command(str(folder), server, OPTIONS)
    with serving(command, environment, url, tmp_path / "log"):
        with pytest.raises(VllmError, match="401"):
            ServerBackend(server, HttpConfig(), OPTIONS)
        engine = engine_of(student, ServerBackend(server, http, OPTIONS), 1.0)
        check_a_run(student, engine, 1.0)
        # Somebody else's weights, under the version that the engine expects.
        disturb(student, 77)
        write_weights(LanguageModel(student, torch.float32), folder)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        HttpClient(url, http).post("/collective_rpc", body, Deadline(60.0))
        with pytest.raises(VllmError, match="not what was sent"):
            engine.sample(REQUESTS)


def test_a_teacher(repository: Path, student: SpeechLM, http: HttpConfig, tmp_path: Path) -> None:
    """Its scores are those of the teacher that the trainer runs."""
    url = f"http://127.0.0.1:{free_port()}"
    folder = repository / "xopd/assets/demo/teacher"
    teacher = load_teacher(str(folder))
    store, generator = Store(student), torch.Generator().manual_seed(1)
    allowed = torch.tensor(sorted(teacher.tokenizer.get_vocab().values())[12:])
    rows = []
    for i in range(24):
        picked = torch.randint(len(allowed), (3 + i,), generator=generator)
        (prompt,) = store.load([i % 3])
        ids = tuple(allowed[picked].tolist())
        rows.append(Rollout(prompt, Modality.SPEECH, ids, is_finished=False))
    (own,) = score(teacher, [rows], temperature=1.0, backend=Kernels.REFERENCE)
    options = TeacherConfig(urls=url, max_model_len=256, kv_cache_bytes=2**27, enforce_eager=True)
    command = teacher_command(str(folder), url, options, Dtype.FP32)
    with serving(command, {}, url, tmp_path / "log"):
        served = VllmTeacher(options, http, classes=teacher.classes, eos_id=teacher.eos_id)
        calls = [Trajectory(r.prompt.id, r.prompt.text_ids, r.response_ids) for r in rows]
        gaps = []
        for one, mine in zip(served.score(calls), own, strict=True):
            assert isinstance(one, Tensor), one
            gaps.append(float((one - mine).abs().max()))
    print(f"teacher: {max(gaps):.1e} nat")
    assert max(gaps) < BOUND
