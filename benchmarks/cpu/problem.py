"""What is computed: inputs of a cell, the same in plain torch, and the truth in fp64.

A cell is measured at its full vocabulary and probed at two fractions of it, with inputs drawn for
each. The truth and the error of plain torch come from one function, `solve`, in two precisions.
"""

import dataclasses
import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Shape
from xopd_kernels.testing import Distribution, make_inputs
from xopd_kernels.testing.dense import divergence_rows, rows_of

IGNORED = -100
# Classes whose weight is converted to fp64 at a time.
_BLOCK_CLASSES = 8192

Results = dict[str, Tensor]  # by name: logprob, loss, divergence, d_hidden, d_weight


class Job(enum.Enum):
    """What is timed."""

    POLICY_LOSS = "policy_loss"  # forward and backward; advantage 1, ratio 1
    SCORING = "scoring"  # log-probs of targets, no gradient
    DIVERGENCE = "divergence"  # reverse KL to a teacher of the same sizes, forward and backward

    @property
    def gemm_count(self) -> int:
        """The GEMMs of size N V D that the job cannot do without."""
        return {Job.POLICY_LOSS: 3, Job.SCORING: 1, Job.DIVERGENCE: 4}[self]


@dataclass(frozen=True)
class Cell:
    """One measurement: a place in the table."""

    shape: Shape
    dtype: torch.dtype
    job: Job
    distribution: Distribution
    masked_percent: int

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


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors of one job; hidden and weight require a gradient unless the job is scoring."""

    job: Job
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64; IGNORED where masked
    teacher_hidden: Tensor | None  # [N, D]; divergence only
    teacher_weight: Tensor | None  # [V, D]

    @property
    def is_live(self) -> Tensor:
        """[N] bool: the tokens that count."""
        return self.target != IGNORED

    def teacher(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight of the teacher; ValueError for a job without one."""
        if self.teacher_hidden is None or self.teacher_weight is None:
            raise ValueError(f"the job {self.job.value} has no teacher")
        return self.teacher_hidden, self.teacher_weight

    def of_rows(self, rows: Tensor) -> "Problem":
        """The problem of these tokens alone."""
        teacher = None if self.teacher_hidden is None else self.teacher_hidden[rows]
        return dataclasses.replace(
            self,
            hidden=self.hidden.detach()[rows],
            target=self.target[rows],
            teacher_hidden=teacher,
        )


@dataclass(frozen=True, eq=False)
class Drawn:
    """Student and teacher of one shape, dtype and distribution: shared by jobs and masks."""

    hidden: Tensor
    weight: Tensor
    target: Tensor  # no token is ignored
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None

    @classmethod
    def of(
        cls, shape: Shape, dtype: torch.dtype, distribution: Distribution, has_teacher: bool
    ) -> "Drawn":
        """Inputs that depend on the arguments alone."""
        student = _draw(shape, dtype, distribution, seed=0)
        if not has_teacher:
            return cls(*student, None, None)
        return cls(*student, *_draw(shape, dtype, distribution, seed=1)[:2])

    def problem(self, job: Job, masked_percent: int) -> Problem:
        """The job on these inputs, with a share of the tokens ignored, spread at random."""
        rows = len(self.target)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
        target = self.target.index_fill(0, order[: rows * masked_percent // 100], IGNORED)
        has_gradient, has_teacher = job is not Job.SCORING, job is Job.DIVERGENCE
        return Problem(
            job,
            self.hidden.detach().requires_grad_(has_gradient),
            self.weight.detach().requires_grad_(has_gradient),
            target,
            self.teacher_hidden if has_teacher else None,
            self.teacher_weight if has_teacher else None,
        )


def _draw(
    shape: Shape, dtype: torch.dtype, distribution: Distribution, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, target) with a target for every token.

    `make_inputs` ignores one in eight: more are drawn and those are left out, because a target
    put in later would not be the one that a peaked row has its peak at.
    """
    spare = shape.rows // 4 + 32
    sizes = (shape.rows + spare, shape.vocab_size, shape.dim)
    inputs = make_inputs(*sizes, dtype, distribution, seed=seed)
    live = (inputs.target != IGNORED).nonzero().squeeze(1)[: shape.rows]
    if len(live) < shape.rows:
        raise RuntimeError(f"only {len(live)} of {shape.rows} tokens have a target")
    return inputs.hidden.detach()[live], inputs.weight.detach(), inputs.target[live]


def solve(problem: Problem, is_exact: bool, has_d_weight: bool = True) -> Results:
    """The job with all logits: in fp64, or as plain torch rounds it.

    Plain torch rounds logits, their gradient and the results to the dtype of the inputs, and
    sums in fp32. It is computed with fp32 GEMMs, as bf16 ones take minutes where the CPU has no
    instructions for them.
    """
    dtype, wide = problem.hidden.dtype, torch.float64 if is_exact else torch.float32

    def rounded(x: Tensor) -> Tensor:
        return x if is_exact else x.to(dtype).to(wide)

    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = rounded(_logits(hidden, weight, wide)).requires_grad_(problem.job is not Job.SCORING)
    values: Results = {}
    if problem.job is Job.DIVERGENCE:
        teacher = rounded(_logits(*problem.teacher(), wide))
        token_weight = problem.is_live.to(wide)
        values["divergence"] = divergence_rows(logits, teacher, 1.0, token_weight).divergence
        total = values["divergence"].sum()
    else:
        values["logprob"] = rows_of(logits, problem.target, IGNORED).logprob
        total = values["loss"] = -values["logprob"].sum()
    values = {name: value.detach() for name, value in values.items()}
    if problem.job is Job.SCORING:
        return values
    (gradient,) = torch.autograd.grad(total, logits)
    gradient = rounded(gradient)
    d_hidden = torch.zeros(hidden.shape, dtype=wide)
    for start in range(0, len(weight), _BLOCK_CLASSES):
        part = slice(start, start + _BLOCK_CLASSES)
        d_hidden += gradient[:, part] @ weight[part].to(wide)
    values["d_hidden"] = rounded(d_hidden)
    if has_d_weight:
        values["d_weight"] = rounded(gradient.T @ hidden.to(wide))
    return values


def _logits(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    hidden = hidden.to(wide)
    return torch.cat([hidden @ part.to(wide).T for part in weight.split(_BLOCK_CLASSES)], 1)
