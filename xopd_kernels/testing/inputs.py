"""Inputs of tests and benchmarks: they depend on the arguments and the kind of device alone."""

import enum
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xopd_kernels.records import Head


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

    Drawn on the device, because a head of 152,064 classes takes a CPU ten seconds: the numbers of
    one device are not those of another. `offset` is added to the bias of every class: the softmax
    is that of offset 0, its lse is not.
    """
    rng = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": rng, "device": device}
    weight = torch.randn(vocab_size, dim, **options) / math.sqrt(dim)
    hidden = torch.randn(rows, dim, **options)
    bias = torch.randn(vocab_size, **options) * 0.1
    target = torch.randint(vocab_size, (rows,), **options)
    if distribution is Distribution.PEAKED:
        rank = torch.arange(1, vocab_size + 1, device=device)
        zipf = 1.0 / rank
        target = torch.multinomial(zipf, rows, replacement=True, generator=rng)
        bias = zipf.log()
        # The logit of a target is its row's norm squared times the boost: log V + 6 beats the
        # tail with p > 0.99. The other rows get less: a broad softmax.
        own = weight[target]
        boost = (math.log(vocab_size) + 6.0) / own.square().sum(1, keepdim=True)
        boost[1::2] *= 0.3
        hidden = 0.3 * hidden + boost * own
    target[torch.rand(rows, **options) < 0.125] = -100
    tensors = (hidden, weight, bias + offset)
    leaves = (x.to(dtype).requires_grad_() for x in tensors)
    return Inputs(*leaves, target)  # type: ignore[call-arg]


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
