"""torch.library schema of linear_policy_loss with a sparse gradient.

As `op`, with two more results: the mass without an entry in the gradient, and the bound reached.
"""

from typing import Any

import torch
from torch import Tensor

from xopd_kernels.backend import Backend
from xopd_kernels.chunk.autograd import (
    Tensors,
    empty_held_gradients,
    read_gradients,
    scaled_gradients,
)
from xopd_kernels.linear_policy_loss.op import (
    linear_policy_loss_backward_op,
    prepare,
)
from xopd_kernels.linear_policy_loss.op import run as run_exact
from xopd_kernels.records import GradientSink, HeadGradient, SparsePolicyLoss, Sparsity, Wanted

Results = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]


def run(
    tensors: Tensors, scalars: tuple[Any, ...], wanted: Wanted, sink: GradientSink
) -> tuple[SparsePolicyLoss, HeadGradient]:
    """The forward pass of the tensors and the scalars of the schema; the last ones: Sparsity."""
    *exact, mode, max_error, seed = scalars
    if not any(wanted):  # nothing to leave out
        result, gradient = run_exact(tensors, tuple(exact), wanted, sink)
        nothing = torch.zeros_like(result.logprob, dtype=torch.float32)
        return SparsePolicyLoss(*result, nothing, nothing.new_zeros(())), gradient
    given = prepare(tensors, tuple(exact), wanted, sink, is_sparse=True)
    chosen, arguments = given.backend, given[1:]
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_policy_loss.sparse_triton import forward_sparse
    elif chosen is Backend.NATIVE:
        from xopd_kernels.linear_policy_loss.sparse_native import forward_sparse
    else:
        from xopd_kernels.linear_policy_loss.sparse_reference import forward_sparse
    sparsity = Sparsity(mode, max_error, seed)
    result, gradient, dropped, error = forward_sparse(*arguments, sink, sparsity)
    return SparsePolicyLoss(*result, dropped, error), gradient


@torch.library.custom_op("xopd_kernels::linear_policy_loss_sparse", mutates_args=())
def linear_policy_loss_sparse_op(
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
    gradient: str,
    max_gradient_error: float,
    gradient_seed: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Results:
    """The fields of SparsePolicyLoss and (d_hidden, d_weight, d_bias); see linear_policy_loss_op.

    `gradient` is "sparse" or "unbiased".
    """
    head = (hidden, weight, bias, target)
    tensors = (*head, teacher_logprob, advantage, old_logprob, token_weight)
    transform = (temperature, softcap, logit_scale)
    options = (vocab_group, ignore_index, memory_budget_bytes, backend)
    sparsity = (gradient, max_gradient_error, gradient_seed)
    scalars = (clip_low, clip_high, advantage_clamp, *transform, *options, *sparsity)
    sink = GradientSink(keeps_fp32=main_grad is not None)
    result, gradients = run(tensors, scalars, Wanted(wants_hidden, wants_weight, wants_bias), sink)
    return (*result, *gradients)


@linear_policy_loss_sparse_op.register_fake
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
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty((), dtype=torch.float32),
        *empty_held_gradients(hidden, weight, Wanted(*rest[-3:]), main_grad),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[8:])
    ctx.main_grad = inputs[8]
    ctx.input_count = len(inputs)


def _backward(ctx: Any, d_loss: Tensor | None, *unread: None) -> tuple[Any, ...]:
    if d_loss is None:
        return tuple([None] * ctx.input_count)
    wanted = Wanted(*ctx.needs_input_grad[:3])
    gradients = scaled_gradients(d_loss, ctx.saved_tensors, linear_policy_loss_backward_op)
    read = read_gradients(gradients, wanted, ctx.main_grad)
    return (*read, *[None] * (ctx.input_count - 3))


linear_policy_loss_sparse_op.register_autograd(_backward, setup_context=_setup_context)
