"""The only file that asks a device what it is: capability, processors, Triton's interpreter."""

import functools
from typing import NamedTuple

import torch

MIN_CUDA_CAPABILITY = (8, 0)  # bf16 tensor cores and cp.async


def cuda_capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as major * 10 + minor, for example 90."""
    major, minor = _capability(_index(device))
    return major * 10 + minor


class DeviceSizes(NamedTuple):
    """What a persistent grid and an L2-resident buffer are cut to."""

    processors: int
    l2_bytes: int


def device_sizes(device: torch.device) -> DeviceSizes:
    """Streaming multiprocessors and L2 of a CUDA device."""
    properties = torch.cuda.get_device_properties(_index(device))
    return DeviceSizes(properties.multi_processor_count, properties.L2_cache_size)


def triton_device_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this CUDA device; None if they can."""
    if torch.version.hip is not None:
        return "this build of torch is for ROCm; the kernels are tested on CUDA devices only"
    capability = _capability(_index(device))
    if capability < MIN_CUDA_CAPABILITY:
        need = ".".join(map(str, MIN_CUDA_CAPABILITY))
        return f"{device} has compute capability {capability[0]}.{capability[1]}, needs >= {need}"
    return None


def is_triton_interpreted() -> bool:
    """Whether Triton runs kernels in its Python interpreter (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def device_guard(tensor: torch.Tensor) -> torch.cuda.device:
    """Makes the device of `tensor` current: Triton launches on the current one. None for a CPU."""
    return torch.cuda.device(tensor.get_device())


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
