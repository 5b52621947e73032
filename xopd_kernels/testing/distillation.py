"""A small student with a teacher, and both divergences called alike: what their tests share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.backend import BackendChoice
from xopd_kernels.linear_divergence import linear_divergence
from xopd_kernels.linear_topk_divergence import linear_topk_divergence

# Rows, classes and dimensions under the names that the shapes of the operators have.
N, V, V_TEACHER, D, D_TEACHER, K = 13, 31, 37, 7, 5, 4


class Distillation(NamedTuple):
    """Tensors of one call of a divergence."""

    student: list[Tensor]  # hidden [N, D], weight [V, D], bias [V]; they require a gradient
    teacher: list[Tensor]  # hidden [N, D_T], weight [V_T, D_T]
    token_weight: Tensor  # [N] fp64; every fourth is 0


def make_distillation(dtype: torch.dtype = torch.float64) -> Distillation:
    """The same values each time, rounded to `dtype`."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    student = [draw(N, D), draw(V, D) / 2, draw(V)]
    teacher = [draw(N, D_TEACHER), draw(V_TEACHER, D_TEACHER) / 2]
    token_weight = torch.rand(N, generator=rng, dtype=torch.float64)
    token_weight[::4] = 0.0
    return Distillation([x.requires_grad_() for x in student], teacher, token_weight)


def make_top_k(teacher: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, log-probs) [N, K] of the teacher's likeliest classes among those of the student."""
    hidden, weight = teacher
    logprob = (hidden @ weight[:V].T).log_softmax(-1)
    ids = logprob.topk(K).indices
    return ids, logprob.gather(1, ids)


def full(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    beta: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> Tensor:
    """`linear_divergence` [N] of the tensors of a `Distillation`."""
    hidden, weight, bias = student
    return linear_divergence(
        hidden,
        weight,
        *teacher,
        beta=beta,
        bias=bias,
        softcap=softcap,
        token_weight=token_weight,
        memory_budget_bytes=memory_budget_bytes,
        backend=backend,
    ).divergence


def top_k(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    beta: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> Tensor:
    """`linear_topk_divergence` [N] from the teacher's top-k, with the arguments of the full one."""
    hidden, weight, bias = student
    return linear_topk_divergence(
        hidden,
        weight,
        *make_top_k(teacher),
        beta=beta,
        bias=bias,
        softcap=softcap,
        token_weight=token_weight,
        memory_budget_bytes=memory_budget_bytes,
        backend=backend,
    ).divergence
