"""torch.library schemas of linear_policy_loss: forward with gradients, their scaling, autograd.

The forward operator computes the gradients that will be read and hands them out as outputs; the
backward pass multiplies them by the upstream gradient. Backends load when an operator runs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xopd_kernels.backend import Backend, resolve
from xopd_kernels.chunk.autograd import (
    Tensors,
    Triple,
    empty_held_gradients,
    raise_double_backward,
    read_gradients,
    scaled_gradients,
)
from xopd_kernels.chunk.call import Call
from xopd_kernels.records import GradientSink, Head, HeadGradient, PolicyLoss, PolicyTerms, Wanted
from xopd_kernels.workload import Operator, Workload

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Prepared(NamedTuple):
    """What the tensors and scalars of the schema mean to a backend."""

    backend: Backend
    call: Call
    hidden: Tensor
    target: Tensor
    terms: PolicyTerms
    ignore_index: int


def prepare(
    tensors: Tensors,
    scalars: tuple[Any, ...],
    wanted: Wanted,
    sink: GradientSink,
    is_sparse: bool = False,
) -> Prepared:
    """The backend that is chosen, and the arguments of its functions."""
    hidden, weight, bias, target, teacher_logprob, advantage, old_logprob, token_weight = tensors
    if hidden is None or weight is None or target is None:
        raise TypeError("hidden, weight and target must be tensors")
    low, high, clamp, temperature, softcap, scale, group, ignore_index, budget, backend = scalars
    head = Head(weight, bias, temperature, softcap, scale, group)
    per_token = (teacher_logprob, advantage, old_logprob, token_weight)
    terms = PolicyTerms(*per_token, low, high, clamp)
    work = Workload.of(Operator.POLICY_LOSS, hidden, weight, wanted)._replace(
        has_softcap=softcap is not None,
        adds_to_main_grad=sink.main_grad is not None,
        is_sparse=is_sparse,
    )
    chosen = resolve(backend, hidden.device, hidden.dtype)
    call = Call.of(head, work, chosen, budget)
    return Prepared(chosen, call, hidden, target, terms, ignore_index)


def run(
    tensors: Tensors, scalars: tuple[Any, ...], wanted: Wanted, sink: GradientSink
) -> tuple[PolicyLoss, HeadGradient]:
    """The forward pass of the tensors and the scalars of the schema."""
    given = prepare(tensors, scalars, wanted, sink)
    if given.backend is Backend.TRITON:
        from xopd_kernels.linear_policy_loss.triton import forward
    elif given.backend is Backend.NATIVE:
        from xopd_kernels.linear_policy_loss.native import forward
    else:
        from xopd_kernels.linear_policy_loss.reference import forward
    return forward(*given[1:], sink)


@torch.library.custom_op("xopd_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    teacher_logprob: Tensor | None,
    advantage: Tensor | None,
    old_logprob: Tensor | None,
    token_weight: Tensor | None,
    main_grad: Tensor | None,
    clip_low: float,
    clip_high: float,
    advantage_clamp: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_group: str,
    ignore_index: int,
    memory_budget_bytes: int | None,
    backend: str,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Results:
    """(loss, logprob, lse, advantage, ratio, is_clipped, d_hidden, d_weight, d_bias).

    With `main_grad` d_weight is handed out in fp32, unrounded; the backward pass adds it there.
    """
    head = (hidden, weight, bias, target)
    tensors = (*head, teacher_logprob, advantage, old_logprob, token_weight)
    transform = (temperature, softcap, logit_scale)
    options = (vocab_group, ignore_index, memory_budget_bytes, backend)
    scalars = (clip_low, clip_high, advantage_clamp, *transform, *options)
    sink = GradientSink(keeps_fp32=main_grad is not None)
    result, gradient = run(tensors, scalars, Wanted(wants_hidden, wants_weight, wants_bias), sink)
    return (*result, *gradient)


@linear_policy_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    teacher_logprob: Tensor | None,
    advantage: Tensor | None,
    old_logprob: Tensor | None,
    token_weight: Tensor | None,
    main_grad: Tensor | None,
    *rest: Any,
) -> Results:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0]
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=torch.bool),
        *empty_held_gradients(hidden, weight, Wanted(*rest[-3:]), main_grad),
    )


@torch.library.custom_op("xopd_kernels::linear_policy_loss_backward", mutates_args=())
def linear_policy_loss_backward_op(
    d_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor
) -> Triple:
    """The gradients of the forward pass times the upstream gradient of the loss (a scalar)."""
    return d_hidden * d_loss, d_weight * d_loss, d_bias * d_loss


@linear_policy_loss_backward_op.register_fake
def _(d_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor) -> Triple:
    return torch.empty_like(d_hidden), torch.empty_like(d_weight), torch.empty_like(d_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    # Else autograd fills zeros for the outputs nobody reads: d_weight is one of them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[6:])
    # Not saved: others add to it between forward and backward, which is no error.
    ctx.main_grad = inputs[8]
    ctx.input_count = len(inputs)


def _backward(ctx: Any, d_loss: Tensor | None, *unread: None) -> tuple[Any, ...]:
    if d_loss is None:
        return tuple([None] * ctx.input_count)
    wanted = Wanted(*ctx.needs_input_grad[:3])
    gradients = scaled_gradients(d_loss, ctx.saved_tensors, linear_policy_loss_backward_op)
    read = read_gradients(gradients, wanted, ctx.main_grad)
    return (*read, *[None] * (ctx.input_count - 3))


linear_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
linear_policy_loss_backward_op.register_autograd(raise_double_backward)
