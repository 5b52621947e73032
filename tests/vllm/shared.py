"""What the tests against a fake server share: requests, weights, and the code under test."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.vllm.fake_server import EOS, KEY, MODEL, RESERVED, VOCABULARY
from xopd.vllm.engine import Call, Sampling
from xopd.vllm.options import HttpConfig, ServerConfig, TeacherConfig, VllmConfig, VllmError
from xopd.vllm.server import ServerBackend
from xopd.vllm.sync import Fingerprint
from xopd.vllm.teacher import Trajectory, VllmTeacher
from xopd.vllm.worker import bit_sum

SLACK_S = 1.5  # for threads to be scheduled on a busy machine
MAX_TOKENS = 8
SAMPLING = Sampling(1.0, MAX_TOKENS, VOCABULARY, EOS, frozenset(RESERVED))
CALLS = [
    Call((5, 6, 7), None, 11),
    Call((5, 6, 8), None, 12),
    Call((5, 9, 9, 9, 8), torch.zeros(5, 4), 13),
]
ROWS = [Trajectory(str(i), (5, 6, 7 + i), (9, 10, EOS)) for i in range(4)]


class Weights:
    """Two tensors in place of a language model."""

    def __init__(self, value: float) -> None:
        self.tensors = {
            "model.norm.weight": torch.full((4,), value),
            "lm_head.weight": torch.full((VOCABULARY, 4), value),
        }
        self.fingerprint = {
            name: Fingerprint(tensor.numel(), bit_sum(tensor))
            for name, tensor in self.tensors.items()
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


@contextmanager
def in_time(deadlines: int, http: HttpConfig) -> Iterator[None]:
    """The block raises, within so many deadlines."""
    start_s = time.monotonic()
    with pytest.raises(VllmError) as caught:
        yield
    assert time.monotonic() - start_s < deadlines * http.deadline_s + SLACK_S
    assert KEY not in str(caught.value)


def backend_of(url: str, http: HttpConfig, folder: Path) -> ServerBackend:
    return ServerBackend(
        ServerConfig(url=url, model=MODEL, folder=str(folder)),
        http,
        VllmConfig(max_model_len=64),
    )


def teacher_of(url: str, http: HttpConfig) -> VllmTeacher:
    options = TeacherConfig(urls=url, model=MODEL, max_model_len=64)
    return VllmTeacher(options, http, classes=VOCABULARY, eos_id=EOS)
