"""What tests and benchmarks share: inputs, the operators in dense plain torch, the error budget.

The dense versions hold all logits and know nothing of the kernels. With fp64 inputs they are the
oracle; with the inputs of a test they are the baseline that the error budget compares with.
"""

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xopd_kernels.records import Head, LinearLogprob, PolicyLoss, PolicyTerms

BUDGET_FACTOR = 1.05  # error against fp64 <= this * the error of plain torch + rounding band


class Distribution(enum.Enum):
    """How concentrated the softmax is; kernels and their errors behave differently on each."""

    RANDOM = "random"  # normal logits: what an untrained model gives
    PEAKED = "peaked"  # half of the targets near p = 0.99 and above, Zipf tail: a trained model


class Inputs(NamedTuple):
    """Leaf tensors of one call; hidden, weight and bias require a gradient."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    target: Tensor  # [N] int64

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Leaves with the same values in another dtype."""
        tensors = (self.hidden, self.weight, self.bias)
        leaves = (x.detach().to(dtype, copy=True).requires_grad_() for x in tensors)
        return Inputs(*leaves, self.target)  # type: ignore[call-arg]


class Terms(NamedTuple):
    """Per-token inputs of the policy loss [N] fp32."""

    teacher_logprob: Tensor
    old_logprob: Tensor
    token_weight: Tensor  # about one in eight is 0


def make_inputs(
    rows: int,
    vocab_size: int,
    dim: int,
    dtype: torch.dtype,
    distribution: Distribution = Distribution.RANDOM,
    device: str = "cpu",
    seed: int = 0,
    offset: float = 0.0,
) -> Inputs:
    """Inputs that depend on the arguments alone; one target in eight is ignored (-100).

    `offset` is added to the bias of every class: the softmax is that of offset 0, its lse is not.
    """
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, dim, generator=rng) / math.sqrt(dim)
    hidden = torch.randn(rows, dim, generator=rng)
    bias = torch.randn(vocab_size, generator=rng) * 0.1
    target = torch.randint(vocab_size, (rows,), generator=rng)
    if distribution is Distribution.PEAKED:
        rank = torch.arange(1, vocab_size + 1)
        zipf = 1.0 / rank
        target = torch.multinomial(zipf, rows, replacement=True, generator=rng)
        bias = zipf.log()
        # The logit of a target is its row's norm squared times the boost: log V + 6 beats the
        # tail with p > 0.99. The other rows get less: a broad softmax.
        own = weight[target]
        boost = (math.log(vocab_size) + 6.0) / own.square().sum(1, keepdim=True)
        boost[1::2] *= 0.3
        hidden = 0.3 * hidden + boost * own
    target[torch.rand(rows, generator=rng) < 0.125] = -100
    tensors = (hidden, weight, bias + offset)
    leaves = (x.to(device=device, dtype=dtype).requires_grad_() for x in tensors)
    return Inputs(*leaves, target.to(device))  # type: ignore[call-arg]


def make_terms(logprob: Tensor, seed: int = 0) -> Terms:
    """Teacher, behaviour policy and weights around `logprob` [N]; some ratios are clipped."""
    rng = torch.Generator().manual_seed(seed)
    shape, device = logprob.shape, logprob.device
    value = logprob.detach().float()
    teacher = value + torch.randn(shape, generator=rng).to(device)
    old = value + 0.3 * torch.randn(shape, generator=rng).to(device)
    weight = torch.rand(shape, generator=rng)
    weight[torch.rand(shape, generator=rng) < 0.125] = 0.0
    return Terms(teacher, old, weight.to(device))


def make_head(
    inputs: Inputs,
    has_bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Head:
    """The head of `inputs` with the scalars of a call."""
    bias = inputs.bias if has_bias else None
    return Head(inputs.weight, bias, temperature, softcap, logit_scale, "")


def dense_logprob(
    hidden: Tensor, head: Head, target: Tensor, ignore_index: int = -100
) -> LinearLogprob:
    """`linear_logprob` in plain torch: logits in the dtype of hidden, softmax in fp32 or fp64."""
    logits = functional.linear(hidden, head.weight, head.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_p = (logits / head.temperature).log_softmax(-1)
    lse = (logits / head.temperature).logsumexp(-1)
    is_live = target != ignore_index
    column = target.where(is_live, 0)[..., None]
    logprob = log_p.gather(-1, column).squeeze(-1)
    finite = log_p.where(log_p != -torch.inf, 0.0)
    entropy = -(log_p.exp() * finite).sum(-1)
    return LinearLogprob(*(torch.where(is_live, x, 0.0) for x in (logprob, lse, entropy)))


def dense_policy_loss(
    hidden: Tensor, head: Head, target: Tensor, terms: PolicyTerms, ignore_index: int = -100
) -> PolicyLoss:
    """`linear_policy_loss` in plain torch, written from the formula in its docstring."""
    row = dense_logprob(hidden, head, target, ignore_index)
    is_live = target != ignore_index
    if terms.token_weight is not None:
        is_live = is_live & (terms.token_weight != 0)
    logprob = row.logprob
    if terms.teacher_logprob is None:
        if terms.advantage is None:
            raise ValueError("terms must hold teacher_logprob or advantage, got neither")
        advantage = terms.advantage.to(logprob)
    else:
        bound = terms.advantage_clamp
        advantage = (terms.teacher_logprob - logprob.detach()).clamp(-bound, bound)
    old = logprob.detach() if terms.old_logprob is None else terms.old_logprob
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high) * advantage
    surrogate = torch.minimum(ratio * advantage, clipped)
    weight = 1.0 if terms.token_weight is None else terms.token_weight
    loss = -(weight * torch.where(is_live, surrogate, 0.0)).sum()
    is_clipped = is_live & (clipped < ratio * advantage)
    fields = (logprob, row.lse, advantage, ratio)
    rows = (torch.where(is_live, x.detach(), 0.0) for x in fields)
    return PolicyLoss(loss, *rows, is_clipped)  # type: ignore[call-arg]


def assert_within_budget(name: str, actual: Tensor, baseline: Tensor, oracle: Tensor) -> None:
    """AssertionError unless the error of `actual` is within the budget.

    ``|actual - oracle| <= 1.05 * |baseline - oracle| + band`` in the 2-norm; the band is one
    rounding of every element of the result to the dtype of `actual`.
    """
    truth = oracle.detach().double()
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, oracle {list(truth.shape)}")
    error = (actual.detach().double() - truth).norm().item()
    allowed = BUDGET_FACTOR * (baseline.detach().double() - truth).norm().item()
    allowed += torch.finfo(actual.dtype).eps * truth.norm().item()
    if not error <= allowed:  # a NaN error fails, too
        raise AssertionError(f"{name}: error {error:.3e} against fp64, budget {allowed:.3e}")
