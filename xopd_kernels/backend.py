"""Which implementation runs, and for each one that cannot run the reason in words.

An explicit backend never falls back: it runs or it raises. "auto" takes TRITON on a CUDA device,
NATIVE on a CPU and REFERENCE elsewhere or where these cannot run, and logs each choice once.
"""

import enum
import functools
import importlib.util
import logging
from typing import Literal

import torch

from xopd_kernels import native_library, target

_LOGGER = logging.getLogger(__name__)


class Backend(enum.Enum):
    """An implementation of the operators."""

    REFERENCE = "reference"  # eager torch, chunked over rows; any device; the numerical oracle
    TRITON = "triton"  # Triton kernels; CUDA, or CPU tensors in Triton's interpreter
    NATIVE = "native"  # a compiled C++ library, with GEMMs of torch but for bf16; CPU


BackendChoice = Backend | Literal["auto"]


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


def unavailable_reason(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on `device` with inputs of `dtype`; None if it can."""
    if backend is Backend.REFERENCE:
        return None
    if dtype == torch.float64:
        return "its kernels accumulate in float32; float64 runs with Backend.REFERENCE"
    if backend is Backend.NATIVE:
        if device.type != "cpu":
            return f"the tensors are on {device}; the native library runs on CPUs"
        return native_library.unavailable_reason()
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install triton>=3.6"
    if device.type == "cuda":
        return target.triton_device_problem(device)
    if device.type == "cpu" and target.is_triton_interpreted():
        return None
    return (
        f"the tensors are on {device}; Triton compiles for CUDA devices. CPU tensors run only in "
        "its interpreter: set TRITON_INTERPRET=1 before the first import of triton"
    )


def resolve(choice: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that runs; raises BackendUnavailableError if an explicit one cannot.

    `choice` is a Backend value or "auto" (operator schemas carry strings, not enums).
    """
    if choice != "auto":
        backend = Backend(choice)
        reason = unavailable_reason(backend, device, dtype)
        if reason is not None:
            raise BackendUnavailableError(f"backend {backend.name} cannot run: {reason}")
        return backend
    return _resolve_auto(device, dtype)


@functools.cache
def _resolve_auto(device: torch.device, dtype: torch.dtype) -> Backend:
    """Cached, so that the choice for one kind of input is logged once."""
    wished = {"cuda": Backend.TRITON, "cpu": Backend.NATIVE}.get(device.type, Backend.REFERENCE)
    reason = unavailable_reason(wished, device, dtype)
    backend = wished if reason is None else Backend.REFERENCE
    # Slow where it is not wished for, which shows without any configuration; fp64 has no other.
    is_surprise = reason is not None and dtype != torch.float64
    _LOGGER.log(
        logging.WARNING if is_surprise else logging.INFO,
        "backend auto -> %s for %s on %s%s",
        backend.name,
        dtype,
        device,
        "" if reason is None else f" ({reason})",
    )
    return backend
