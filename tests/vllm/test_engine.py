"""The engine over a backend of transformers: what it sends, checks and refuses, without vLLM.

The backend loads the folder that vLLM would load, so these tests also say that the folder is the
student's language model, and that embeddings and plain positions are all that audio needs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

from tests.trainer.distributed.folder_backend import FolderBackend
from tests.vllm.models import Store, demo_student, disturb, rollout_config, scorer
from xopd.config import load_config
from xopd.models import SpeechLM
from xopd.prompts import PromptStore
from xopd.ranks import World
from xopd.rollout import Request
from xopd.schema import ConfigError
from xopd.types import Modality
from xopd.vllm.answers import Generated
from xopd.vllm.engine import VllmEngine
from xopd.vllm.options import VllmConfig, VllmError
from xopd.vllm.sync import Fingerprint, LanguageModel, check_fingerprint
from xopd.vllm.worker import bit_sum

REQUESTS = [
    Request(number, modality, 100 + i)
    for i, (number, modality) in enumerate(
        (n, m) for m in Modality for n in (0, 1, 2) for _ in range(2)
    )
]


@pytest.fixture
def student(repository: Path) -> SpeechLM:
    return demo_student(repository)


MakeEngine = Callable[..., tuple[VllmEngine, FolderBackend]]


@pytest.fixture
def make(student: SpeechLM, tmp_path: Path) -> MakeEngine:
    def engine(temperature: float = 1.0) -> tuple[VllmEngine, FolderBackend]:
        backend = FolderBackend(student, tmp_path / "engine")
        made = VllmEngine(
            student,
            cast(PromptStore, Store(student)),
            rollout_config(temperature),
            World(),
            options=VllmConfig(probe_tolerance=1e-3),
            backend=backend,
            score=scorer(student, temperature),
        )
        return made, backend

    return engine


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_folder_is_the_students_language_model(
    make: MakeEngine, student: SpeechLM, temperature: float
) -> None:
    engine, _ = make(temperature)
    before = None
    for version in range(3):
        assert engine.update(version) < 2e-5
        found = engine.sample(REQUESTS)
        assert [one.request for one in found] == REQUESTS
        assert {one.version for one in found} == {version}
        responses = [one.response_ids for one in found]
        assert responses == [one.response_ids for one in engine.sample(REQUESTS)]
        assert responses != before
        before = responses
        disturb(student, version)


def test_weights_that_never_arrive_are_noticed(make: MakeEngine, student: SpeechLM) -> None:
    engine, backend = make()
    engine.update(0)
    backend.loads = False
    disturb(student, 1, 1e-5)  # far too little to show in the log-probs
    with pytest.raises(VllmError, match="not what was sent"):
        engine.update(1)
    with pytest.raises(VllmError, match="call update"):
        engine.sample(REQUESTS)


def test_rollouts_that_were_begun_are_those_of_their_weights(make: MakeEngine) -> None:
    engine, _ = make()
    engine.update(3)
    expected = engine.sample(REQUESTS)
    finish = engine.begin(REQUESTS)
    with pytest.raises(ValueError, match="under way"):
        engine.update(4)
    assert finish() == expected
    assert {one.version for one in expected} == {3}
    engine.update(4)


def test_a_backend_that_fails_behind_the_training_says_so(make: MakeEngine) -> None:
    engine, backend = make()
    engine.update(0)

    def fail(calls: object, sampling: object) -> list[Generated]:
        raise VllmError("out of order")

    backend.generate = fail  # type: ignore[method-assign]
    finish = engine.begin(REQUESTS)
    with pytest.raises(VllmError, match="out of order"):
        finish()


@pytest.mark.parametrize("bias", [-0.01, float("nan")])
def test_log_probs_that_differ_are_noticed(make: MakeEngine, bias: float) -> None:
    engine, backend = make()
    backend.bias = bias
    with pytest.raises(VllmError):
        engine.update(0)


def test_no_sample_before_the_first_update(make: MakeEngine) -> None:
    engine, _ = make()
    with pytest.raises(VllmError, match="call update"):
        engine.sample(REQUESTS)


def test_what_is_sent_is_what_a_checkpoint_holds(student: SpeechLM, repository: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(repository / "xopd/assets/demo/student/model.safetensors")
    sent = dict(LanguageModel(student, torch.float32))
    towers = {name for name in saved if name.startswith(("audio_tower.", "visual."))}
    assert set(sent) == set(saved) - towers
    for name, tensor in sent.items():
        assert torch.equal(tensor, saved[name]), name
    infos = LanguageModel(student, torch.bfloat16).infos()
    assert [info.name for info in infos] == list(sent)
    assert [info.shape for info in infos] == [tuple(tensor.shape) for tensor in sent.values()]
    assert {info.dtype for info in infos} == {torch.bfloat16}


def test_a_bit_sum_depends_on_no_order_and_no_padding() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(7, 5).to(dtype)
        padded = torch.cat([tensor.flip(0), torch.zeros(3, 5, dtype=dtype)])
        assert bit_sum(padded) == bit_sum(tensor) == bit_sum(tensor[:3]) + bit_sum(tensor[3:])
        tensor[0, 0] += 1
        assert bit_sum(padded) != bit_sum(tensor)


def test_fingerprints_of_shards_add_up() -> None:
    tensor = torch.randn(8, 4)
    expected = {"lm_head.weight": Fingerprint(32, bit_sum(tensor))}
    shards = [tensor[:5], torch.cat([tensor[5:], torch.zeros(2, 4)])]  # the last one is padded
    workers = [{"lm_head.weight": [str(s.numel()), str(bit_sum(s))]} for s in shards]
    check_fingerprint(expected, workers)
    whole = {"lm_head.weight": ["32", str(bit_sum(tensor))]}
    check_fingerprint(expected, [whole, whole])
    with pytest.raises(VllmError, match="not what was sent"):
        check_fingerprint(expected, [*workers, workers[0]])
    with pytest.raises(VllmError, match="not what was sent"):
        check_fingerprint(expected, [whole, {"lm_head.weight": ["32", "1"]}])
    with pytest.raises(VllmError, match="no parameter"):
        check_fingerprint(expected, [{}])


@pytest.mark.parametrize("engine", ["vllm", "server"])
@pytest.mark.parametrize("temperature", ["0.001", "2.5"])
def test_a_temperature_that_vllm_does_not_take(engine: str, temperature: str) -> None:
    base = ("model.student=s", "model.teacher=t", "data.path=d")
    with pytest.raises(ConfigError, match=r"rollout\.temperature"):
        load_config(None, [*base, f"rollout.engine={engine}", f"rollout.temperature={temperature}"])
