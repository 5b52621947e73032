"""`torch.nn.functional.linear_cross_entropy` (torch >= 2.13) without the logits.

from xopd_kernels.compat.torch_nn import linear_cross_entropy
"""

from typing import Protocol

import torch
from torch import Tensor

from xopd_kernels.compat.scalar_loss import cross_entropy, refuse


class AccumulationOptions(Protocol):
    """The field of torch.nn.LinearCrossEntropyOptions that asks for a precision."""

    @property
    def acc_dtype(self) -> torch.dtype | None: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: AccumulationOptions | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, as in torch.

    Args:
        input: [N, D] or [D] bf16, fp16, fp32, fp64.
        linear_weight: [V, D], dtype of input.
        target: [N] or [] int64 classes.
        linear_bias: [V], dtype of linear_weight.
        weight: class weights; must be None.
        reduction: "none", "mean" (NaN over zero tokens, as in torch) or "sum".
        ignore_index: targets that do not count; None is -100.
        label_smoothing: must be 0.
        options: torch.nn.LinearCrossEntropyOptions. The chunk sizes in it have no effect: nothing
            here holds all logits. The graph may always be retained.

    Returns:
        [N] or [] for "none", else []; dtype of input, and fp32 under autocast. 3U for "mean" and
        "sum", 4U for "none" (U = 2 N V D).

    Raises:
        NotImplementedError: class weights, label smoothing, class probabilities as target, a
            K-dimensional linear_weight, or fp64 accumulation of narrower inputs.
        TypeError, ValueError: as `linear_logprob`.
    """
    _check_supported(input, linear_weight, target, weight, label_smoothing, options)
    if input.ndim not in (1, 2):
        raise ValueError(f"input must be [N, D] or [D], got {list(input.shape)}; flatten it")
    hidden, classes = (input, target) if input.ndim == 2 else (input[None], target[None])
    ignored = -100 if ignore_index is None else ignore_index
    loss = cross_entropy(
        hidden,
        linear_weight,
        classes,
        reduction=reduction,
        bias=linear_bias,
        ignore_index=ignored,
    )
    if reduction == "none":
        loss = loss.view(target.shape)
    elif reduction == "mean":
        loss = loss.masked_fill((target == ignored).all(), torch.nan)
    is_autocast = torch.is_autocast_enabled(input.device.type)
    return loss if is_autocast else loss.to(input.dtype)


def _check_supported(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    options: AccumulationOptions | None,
) -> None:
    """Raise NotImplementedError for what torch computes and this package does not."""
    if weight is not None:
        refuse("weight", weight)
    if label_smoothing != 0.0:
        refuse("label_smoothing", label_smoothing, "set it to 0 or use torch's function")
    if target.is_floating_point():
        refuse("target", target.dtype, "class probabilities need torch's function")
    if linear_weight.ndim > 2:
        refuse("linear_weight", linear_weight, "flatten a K-dimensional loss to [N, D] rows")
    acc_dtype = None if options is None else options.acc_dtype
    if acc_dtype == torch.float64 and input.dtype != torch.float64:
        refuse("options.acc_dtype", acc_dtype, "sums are fp32; use .double() inputs")
