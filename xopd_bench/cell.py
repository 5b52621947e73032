"""What is measured: a cell is one job, shape, dtype, distribution and share of masked tokens."""

import enum
from dataclasses import dataclass

import torch

from xopd_kernels.testing import Distribution


class Job(enum.Enum):
    """What is timed."""

    SCORING = "scoring"  # log-probs of targets, no gradient
    POLICY_LOSS = "policy_loss"  # forward and backward; advantage 1, ratio 1
    FROZEN_HEAD = "frozen_head"  # the policy loss where the weight takes no gradient
    DIVERGENCE = "divergence"  # reverse KL to a teacher of the same sizes, forward and backward
    JSD = "jsd"  # the Jensen-Shannon divergence with beta = 1/2
    TOPK_DIVERGENCE = "topk_divergence"  # reverse KL to the teacher's 64 likeliest classes
    ADVANTAGE = "advantage"  # log-probs of targets under student and teacher, no gradient

    @property
    def gemm_count(self) -> int:
        """The GEMMs of size N V D that the job cannot do without."""
        return _GEMMS[self]

    @property
    def has_gradient(self) -> bool:
        """Whether there is a backward pass."""
        return self not in (Job.SCORING, Job.ADVANTAGE)

    @property
    def has_d_weight(self) -> bool:
        """Whether the backward pass reaches the weight."""
        return self.has_gradient and self is not Job.FROZEN_HEAD

    @property
    def has_teacher(self) -> bool:
        """Whether there is a second head."""
        return self in (Job.DIVERGENCE, Job.JSD, Job.ADVANTAGE)

    @property
    def beta(self) -> float:
        """Which divergence: see `xopd_kernels.linear_divergence`."""
        return 0.5 if self is Job.JSD else 1.0


_GEMMS = {
    Job.SCORING: 1,
    Job.POLICY_LOSS: 3,
    Job.FROZEN_HEAD: 2,
    Job.DIVERGENCE: 4,
    Job.JSD: 4,
    Job.TOPK_DIVERGENCE: 3,
    Job.ADVANTAGE: 2,
}
TOP_K = 64


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden size and classes."""

    rows: int
    dim: int
    vocab_size: int

    @property
    def name(self) -> str:
        """NxDxV, as on the command line."""
        return f"{self.rows}x{self.dim}x{self.vocab_size}"

    @property
    def gemm_flop(self) -> int:
        """Floating-point operations of one lm_head GEMM."""
        return 2 * self.rows * self.dim * self.vocab_size


@dataclass(frozen=True)
class Cell:
    """One measurement: a place in the table."""

    shape: Shape
    dtype: torch.dtype
    job: Job
    distribution: Distribution
    masked_percent: int

    @property
    def live_rows(self) -> int:
        """Tokens that count."""
        return self.shape.rows - self.shape.rows * self.masked_percent // 100

    @property
    def least_flop(self) -> int:
        """Operations of the GEMMs over the tokens that count."""
        return self.job.gemm_count * self.shape.gemm_flop * self.live_rows // self.shape.rows

    @property
    def all_flop(self) -> int:
        """Operations of the GEMMs over all tokens."""
        return self.job.gemm_count * self.shape.gemm_flop

    @property
    def least_bytes(self) -> int:
        """Bytes that have to be moved: each input read once, each gradient written once."""
        shape, size = self.shape, self.dtype.itemsize
        head = (self.live_rows + shape.vocab_size) * shape.dim * size
        models = 1 + self.job.has_teacher
        gradients = (
            self.live_rows * self.job.has_gradient + shape.vocab_size * self.job.has_d_weight
        )
        return models * head + gradients * shape.dim * size

    def record(self) -> dict[str, str | int]:
        """What a JSON line says of it."""
        return {
            "shape": self.shape.name,
            "rows": self.shape.rows,
            "dim": self.shape.dim,
            "vocab_size": self.shape.vocab_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "job": self.job.value,
            "distribution": self.distribution.value,
            "masked_percent": self.masked_percent,
        }
