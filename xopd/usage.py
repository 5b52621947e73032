"""What an update costs: its FLOP/s, their share of what the device could do, and peak memory.

Model FLOPs utilisation as in PaLM (arXiv 2204.02311, appendix B): the FLOPs that the mathematics
needs, counted once. Layers that are computed again to save memory do not count, so recomputing
lowers the figure, as it should.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch

from xopd.config import Config, Dtype
from xopd.models import SpeechLM
from xopd.plan import GPUS, ModelShape, UpdateBatch, planned_cpu_step, shape_of
from xopd.plan.timing import layer_flops
from xopd.ranks import World
from xopd.rollout import Sampled
from xopd.types import Rollout
from xopd_kernels import Backend
from xopd_kernels.backend import resolve

KIB = 1024


def update_flops(shape: ModelShape, rows: Sequence[Sampled]) -> float:
    """FLOPs of forward and backward passes over rollouts.

    3 sum over rows of T (2 A + 2 L H h T) + n 2 V D: T tokens of prompt and response, n of the
    response alone, A active parameters without embedding and lm_head. Sparse gradients count as
    exact ones: what they save shows as a higher rate.
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
    if {"pcie", "nvl", "mig"} & set(words):  # less than the SXM module, whose sheet we have
        return None
    for gpu in GPUS.values():
        if gpu.name.partition("-")[0] in words:
            return gpu.bf16_flops if dtype is torch.bfloat16 else gpu.fp32_flops
    return None


class Usage:
    """Counts of a run's model, and the memory of its ranks."""

    def __init__(self, student: SpeechLM, world: World, config: Config) -> None:
        dtype = torch.float32 if config.model.dtype is Dtype.FP32 else torch.bfloat16
        self._shape, self._world = shape_of(student.model, "student"), world
        self._is_cuda = world.device.type == "cuda"
        self._recomputes = config.sharding.checkpoint_activations
        self._is_sparse = config.loss.max_gradient_error is not None
        self._peak_flops: float | None = None
        if self._is_cuda:
            self._peak_flops = peak_flops(torch.cuda.get_device_name(world.device), dtype)
        # What the plan of one process counts; for ranks and bf16 there is `xopd plan`.
        self._backend: Backend | None = None
        if world.size == 1 and dtype is torch.float32:
            self._backend = resolve(str(config.train.backend), world.device, dtype)

    def of_update(self, rows: Sequence[Sampled], seconds: float) -> dict[str, float | int]:
        """Metrics of an update over the rollouts of all ranks; all ranks call it together.

        tflop_s: of each rank. mfu: its share of the data sheet, where the GPU is listed.
        peak_memory_gb: the most that a rank has held so far, 10^9 bytes: what torch has allocated
        on a GPU, else the process's resident set, libraries and teacher included.
        """
        rate = update_flops(self._shape, rows) / self._world.size / max(seconds, 1e-9)
        record: dict[str, float | int] = {"tflop_s": rate * 1e-12}
        if self._peak_flops is not None:
            record["mfu"] = rate / self._peak_flops
        record["peak_memory_gb"] = max(self._world.gather(self._peak_bytes())) * 1e-9
        return record

    def planned(self, updates: Sequence[Sequence[Sequence[Rollout]]]) -> dict[str, float | int]:
        """planned_memory_gb: what weights, moments and the largest of these updates should need.

        updates: the rows of each pass of each. By the arithmetic of `xopd plan`; for one process in
        fp32, else nothing.
        """
        if self._backend is None:
            return {}
        peaks = [
            planned_cpu_step(self._shape, self._batch(passes), self._backend).peak_bytes
            for passes in updates
        ]
        return {"planned_memory_gb": max(peaks) * 1e-9}

    def _batch(self, passes: Sequence[Sequence[Rollout]]) -> UpdateBatch:
        sizes = [
            (len(rows), max(len(r.prompt.ids(r.modality)) + len(r.response_ids) for r in rows))
            for rows in passes
        ]
        rows, width = max(sizes, key=lambda size: size[0] * size[1])
        return UpdateBatch(rows, width, len(passes), self._recomputes, self._is_sparse)

    def _peak_bytes(self) -> int:
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self._world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
