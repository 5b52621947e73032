"""GPUs by their data sheets, and a cluster of them. Rates are those of one direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from xopd.plan.errors import PlanError

GB = 10**9  # as data sheets and network cards count


class Gpu(NamedTuple):
    """What one GPU has; a data sheet's dense figures, never those with sparsity."""

    name: str
    memory_bytes: float
    bf16_flops: float  # dense, per second
    fp32_flops: float  # without tensor cores, per second
    memory_bytes_per_s: float
    link_bytes_per_s: float  # to the other GPUs of the node, one direction
    network_bytes_per_s: float  # its share of the node's network cards, one direction
    host_bytes_per_s: float  # to host memory, one direction
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "a100-80gb",
            memory_bytes=80 * GB,
            bf16_flops=312e12,
            fp32_flops=19.5e12,
            memory_bytes_per_s=2039 * GB,
            link_bytes_per_s=300 * GB,
            network_bytes_per_s=25 * GB,
            host_bytes_per_s=32 * GB,
            source="NVIDIA A100 data sheet, 80 GB SXM (NVLink 600 GB/s and PCIe 64 GB/s count both "
            "directions); network: 200 Gbit/s a GPU, as in DGX A100",
        ),
        Gpu(
            "h100",
            memory_bytes=80 * GB,
            bf16_flops=989.5e12,
            fp32_flops=67e12,
            memory_bytes_per_s=3350 * GB,
            link_bytes_per_s=450 * GB,
            network_bytes_per_s=50 * GB,
            host_bytes_per_s=64 * GB,
            source="NVIDIA H100 data sheet, SXM (1979 TFLOP/s is with sparsity; NVLink 900 GB/s "
            "and PCIe 128 GB/s count both directions); network: 400 Gbit/s a GPU, as in DGX H100",
        ),
        Gpu(
            "h200",
            memory_bytes=141 * GB,
            bf16_flops=989.5e12,
            fp32_flops=67e12,
            memory_bytes_per_s=4800 * GB,
            link_bytes_per_s=450 * GB,
            network_bytes_per_s=50 * GB,
            host_bytes_per_s=64 * GB,
            source="NVIDIA H200 data sheet, SXM (sparsity and directions as for h100); network: "
            "400 Gbit/s a GPU, as in DGX H200",
        ),
        Gpu(
            "b200",
            memory_bytes=180 * GB,
            bf16_flops=2250e12,
            fp32_flops=75e12,
            memory_bytes_per_s=8000 * GB,
            link_bytes_per_s=900 * GB,
            network_bytes_per_s=50 * GB,
            host_bytes_per_s=64 * GB,
            source="NVIDIA DGX B200 and HGX B200 data sheets, an eighth of eight GPUs (4.5 PFLOP/s "
            "is with sparsity; NVLink 1800 GB/s counts both directions; PCIe 5 x16); network: "
            "400 Gbit/s a GPU",
        ),
        Gpu(
            "l40s",
            memory_bytes=48 * GB,
            bf16_flops=362.05e12,
            fp32_flops=91.6e12,
            memory_bytes_per_s=864 * GB,
            link_bytes_per_s=32 * GB,
            network_bytes_per_s=25 * GB,
            host_bytes_per_s=32 * GB,
            source="NVIDIA L40S data sheet (no NVLink; PCIe 64 GB/s counts both directions); "
            "network: 200 Gbit/s a GPU, an assumption",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes of equal GPUs. The shares and what follows them are assumptions, not data sheets."""

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 8
    compute_share: float = 0.4  # of the peak FLOP/s
    memory_share: float = 0.7  # of the memory bandwidth
    link_share: float = 0.7  # of links and network
    reserve_bytes: float = 3 * GB  # a rank: CUDA context, NCCL buffers, fragmentation
    host_memory_bytes_per_s: float = 300 * GB  # a node
    storage_bytes_per_s: float = 2 * GB  # a node

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("compute_share", "memory_share", "link_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise PlanError(
                    f"{name} is a share of the data sheet's figure and must lie in (0, 1], got "
                    f"{getattr(self, name)}"
                )

    @property
    def ranks(self) -> int:
        """n: one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def bf16_flops(self) -> float:
        """Of one GPU, per second."""
        return self.gpu.bf16_flops * self.compute_share

    @property
    def fp32_flops(self) -> float:
        """Of one GPU without tensor cores, per second."""
        return self.gpu.fp32_flops * self.compute_share

    @property
    def memory_bytes_per_s(self) -> float:
        """Of one GPU."""
        return self.gpu.memory_bytes_per_s * self.memory_share

    @property
    def bus_bytes_per_s(self) -> float:
        """What a ring over all ranks moves through one rank.

        Within a node that is the link. Over several, every ring crosses the nodes' borders, and
        the rings of a node share its network cards.
        """
        rate = self.gpu.link_bytes_per_s
        if self.nodes > 1:
            rate = min(rate, self.gpus_per_node * self.gpu.network_bytes_per_s)
        return rate * self.link_share

    def gather_s(self, whole_bytes: float) -> float:
        """Seconds of an all-gather, or a reduce-scatter, of a tensor of so many bytes.

        bytes * (n - 1) / n / bus: what every rank has to receive (ring algorithm, latency left
        out).
        """
        return whole_bytes * (self.ranks - 1) / self.ranks / self.bus_bytes_per_s
