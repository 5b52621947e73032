"""The settings of engines, servers and teachers, as plain frozen records.

A record checks itself when it is built, so that a run stops before it has loaded a model, and every
error names the field, its value and what to write instead.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from xopd.errors import UserError

# What vLLM takes: above 2 it refuses, below 0.01 it silently samples at 0.01.
TEMPERATURES = (0.01, 2.0)


class VllmError(UserError):
    """Something about vLLM, its settings or its answers that stops a run, and what to do."""


class Transport(StrEnum):
    """How weights reach a server."""

    DISK = "disk"  # a folder that both see; any device, and `/dev/shm` keeps it in memory
    NCCL = "nccl"  # from GPU to GPU, by vLLM's own weight transfer


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How servers are called."""

    api_key_file: str | None = None  # a file that holds the key and nothing else
    api_key_env: str | None = None  # the environment variable that holds it
    allow_remote: bool = False  # else a server must be on this machine
    connections: int = 32  # calls under way at once
    attempt_s: float = 120.0  # longest time of one try
    deadline_s: float = 600.0  # longest time of all calls of a step together, retries included
    retries: int = 4  # more tries after the first, of what may be repeated
    backoff_s: float = 0.5  # longest wait before the first retry; it doubles with each
    max_response_bytes: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.api_key_file is not None and self.api_key_env is not None:
            raise VllmError(
                f"api_key_file {self.api_key_file!r} and api_key_env {self.api_key_env!r} are both "
                "set: keep the one that holds the key."
            )
        for name in ("connections", "attempt_s", "deadline_s", "backoff_s", "max_response_bytes"):
            value = getattr(self, name)
            if not value > 0:  # also refuses NaN
                raise VllmError(f"{name} is {value}: give a number above 0.")
        if self.retries < 0:
            raise VllmError(f"retries is {self.retries}: give 0 or more.")

    def api_key(self) -> str | None:
        """The key, read now; None where neither source is named. Never part of an error."""
        if self.api_key_file is not None:
            return _key_from_file(Path(self.api_key_file))
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise VllmError(
                f"api_key_env names {self.api_key_env!r}, which is not set or empty: export the "
                "key of the server under that name."
            )
        return _checked_key(key, f"environment variable {self.api_key_env!r}")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What samples, in this process or in a server."""

    dtype: str = "float32"  # of weights and computation: float32 or bfloat16
    max_model_len: int = 4096  # longest prompt and response together, in tokens
    max_num_seqs: int = 256  # trajectories decoded at once
    gpu_memory_utilization: float = 0.5  # share of each GPU; the trainer needs the rest
    kv_cache_bytes: int | None = None  # None: on a GPU what gpu_memory_utilization leaves
    tensor_parallel: int = 1
    enforce_eager: bool = False  # no CUDA graphs and no compilation: slower, starts at once
    own_process: bool = True  # else the engine shares the trainer's; for a trainer of one rank
    sleep: bool = False  # release GPU memory while the trainer computes; not for a server
    probe_tokens: int = 16  # of the trajectories that are compared after each sync
    probe_tolerance: float = 0.1  # largest difference of a log-prob to the trainer's own, in nat

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise VllmError(f"dtype is {self.dtype!r}: write float32 or bfloat16.")
        counts = ("max_model_len", "max_num_seqs", "tensor_parallel", "probe_tokens")
        for name in (*counts, "probe_tolerance"):
            value = getattr(self, name)
            if not value > 0:
                raise VllmError(f"{name} is {value}: give a number above 0.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise VllmError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}: give a share in (0, 1]."
            )
        if self.kv_cache_bytes is not None and self.kv_cache_bytes <= 0:
            raise VllmError(f"kv_cache_bytes is {self.kv_cache_bytes}: give a size above 0.")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """A server that samples, and how the student's weights get there."""

    url: str = "http://127.0.0.1:8000"
    model: str = "student"  # the name it serves (--served-model-name)
    transport: Transport = Transport.DISK
    folder: str = "/dev/shm/xopd-student"  # for DISK: seen by trainer and server alike
    nccl_host: str = "127.0.0.1"  # for NCCL: where the server's GPUs reach the trainer
    nccl_port: int = 29577

    def __post_init__(self) -> None:
        if not 0 < self.nccl_port < 65536:
            raise VllmError(f"nccl_port is {self.nccl_port}: give a port in 1..65535.")


@dataclass(frozen=True, slots=True)
class TeacherOptions:
    """One or more servers of the same teacher."""

    urls: tuple[str, ...] = ("http://127.0.0.1:8001",)
    model: str = "teacher"

    def __post_init__(self) -> None:
        if not self.urls:
            raise VllmError("urls is empty: name at least one server of the teacher.")
        if len(set(self.urls)) != len(self.urls):
            raise VllmError(f"urls {self.urls} names a server twice: list each replica once.")


def check_temperature(temperature: float) -> None:
    """Refuse what vLLM would refuse or clamp."""
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise VllmError(
            f"rollout.temperature is {temperature}, but vLLM samples at {low} to {high} only: "
            "choose one in that range, or sample with generate."
        )


def checked_url(url: str, *, allow_remote: bool) -> SplitResult:
    """The parts of a server's address; refuses what is no plain http(s) address or not here.

    vLLM's control routes take no key, so whoever reaches the port can replace the weights.
    """
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0
    except ValueError:  # an address in brackets that is none, or a port out of range
        has_port = False
    if not has_port or parts.scheme not in ("http", "https") or not parts.hostname:
        raise VllmError(f"server address {url!r}: expected http://HOST:PORT.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise VllmError(
            f"the address of server {parts.hostname!r} holds a user, a query or a fragment: write "
            "http://HOST:PORT and put the key in api_key_file or api_key_env."
        )
    if not allow_remote and not _is_loopback(parts.hostname):
        raise VllmError(
            f"server {parts.hostname!r} is not on this machine. Reach it through a tunnel, or set "
            "allow_remote where the network between is yours alone."
        )
    return parts


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: what it means may change between two calls


def _key_from_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise VllmError(
            f"api_key_file {str(path)!r} cannot be read as text: {type(error).__name__}. Write the "
            "key, and nothing else, in that file."
        ) from error
    return _checked_key(text.strip(), f"api_key_file {str(path)!r}")


def _checked_key(key: str, where: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise VllmError(f"{where} holds no usable key: one word of printable ASCII is expected.")
    return key
