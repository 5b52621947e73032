"""torch.library schemas of linear_logprob: forward, backward, their fakes and autograd.

The schemas list every scalar, because a schema holds no records. No backend is imported here
until an operator runs; the choice of the backend also happens then, outside any traced graph.
"""

from typing import Any

import torch
from torch import Tensor

from xopd_kernels.backend import Backend, resolve
from xopd_kernels.linear_logprob import reference
from xopd_kernels.records import Head, LinearLogprob, Wanted

Triple = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("xopd_kernels::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_group: str,
    ignore_index: int,
    needs_entropy: bool,
    backend: str,
) -> Triple:
    """(logprob [N], lse [N], entropy [N] or [0]) of hidden [N, D] and target [N]."""
    head = Head(weight, bias, temperature, softcap, logit_scale, vocab_group)
    chosen = resolve(backend, hidden.device, hidden.dtype, vocab_group)
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_logprob.triton import forward

        return forward(hidden, head, target, ignore_index, needs_entropy)
    return reference.forward(hidden, head, target, ignore_index, needs_entropy)


@linear_logprob_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_group: str,
    ignore_index: int,
    needs_entropy: bool,
    backend: str,
) -> Triple:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if needs_entropy else 0, dtype=dtype),
    )


@torch.library.custom_op("xopd_kernels::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    d_logprob: Tensor,
    d_lse: Tensor,
    d_entropy: Tensor,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_group: str,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str,
) -> Triple:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]); [0] for each that is not wanted."""
    head = Head(weight, bias, temperature, softcap, logit_scale, vocab_group)
    upstream = LinearLogprob(d_logprob, d_lse, d_entropy)
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    chosen = resolve(backend, hidden.device, hidden.dtype, vocab_group)
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_logprob.triton import backward

        return backward(upstream, entropy, hidden, head, target, ignore_index, wanted)
    return reference.backward(upstream, entropy, hidden, head, target, ignore_index, wanted)


@linear_logprob_backward_op.register_fake
def _(
    d_logprob: Tensor,
    d_lse: Tensor,
    d_entropy: Tensor,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_group: str,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str,
) -> Triple:
    return empty_gradients(hidden, weight, Wanted(wants_hidden, wants_weight, wants_bias))


def empty_gradients(hidden: Tensor, weight: Tensor, wanted: Wanted) -> Triple:
    """Uninitialised contiguous gradients; [0] for each that is not wanted. For fakes."""
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        weight.new_empty(weight.shape if wanted.weight else (0,)),
        weight.new_empty(weight.shape[:1] if wanted.bias else (0,)),
    )


def raise_double_backward(ctx: Any, *grads: Tensor) -> None:
    """The autograd formula of the backward operators: there is none."""
    raise RuntimeError(
        "xopd_kernels does not differentiate twice (create_graph=True); "
        "use plain torch operations where second derivatives are needed"
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    hidden, weight, bias, target, *scalars = inputs
    ctx.save_for_backward(hidden, weight, bias, target, output[2])
    ctx.scalars = scalars


def _backward(ctx: Any, d_logprob: Tensor, d_lse: Tensor, d_entropy: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, target, entropy = ctx.saved_tensors
    *transform, vocab_group, ignore_index, _, backend = ctx.scalars
    wanted = Wanted(*ctx.needs_input_grad[:3])
    gradients = linear_logprob_backward_op(
        d_logprob,
        d_lse,
        d_entropy,
        entropy,
        hidden,
        weight,
        bias,
        target,
        *transform,
        vocab_group,
        ignore_index,
        *wanted,
        backend,
    )
    read = [grad if is_wanted else None for grad, is_wanted in zip(gradients, wanted, strict=True)]
    return (*read, *[None] * 8)


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_backward_op.register_autograd(raise_double_backward)
