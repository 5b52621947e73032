"""What tests of sparse gradients share: logits of many kinds, and a head that shows d_logit.

With hidden = 1 (the identity) and weight = logits.T a head has any logits, and its d_weight is the
gradient by the logits, transposed: what was left out can be counted.
"""

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels import Backend, SparsePolicyLoss, linear_policy_loss
from xopd_kernels.testing import Distribution, Inputs, make_inputs

BACKENDS = [Backend.REFERENCE, Backend.NATIVE]
MODES = [{"gradient": "sparse"}, {"gradient": "unbiased", "gradient_seed": 5}]
SPARSE = {"gradient": "sparse", "max_gradient_error": 0.05}
SHAPE = (61, 400, 16)
BUDGET_BYTES = 40_000  # several chunks of the small cases
SLACK = 32 * torch.finfo(torch.float32).eps  # of what fp32 arithmetic does to a sum of magnitudes


class Kind(enum.Enum):
    """What the softmax of the rows is like."""

    FLAT = "flat"  # all classes nearly alike: nothing can be left out
    PEAKED = "peaked"  # one class holds nearly all, the target or another one
    ZIPF = "zipf"  # masses as 1 / rank
    TIES = "ties"  # few values, each of many classes, at the end of the list as well
    CLIFF = "cliff"  # the classes beyond the list are just below those in it
    HUGE = "huge"  # logits up to 1e4: most masses are 0
    MIXED = "mixed"  # a row of each kind in turn


class Problem(NamedTuple):
    """Logits that every dtype holds exactly or is given rounded, and the rows' factors."""

    logits: Tensor  # [N, V] fp64
    target: Tensor  # [N] int64, some -100
    advantage: Tensor  # [N] fp32, some 0, of very different sizes

    @classmethod
    def of(
        cls, kind: Kind, rows: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> "Problem":
        """The same for the same arguments; the logits are rounded to `dtype`."""
        rng = torch.Generator().manual_seed(seed)
        kinds = [x for x in Kind if x is not Kind.MIXED]
        chosen = [kinds[i % len(kinds)] if kind is Kind.MIXED else kind for i in range(rows)]
        parts = [row_of(x, classes, rng) for x in chosen]
        logits = torch.stack(parts) if parts else torch.zeros(0, classes).double()
        target = torch.randint(classes, (rows,), generator=rng)
        if rows:
            target[::2] = logits.argmax(1)[::2]
        target[torch.rand(rows, generator=rng) < 0.15] = -100
        size = 10.0 ** (-3.0 * torch.rand(rows, generator=rng))
        advantage = torch.randn(rows, generator=rng) * size
        advantage[torch.rand(rows, generator=rng) < 0.15] = 0.0
        return cls(logits.to(dtype).double(), target, advantage)

    def head(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """hidden [N, N] and weight [V, N], which requires a gradient; unrounded in main_grad."""
        hidden = torch.eye(len(self.logits), dtype=dtype)
        weight = self.logits.t().contiguous().to(dtype).requires_grad_()
        if dtype != torch.float64:
            weight.main_grad = torch.zeros(weight.shape)
        return hidden, weight

    def logprob(self) -> tuple[Tensor, Tensor]:
        """log p of the targets [N] in fp64 (0 where ignored) and the leaf, the logits."""
        leaf = self.logits.clone().requires_grad_()
        is_live = self.target != -100
        value = leaf.log_softmax(1).gather(1, self.target.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(is_live, value, 0.0), leaf

    def gradient(self) -> Tensor:
        """[N, V] fp64: the gradient by the logits of -sum advantage * logprob."""
        value, leaf = self.logprob()
        (gradient,) = torch.autograd.grad(-(value * self.advantage.double()).sum(), leaf)
        return gradient


def row_of(kind: Kind, classes: int, rng: torch.Generator) -> Tensor:
    """Logits [V] fp64 of one row."""
    noise = torch.randn(classes, generator=rng, dtype=torch.float64)
    order = torch.randperm(classes, generator=rng)
    rank = torch.empty(classes, dtype=torch.float64)
    rank[order] = torch.arange(1, classes + 1, dtype=torch.float64)
    boost = 25 * torch.rand((), generator=rng, dtype=torch.float64)
    return {
        Kind.FLAT: lambda: 0.01 * noise,
        Kind.PEAKED: lambda: noise + (rank == 1) * boost,
        Kind.ZIPF: lambda: -2 * rank.log(),
        Kind.TIES: lambda: (noise * 1.5).round(),
        Kind.CLIFF: lambda: torch.where(rank <= 64, 1e-3, 0.0) + (rank == 1) * boost,
        Kind.HUGE: lambda: 3e3 * noise,
    }[kind]()


def logit_gradient(loss: Tensor, weight: Tensor) -> Tensor:
    """[N, V] fp64: the gradient by the logits that the operator made of a `Problem.head`."""
    loss.backward()
    found = weight.grad if weight.dtype == torch.float64 else weight.main_grad
    return found.t().double()


def error_of(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(sum of magnitudes of the difference, the same of `exact`)."""
    return float((actual - exact).abs().sum()), float(exact.abs().sum())


def assert_bound(
    problem: Problem,
    actual: Tensor,
    exact: Tensor,
    reported: Tensor,
    max_error: float,
    rounding: float = 0.0,
) -> None:
    """What is missing is at most what is reported, which is at most what was allowed.

    Beside `rounding`, that of dense rows whose GEMMs take rounded entries.
    """
    slack = SLACK + rounding
    error, norm = error_of(actual, exact)
    assert reported.dtype == torch.float32
    assert reported.shape == ()
    assert 0.0 <= float(reported) <= max_error
    # fp32 knows 1 - p of a row only as well as 1.
    noise = 16 * torch.finfo(torch.float32).eps * float(problem.advantage.abs().sum())
    assert error <= (float(reported) + slack) * norm + noise


def policy(
    problem: Problem, dtype: torch.dtype, **options: object
) -> tuple[SparsePolicyLoss, Tensor]:
    """The policy loss of a problem, and its gradient by the logits."""
    hidden, weight = problem.head(dtype)
    call = {"advantage": problem.advantage, **options}
    out = linear_policy_loss(hidden, weight, problem.target, **call)
    return out, logit_gradient(out.loss, weight)


def make_case(
    dtype: torch.dtype,
    distribution: Distribution = Distribution.PEAKED,
    shape: tuple[int, int, int] = SHAPE,
) -> tuple[Inputs, Tensor]:
    """A head with one target in eight ignored, and advantages of the policy loss [N]."""
    inputs = make_inputs(*shape, dtype, distribution)
    advantage = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    return inputs, advantage
