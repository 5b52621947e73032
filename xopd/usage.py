"""What an update costs: its FLOP/s, their share of what the device could do, and peak memory.

Model FLOPs utilisation as in PaLM (arXiv 2204.02311, appendix B): the FLOPs that the mathematics
needs, counted once. Layers that are computed again to save memory do not count, so recomputing
lowers the figure, as it should.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch

from xopd.models import SpeechLM
from xopd.plan import GPUS, ModelShape, shape_of
from xopd.plan.timing import layer_flops
from xopd.ranks import World
from xopd.rollout import Sampled

KIB = 1024


def update_flops(shape: ModelShape, rows: Sequence[Sampled]) -> float:
    """FLOPs of forward and backward passes over rollouts.

    3 sum over rows of T (2 A + 2 L H h T) + n 2 V D: T tokens of prompt and response, n of the
    response alone, A active parameters without embedding and lm_head.
    """
    total = 0.0
    for row in rows:
        tokens = row.prompt_tokens + len(row.response_ids)
        total += tokens * layer_flops(shape, tokens)
        total += len(row.response_ids) * 2.0 * shape.vocabulary * shape.hidden
    return 3.0 * total


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU's data sheet by the device's own name; None for one that is not listed."""
    words = name.lower().replace("-", " ").split()
    if "pcie" in words:  # slower than the SXM module of the same name, whose sheet we have
        return None
    for gpu in GPUS.values():
        if gpu.name.partition("-")[0] in words:
            return gpu.bf16_flops if dtype is torch.bfloat16 else gpu.fp32_flops
    return None


class Usage:
    """Counts of a run's model, and the memory of its ranks."""

    def __init__(self, student: SpeechLM, world: World, dtype: torch.dtype) -> None:
        self._shape, self._world = shape_of(student.model, "student"), world
        self._is_cuda = world.device.type == "cuda"
        self._peak_flops: float | None = None
        if self._is_cuda:
            self._peak_flops = peak_flops(torch.cuda.get_device_name(world.device), dtype)

    def of_update(self, rows: Sequence[Sampled], seconds: float) -> dict[str, float | int]:
        """Metrics of an update over the rollouts of all ranks; all ranks call it together.

        tflop_s: of each rank. mfu: its share of the data sheet, where the GPU is listed.
        peak_memory_gb: the most that a rank has held so far, 10^9 bytes: what torch has allocated
        on a GPU, else the process's resident set.
        """
        rate = update_flops(self._shape, rows) / self._world.size / max(seconds, 1e-9)
        record: dict[str, float | int] = {"tflop_s": rate * 1e-12}
        if self._peak_flops is not None:
            record["mfu"] = rate / self._peak_flops
        record["peak_memory_gb"] = max(self._world.gather(self._peak_bytes())) * 1e-9
        return record

    def _peak_bytes(self) -> int:
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self._world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
