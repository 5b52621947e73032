"""The settings of engines, servers and teachers: sections of a run's configuration."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from xopd.errors import UserError
from xopd.schema import ConfigError, Range, Section
from xopd.sections import Dtype

# What vLLM takes: above 2 it refuses, below 0.01 it silently samples at 0.01.
TEMPERATURES = (0.01, 2.0)
# As vLLM and a checkpoint's configuration name them.
DTYPE_NAMES = {Dtype.FP32: "float32", Dtype.BF16: "bfloat16"}

_Count = Annotated[int, Range(1, 10_000_000)]
_Seconds = Annotated[float, Range(0.0, 1_000_000.0, low_open=True)]
_Port = Annotated[int, Range(1, 65_535)]


class VllmError(UserError):
    """Something about vLLM, its settings or its answers that stops a run, and what to do."""


class Transport(StrEnum):
    """How weights reach a server."""

    DISK = "disk"
    NCCL = "nccl"


@dataclass(frozen=True)
class HttpConfig(Section):
    """How servers of rollouts and of teachers are called."""

    api_key_file: str | None = None
    """A file that holds the key of the servers, and nothing else."""
    api_key_env: str | None = None
    """The environment variable that holds it; give one of the two, or neither."""
    allow_remote: bool = False
    """Also call servers that are not on this machine."""
    connections: _Count = 32
    """Calls under way at once."""
    attempt_s: _Seconds = 120.0
    """Longest time of one try."""
    deadline_s: _Seconds = 600.0
    """Longest time of all calls of a stage together, retries included."""
    retries: Annotated[int, Range(0, 1000)] = 1000
    """More tries after the first, as long as the deadline leaves time for them."""
    backoff_s: _Seconds = 0.5
    """Longest wait before the first retry; it doubles with each."""
    max_response_bytes: Annotated[int, Range(1, 2**40)] = 256 * 1024 * 1024
    """A longer answer is refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key_file is not None and self.api_key_env is not None:
            raise ConfigError(
                f"http.api_key_file {self.api_key_file!r} and http.api_key_env "
                f"{self.api_key_env!r} are both set: keep the one that holds the key"
            )

    def api_key(self) -> str | None:
        """The key, read now; None where neither source is named. Never part of an error."""
        if self.api_key_file is not None:
            return _key_from_file(Path(self.api_key_file))
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise VllmError(
                f"http.api_key_env names {self.api_key_env!r}, which is not set or empty: export "
                "the key of the server under that name."
            )
        return _checked_key(key, f"environment variable {self.api_key_env!r}")


@dataclass(frozen=True)
class VllmConfig(Section):
    """What samples where rollout.engine is vllm or server."""

    dtype: Dtype = Dtype.FP32
    """Precision of its weights and computation; usually model.dtype."""
    max_model_len: _Count = 4096
    """Longest prompt and response together, in tokens."""
    max_num_seqs: _Count = 256
    """Trajectories decoded at once."""
    gpu_memory_utilization: Annotated[float, Range(0.0, 1.0, low_open=True)] = 0.5
    """Share of each GPU, on a CPU of the host's memory; the trainer needs the rest."""
    kv_cache_bytes: Annotated[int | None, Range(1, 2**50)] = None
    """Size of its cache of keys and values; null: what gpu_memory_utilization leaves."""
    tensor_parallel: _Count = 1
    """GPUs over which its weights are spread."""
    enforce_eager: bool = False
    """No CUDA graphs and no compilation: slower, but starts at once."""
    own_process: bool = True
    """A child process; false: in the trainer's, which then has one rank, for a GPU."""
    sleep: bool = False
    """Give GPU memory back while the trainer computes; not for a server."""
    probe_tokens: _Count = 16
    """Tokens of the trajectories that are compared after each weight sync."""
    probe_tolerance: Annotated[float, Range(0.0, 1_000.0, low_open=True)] = 0.1
    """Largest difference of their log-probs to the trainer's own, in nat."""


@dataclass(frozen=True)
class ServerConfig(Section):
    """A vLLM server that samples, where rollout.engine is server (see docs/vllm.md)."""

    url: str = "http://127.0.0.1:8000"
    """Its address."""
    model: str = "student"
    """The name that it serves (--served-model-name)."""
    transport: Transport = Transport.DISK
    """How weights get there: through a folder that both see, or from GPU to GPU."""
    folder: str = "/dev/shm/xopd-student"
    """That folder; /dev/shm keeps it in memory."""
    nccl_host: str = "127.0.0.1"
    """For nccl: where the server's GPUs reach the trainer."""
    nccl_port: _Port = 29577
    """For nccl: a free port there."""


@dataclass(frozen=True)
class TeacherConfig(Section):
    """A teacher behind vLLM servers, in place of one that the trainer runs."""

    urls: str | None = None
    """Addresses of its replicas, separated by commas; null: the trainer runs model.teacher, of
    which a served teacher takes the tokenizer and the configuration alone."""
    model: str = "teacher"
    """The name that they serve."""
    max_model_len: _Count = 4096
    """Longest prompt and response together, in tokens, that they must take."""
    gpu_memory_utilization: Annotated[float, Range(0.0, 1.0, low_open=True)] = 0.4
    """For `xopd serve teacher`: share of each GPU, or of the host's memory on a CPU."""
    kv_cache_bytes: Annotated[int | None, Range(1, 2**50)] = None
    """For `xopd serve teacher`: size of its cache; null: what gpu_memory_utilization leaves."""
    tensor_parallel: _Count = 1
    """For `xopd serve teacher`: GPUs over which its weights are spread."""
    enforce_eager: bool = False
    """For `xopd serve teacher`: no CUDA graphs and no compilation."""
    max_dropped: Annotated[float, Range(0.0, 1.0, high_open=True)] = 0.0
    """Share of a step's rollouts that may be left out because no replica could score them."""

    def addresses(self) -> tuple[str, ...]:
        """One for each replica; empty where the trainer runs the teacher."""
        found = tuple(url.strip() for url in (self.urls or "").split(",") if url.strip())
        if len(set(found)) != len(found):
            raise ConfigError(
                f"teacher.urls {self.urls!r} names a server twice: list each replica once"
            )
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.addresses() and self.urls is not None:
            raise ConfigError(f"teacher.urls {self.urls!r} names no server: give one, or null")


def check_temperature(temperature: float) -> None:
    """Refuse what vLLM would refuse or clamp."""
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise ConfigError(
            f"rollout.temperature is {temperature}, but vLLM samples at {low} to {high} only: "
            "choose one in that range, or rollout.engine generate"
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
            "http://HOST:PORT and put the key in http.api_key_file or http.api_key_env."
        )
    if not allow_remote and not _is_loopback(parts.hostname):
        raise VllmError(
            f"server {parts.hostname!r} is not on this machine. Reach it through a tunnel, or set "
            "http.allow_remote where the network between is yours alone."
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
            f"http.api_key_file {str(path)!r} cannot be read as text: {type(error).__name__}. "
            "Write the key, and nothing else, in that file."
        ) from error
    return _checked_key(text.strip(), f"http.api_key_file {str(path)!r}")


def _checked_key(key: str, where: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise VllmError(f"{where} holds no usable key: one word of printable ASCII is expected.")
    return key
