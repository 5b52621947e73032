"""What the tests of a real vLLM share: its settings, and servers that end with a test."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from xopd.vllm.http import Deadline, HttpClient, ServerError
from xopd.vllm.options import HttpConfig, VllmConfig

# Found, not imported: engines and servers of these tests are processes of their own.
REAL = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm has it"
    ),
]

# What fp32 on both sides leaves: other kernels, another order of sums.
BOUND = 2e-3
OPTIONS = VllmConfig(
    max_model_len=256,
    max_num_seqs=32,
    kv_cache_bytes=128 * 2**20,
    enforce_eager=True,
    probe_tolerance=BOUND,
)
KEY_ENV = "XOPD_TEST_VLLM_KEY"
KEY = "a-key"


# Below the ports that Linux (32768 and up) gives to connections: an engine that starts opens some
# between the moment a port is found free and the moment its server binds it.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    while True:
        port = random.SystemRandom().choice(PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def serving(command: list[str], environment: dict[str, str], url: str, log: Path) -> Iterator[None]:
    """A server that answers, ended with the block."""
    root = str(Path(__file__).resolve().parents[2])
    whole = os.environ | environment | {"VLLM_API_KEY": KEY, "PYTHONPATH": root}
    whole.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    client = HttpClient(url, HttpConfig(retries=0, attempt_s=2.0))
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=whole, stdout=output, stderr=output)
        try:
            end_s = time.monotonic() + 240
            while time.monotonic() < end_s and server.poll() is None:
                try:
                    client.get("/version", Deadline(2.0))
                    break
                except ServerError:
                    time.sleep(0.5)
            else:
                pytest.fail(log.read_text()[-4000:])
            yield
        finally:
            server.terminate()
            server.wait(60)
