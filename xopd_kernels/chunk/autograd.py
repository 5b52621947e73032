"""Autograd that the operators share: gradients computed ahead, scaled when they are asked for."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xopd_kernels.records import GradientSink, HeadGradient, Wanted

Triple = tuple[Tensor, Tensor, Tensor]
Tensors = tuple[Tensor | None, ...]  # hidden, weight, bias, what an operator adds, token_weight
# (tensors, scalars of the schema, wanted, sink) -> results, of which the first has the gradients.
Run = Callable[[Tensors, tuple[Any, ...], Wanted, GradientSink], tuple[Any, HeadGradient]]
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
    return d_hidden, d_weight if main_grad is None else d_weight.to(torch.float32), d_bias


def scaled_gradients(
    d_loss: Tensor, gradients: tuple[Tensor, ...], scale: Scale
) -> tuple[Tensor, ...]:
    """`gradients` (hidden, weight, bias) times the upstream gradient of a scalar loss.

    Whoever keeps the graph (retain_graph) or traces gets copies from `scale`, an operator without
    side effects. Else the gradients are scaled in place: a copy of d_weight is gigabytes.
    """
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    if type(d_loss) is not Tensor or keeps_graph or torch.is_grad_enabled():
        d_hidden, d_weight, d_bias = gradients
        return scale(d_loss, d_hidden, d_weight, d_bias)
    # On a CPU the factor can be read; elsewhere that would stall the host.
    if d_loss.device.type != "cpu" or d_loss.item() != 1.0:
        for gradient in gradients:
            gradient.mul_(d_loss)
    return gradients


def read_gradients(
    gradients: tuple[Tensor, ...], wanted: Wanted, main_grad: Tensor | None
) -> list[Tensor | None]:
    """What a backward pass hands out: None where not wanted, or added to `main_grad`."""
    read: list[Tensor | None] = [
        grad if is_wanted else None for grad, is_wanted in zip(gradients, wanted, strict=True)
    ]
    if main_grad is not None and wanted.weight:
        refuse_graph_of_main_grad()
        main_grad.add_(gradients[1])
        read[1] = None
    return read


def compute_ahead(
    run: Run, tensors: Tensors, scalars: tuple[Any, ...], wanted: Wanted, main_grad: Tensor
) -> Any:
    """The results of `run`, which adds d_weight to `main_grad` in the forward pass.

    No torch.library operator: one that writes to an argument cannot have an autograd formula.
    """

    def forward() -> tuple[tuple[Tensor, ...], HeadGradient]:
        return run(tensors, scalars, wanted, GradientSink(main_grad))

    return _untraced()(*tensors[:3], tensors[-1], forward)


@functools.cache
def _untraced() -> Callable[..., Any]:
    """_AddedAhead without torch.compile, which refuses main_grad, but then traces what it calls.

    Made on first use, because torch.compiler.disable imports the compiler.
    """
    untraced: Callable[..., Any] = torch.compiler.disable(_AddedAhead.apply)
    return untraced


class _AddedAhead(torch.autograd.Function):
    """Checks in the backward pass what its caller has promised: one pass, upstream gradients 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weight: Tensor | None,
        run: Callable[[], tuple[tuple[Tensor, ...], HeadGradient]],
    ) -> tuple[Tensor, ...]:
        result, gradient = run()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*result[1:])
        ctx.save_for_backward(token_weight, *gradient)
        ctx.is_spent = False
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *unread: None) -> tuple[Tensor | None, ...]:
        refuse_graph_of_main_grad()
        if upstream is None:
            return (None,) * 5
        if ctx.is_spent:
            raise RuntimeError(
                "main_grad_ahead=True takes one backward pass, this is the second: d_weight was "
                "added to main_grad once, in the forward pass"
            )
        token_weight, *gradient = ctx.saved_tensors
        if token_weight is not None and upstream.ndim > 0:
            upstream = torch.where(token_weight != 0, upstream, 1.0)
        _check_is_one(upstream)
        ctx.is_spent = True
        wanted = Wanted(*ctx.needs_input_grad[:3])._replace(weight=False)
        return (*read_gradients(tuple(gradient), wanted, None), None, None)


def _check_is_one(upstream: Tensor) -> None:
    """Raise unless all upstream gradients are 1; on a device an assertion that does not wait."""
    message = (
        "main_grad_ahead=True takes upstream gradients of 1, as d_weight was added to main_grad "
        "before they were known: put factors into token_weight, and sum; what this call added is "
        "still in main_grad"
    )
    is_one = (upstream == 1).all()
    if not is_one.is_cpu:
        torch._assert_async(is_one, message)
    elif not is_one:
        raise RuntimeError(message)


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
