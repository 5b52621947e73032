"""How long a pass takes, and how fast this device multiplies and copies at its best."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# A cache of this many times its size is overwritten before each timed pass.
_FLUSH = 2


class Clock:
    """Times passes on a device.

    On CUDA between two events, after a write that evicts the L2 cache, so that no pass finds what
    the last one left there; launches that wait on the host count, as they do in training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(_FLUSH * cache, dtype=torch.uint8, device=device)

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The time of one call; what it returns is released after the clock has stopped."""
        if self._flush is None:
            start = time.perf_counter()
            result = run()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            del result
            return elapsed_ms
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(begin.elapsed_time(end))


class Ceiling(NamedTuple):
    """The best rates of this device, measured in this run."""

    tflop_s: float  # of torch.mm on square matrices
    gb_s: float  # of a copy: bytes read and written
    dtype: str = ""  # of the GEMM

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, is_smoke: bool) -> "Ceiling":
        """Measure both, the best of some passes.

        On a CPU the GEMM in `dtype` or in fp32, whichever is faster: without instructions for a
        narrow dtype its GEMM is no ceiling.
        """
        clock, is_cuda = Clock(device), device.type == "cuda"
        passes = 3 if is_smoke or not is_cuda else 20

        def best(run: Callable[[], object]) -> float:
            run()
            return min(clock.milliseconds(run) for _ in range(passes)) * 1e-3

        def gemm_s(of: torch.dtype) -> float:
            left, right = (torch.randn(size, size, device=device).to(of) for _ in range(2))
            out = torch.empty_like(left)
            return best(lambda: torch.mm(left, right, out=out))

        size = 256 if is_smoke else 8192 if is_cuda else 1024
        dtypes = {dtype} if is_cuda else {dtype, torch.float32}
        fastest_s, name = min((gemm_s(x), str(x).removeprefix("torch.")) for x in dtypes)
        source = torch.empty(2**20 if is_smoke else 2**28, dtype=torch.uint8, device=device)
        source.zero_()
        target = torch.zeros_like(source)
        copy_s = best(lambda: target.copy_(source))
        return cls(2 * size**3 / fastest_s * 1e-12, 2 * source.nbytes / copy_s * 1e-9, name)
