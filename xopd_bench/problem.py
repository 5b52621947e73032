"""Inputs of a cell, and the truth in fp64.

A cell is measured at its full vocabulary and probed at two fractions of it, with inputs drawn for
each. The truth and the error of plain torch come from one function, `solve`, in two precisions.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_bench.cell import TOP_K, Job, Shape
from xopd_kernels.testing import Distribution, dense_reverse_kl_advantage, make_inputs
from xopd_kernels.testing.dense import divergence_rows, rows_of, topk_rows

IGNORED = -100
# Classes whose weight is converted to fp64 at a time.
_BLOCK_CLASSES = 8192
# Tokens whose logits of all classes exist in fp64 at a time.
_BLOCK_ROWS = 128

# By name: logprob, loss, divergence, advantage, d_hidden, d_weight.
Results = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors of one job; hidden and weight require the gradients that the job computes."""

    job: Job
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64; IGNORED where masked
    teacher_hidden: Tensor | None  # [N, D]; jobs with a teacher, and top-k
    teacher_weight: Tensor | None  # [V, D]
    teacher_ids: Tensor | None = None  # [N, K] int64; top-k only
    teacher_logprob: Tensor | None = None  # [N, K] fp32

    @property
    def is_live(self) -> Tensor:
        """[N] bool: the tokens that count."""
        return self.target != IGNORED

    def teacher(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight of the teacher; ValueError for a job without one."""
        if self.teacher_hidden is None or self.teacher_weight is None:
            raise ValueError(f"the job {self.job.value} has no teacher")
        return self.teacher_hidden, self.teacher_weight

    def top_k(self) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest classes and their log-probs; ValueError for another job."""
        if self.teacher_ids is None or self.teacher_logprob is None:
            raise ValueError(f"the job {self.job.value} has no top-k")
        return self.teacher_ids, self.teacher_logprob

    def scorings(self) -> tuple["Problem", "Problem"]:
        """The scorings of student and teacher, which make an advantage."""
        hidden, weight = self.teacher()
        student = dataclasses.replace(self, job=Job.SCORING)
        return student, dataclasses.replace(student, hidden=hidden, weight=weight)

    def of_rows(self, rows: Tensor) -> "Problem":
        """The problem of these tokens alone."""

        def taken(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return dataclasses.replace(
            self,
            hidden=self.hidden.detach()[rows],
            target=self.target[rows],
            teacher_hidden=taken(self.teacher_hidden),
            teacher_ids=taken(self.teacher_ids),
            teacher_logprob=taken(self.teacher_logprob),
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
        cls,
        shape: Shape,
        dtype: torch.dtype,
        distribution: Distribution,
        device: torch.device,
        has_teacher: bool,
    ) -> "Drawn":
        """Inputs that depend on the arguments alone."""
        student = _draw(shape, dtype, distribution, device, seed=0)
        if not has_teacher:
            return cls(*student, None, None)
        return cls(*student, *_draw(shape, dtype, distribution, device, seed=1)[:2])

    def described(self) -> dict[str, float]:
        """How concentrated the softmax is, over some tokens: mean entropy, share with p > 0.99."""
        logprob = _logits(self.hidden[:_BLOCK_ROWS], self.weight, torch.float32).log_softmax(-1)
        entropy = -(logprob.exp() * logprob).sum(-1).mean()
        certain = (logprob.max(-1).values.exp() > 0.99).float().mean()
        return {"entropy_nat": round(float(entropy), 3), "certain_share": round(float(certain), 3)}

    def problem(self, job: Job, masked_percent: int) -> Problem:
        """The job on these inputs, with a share of the tokens ignored, spread at random."""
        rows = len(self.target)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
        masked = order[: rows * masked_percent // 100].to(self.target.device)
        problem = Problem(
            job,
            self.hidden.detach().requires_grad_(job.has_gradient),
            self.weight.detach().requires_grad_(job.has_d_weight),
            self.target.index_fill(0, masked, IGNORED),
            self.teacher_hidden if job.has_teacher else None,
            self.teacher_weight if job.has_teacher else None,
        )
        if job is not Job.TOPK_DIVERGENCE:
            return problem
        if self.teacher_hidden is None or self.teacher_weight is None:
            raise ValueError("top-k needs a teacher to be drawn")
        ids, logprob = _top_k(self.teacher_hidden, self.teacher_weight)
        return dataclasses.replace(problem, teacher_ids=ids, teacher_logprob=logprob)


def _draw(
    shape: Shape, dtype: torch.dtype, distribution: Distribution, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, target) with a target for every token.

    `make_inputs` ignores one in eight: more are drawn and those are left out, because a target
    put in later would not be the one that a peaked row has its peak at.
    """
    spare = shape.rows // 4 + 32
    sizes = (shape.rows + spare, shape.vocab_size, shape.dim)
    inputs = make_inputs(*sizes, dtype, distribution, str(device), seed)
    live = (inputs.target != IGNORED).nonzero().squeeze(1)[: shape.rows]
    if len(live) < shape.rows:
        raise RuntimeError(f"only {len(live)} of {shape.rows} tokens have a target")
    hidden, weight = inputs.hidden.detach()[live], inputs.weight.detach()
    if distribution is Distribution.PEAKED:
        # The Zipf tail is a bias, which not everybody takes: a constant column does the same.
        hidden[:, 0], weight[:, 0] = 1.0, inputs.bias.detach()
    return hidden, weight, inputs.target[live]


def _top_k(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The K likeliest classes of each row and their fp32 log-probs, some rows at a time."""
    count = min(TOP_K, len(weight))
    found = []
    for part in hidden.split(64):
        logprob = _logits(part, weight, torch.float32).log_softmax(-1)
        found.append(logprob.topk(count, dim=1))
    return torch.cat([x.indices for x in found]), torch.cat([x.values for x in found])


def solve(problem: Problem, is_exact: bool, has_d_weight: bool = True) -> Results:
    """The job with all logits: in fp64, or as plain torch rounds it.

    Plain torch rounds logits, their gradient and the results to the dtype of the inputs, and
    sums in fp32. It is computed with fp32 GEMMs, as bf16 ones take minutes on a CPU that has no
    instructions for them.
    """
    arithmetic = _Arithmetic(problem.hidden.dtype, is_exact)
    values, gradient = _solved(problem, arithmetic)
    if gradient is None:
        return values
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    d_hidden = hidden.new_zeros(hidden.shape, dtype=arithmetic.wide)
    # Plain torch sums over all classes in one GEMM: in fp32, sums of parts would be more exact.
    step = len(weight) if weight.dtype == arithmetic.wide else _BLOCK_CLASSES
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        d_hidden += gradient[:, part] @ weight[part].to(arithmetic.wide)
    values["d_hidden"] = arithmetic.rounded(d_hidden)
    if has_d_weight and problem.job.has_d_weight:
        values["d_weight"] = arithmetic.rounded(gradient.T @ hidden.to(arithmetic.wide))
    return values


def solve_by_rows(problem: Problem, is_exact: bool, classes: Tensor) -> Results:
    """`solve`, some tokens at a time: all but d_hidden, and d_weight of those classes alone."""
    arithmetic = _Arithmetic(problem.hidden.dtype, is_exact)
    live = problem.is_live.nonzero().squeeze(1)
    pieces: list[Results] = []
    d_weight = torch.zeros_like(problem.weight[classes], dtype=arithmetic.wide)
    for rows in live.split(_BLOCK_ROWS):
        part = problem.of_rows(rows)
        values, gradient = _solved(part, arithmetic)
        if gradient is not None:
            d_weight += gradient[:, classes].T @ part.hidden.to(arithmetic.wide)
        pieces.append(values)
    whole = {"d_weight": arithmetic.rounded(d_weight)}
    for name in pieces[0]:
        found = [values[name] for values in pieces]
        if name == "loss":
            whole[name] = torch.stack(found).sum()
        else:
            ignored = found[0].new_zeros(len(problem.target))
            whole[name] = ignored.index_put((live,), torch.cat(found))
    return whole


class _Arithmetic(NamedTuple):
    """fp64, or fp32 with the roundings of plain torch in that dtype."""

    dtype: torch.dtype
    is_exact: bool

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.is_exact else torch.float32

    def rounded(self, x: Tensor) -> Tensor:
        return x if self.is_exact else x.to(self.dtype).to(self.wide)


def _solved(problem: Problem, arithmetic: _Arithmetic) -> tuple[Results, Tensor | None]:
    """The values, and the gradient by the logits if the job has any."""
    wide, rounded = arithmetic.wide, arithmetic.rounded
    logits = rounded(_logits(problem.hidden.detach(), problem.weight.detach(), wide))
    logits.requires_grad_(problem.job.has_gradient)
    teacher = None
    if problem.job.has_teacher:
        teacher = rounded(_logits(*problem.teacher(), wide))
    values, total = _values(problem, logits, teacher)
    values = {name: value.detach() for name, value in values.items()}
    if not problem.job.has_gradient:
        return values, None
    (gradient,) = torch.autograd.grad(total, logits)
    return values, rounded(gradient)


def _values(problem: Problem, logits: Tensor, teacher: Tensor | None) -> tuple[Results, Tensor]:
    """The values of the job from all logits, and what is differentiated."""
    job = problem.job
    if job is Job.ADVANTAGE and teacher is not None:
        values = dense_reverse_kl_advantage(logits, teacher, problem.target)
        return {"advantage": values.advantage, "logprob": values.logprob}, values.logprob.sum()
    token_weight = problem.is_live.to(logits.dtype)
    if teacher is not None:
        divergence = divergence_rows(logits, teacher, job.beta, token_weight).divergence
        return {"divergence": divergence}, divergence.sum()
    if job is Job.TOPK_DIVERGENCE:
        given = problem.top_k()
        rows = topk_rows(logits, *given, job.beta, token_weight=token_weight)
        return {"divergence": rows.divergence}, rows.divergence.sum()
    logprob = rows_of(logits, problem.target, IGNORED).logprob
    return {"logprob": logprob, "loss": -logprob.sum()}, -logprob.sum()


def _logits(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    hidden = hidden.to(wide)
    return torch.cat([hidden @ part.to(wide).T for part in weight.split(_BLOCK_CLASSES)], 1)
