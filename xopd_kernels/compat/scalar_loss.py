"""What the adapters share: cross-entropy at the cost of 3 GEMMs, and how to refuse an argument."""

from typing import NoReturn

import torch
from torch import Tensor

from xopd_kernels import linear_logprob, linear_policy_loss

_LOGPROB_REMEDY = "compute it from linear_logprob, whose log-probs have gradients"


def refuse(name: str, value: object, remedy: str = _LOGPROB_REMEDY) -> NoReturn:
    """Raise NotImplementedError for an argument of the peer that has no counterpart here."""
    shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise NotImplementedError(f"{name} = {shown} is not supported; {remedy}")


def result_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of per-token results: fp32, and fp64 for fp64 inputs."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    reduction: str,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """``-logprob`` per token, its sum, or its mean over the tokens that are not ignored.

    Args:
        hidden: [..., D]; weight [V, D]; target [...] int64; bias [V]: as in `linear_logprob`.
        reduction: "none", "sum" or "mean". The mean over zero tokens is 0.
        softcap, ignore_index: as in `linear_logprob`.

    Returns:
        [...] for "none", else []; fp32 (fp64 for fp64 inputs).

    Cost: 3U for "sum" and "mean" (U = 2 N V D), 4U for "none".

    Raises:
        ValueError: reduction is none of the three; else as `linear_logprob`.
    """
    if reduction == "none":
        out = linear_logprob(
            hidden, weight, target, bias=bias, softcap=softcap, ignore_index=ignore_index
        )
        return -out.logprob
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
    token_weight = (target != ignore_index).to(result_dtype(hidden))
    if reduction == "mean":
        token_weight = token_weight / token_weight.sum().clamp(min=1)
    return weighted_cross_entropy(
        hidden, weight, target, token_weight, bias=bias, softcap=softcap, ignore_index=ignore_index
    )


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """``-sum_i token_weight_i * logprob_i`` [] at 3U; `token_weight` [...] is a constant.

    An on-policy loss of advantage 1 has this gradient, but the value ``-sum_i token_weight_i``.
    """
    out = linear_policy_loss(
        hidden,
        weight,
        target,
        advantage=torch.ones_like(token_weight),
        token_weight=token_weight,
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    value = -(token_weight * out.logprob).sum()
    return value + (out.loss - out.loss.detach())  # the bracket is 0 and carries the gradient
