"""Autograd that the operators share: gradients computed ahead, scaled when they are asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xopd_kernels.records import Wanted

Triple = tuple[Tensor, Tensor, Tensor]
Scale = Callable[[Tensor, Tensor, Tensor, Tensor], Triple]  # of (d_loss, hidden, weight, bias)


def empty_gradients(hidden: Tensor, weight: Tensor, wanted: Wanted) -> Triple:
    """Uninitialised contiguous gradients; [0] for each that is not wanted. For fakes."""
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        weight.new_empty(weight.shape if wanted.weight else (0,)),
        weight.new_empty(weight.shape[:1] if wanted.bias else (0,)),
    )


def empty_held_gradients(
    hidden: Tensor, weight: Tensor, wanted: Wanted, main_grad: Tensor | None
) -> Triple:
    """As `empty_gradients`, of those that wait for their upstream gradient: see Call.held_dtype.

    Autograd rounds what the backward pass hands out to the dtype of its tensor.
    """
    held = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    d_hidden, d_weight, d_bias = (x.to(held) for x in empty_gradients(hidden, weight, wanted))
    if main_grad is not None and wanted.weight:
        d_weight = d_weight.to(torch.float32)
    return d_hidden, d_weight, d_bias


def scaled_gradients(
    d_loss: Tensor,
    gradients: tuple[Tensor, ...],
    wanted: Wanted,
    main_grad: Tensor | None,
    scale: Scale,
) -> list[Tensor | None]:
    """`gradients` (hidden, weight, bias) times the upstream gradient of a scalar loss.

    Whoever keeps the graph (retain_graph) or traces gets copies from `scale`, an operator without
    side effects. Else the gradients are scaled in place: a copy of d_weight is gigabytes.
    """
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    if type(d_loss) is not Tensor or keeps_graph or torch.is_grad_enabled():
        d_hidden, d_weight, d_bias = gradients
        scaled: tuple[Tensor, ...] = scale(d_loss, d_hidden, d_weight, d_bias)
    else:
        scaled = gradients
        # On a CPU the factor can be read; elsewhere that would stall the host.
        if d_loss.device.type != "cpu" or d_loss.item() != 1.0:
            for gradient in gradients:
                gradient.mul_(d_loss)
    read: list[Tensor | None] = [
        grad if is_wanted else None for grad, is_wanted in zip(scaled, wanted, strict=True)
    ]
    if main_grad is not None and wanted.weight:
        refuse_graph_of_main_grad()
        main_grad.add_(scaled[1])
        read[1] = None
    return read


def refuse_graph_of_main_grad() -> None:
    """Raise if the backward pass is recorded: main_grad takes first derivatives only."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a weight with main_grad does not take create_graph=True: its gradient is added to "
            "main_grad and has no graph; remove the attribute for higher derivatives"
        )


def raise_double_backward(ctx: Any, *grads: Tensor) -> None:
    """The autograd formula of the backward operators: there is none."""
    raise RuntimeError(
        "xopd_kernels does not differentiate twice (create_graph=True); "
        "use plain torch operations where second derivatives are needed"
    )
