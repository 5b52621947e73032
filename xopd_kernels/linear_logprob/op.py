"""torch.library schemas of linear_logprob: forward, backward, their fakes and autograd.

The schemas list every scalar, because a schema holds no records. No backend is imported here
until an operator runs; the choice of the backend also happens then, outside any traced graph.
"""

from typing import Any

import torch
from torch import Tensor

from xopd_kernels.backend import Backend, resolve
from xopd_kernels.chunk.autograd import (
    Triple,
    empty_gradients,
    raise_double_backward,
    refuse_graph_of_main_grad,
)
from xopd_kernels.chunk.call import Call
from xopd_kernels.records import Head, HeadGradient, LinearLogprob, Transform, Wanted
from xopd_kernels.workload import Operator, Workload

_ALL = Wanted(hidden=True, weight=True, bias=True)


@torch.library.custom_op("xopd_kernels::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    main_grad: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_group: str,
    ignore_index: int,
    needs_entropy: bool,
    needs_gradient: bool,
    memory_budget_bytes: int | None,
    backend: str,
) -> Triple:
    """(logprob [N], lse [N], entropy [N] or [0]) of hidden [N, D] and target [N].

    `main_grad` [V, D] is only kept for the backward pass; `needs_gradient` says that there will be
    one, so that a budget that is too small for it is refused now.
    """
    head = Head(weight, bias, temperature, softcap, logit_scale, vocab_group)
    chosen = resolve(backend, hidden.device, hidden.dtype)
    work = _workload(hidden, head, Wanted(False, False, False), needs_entropy)
    shard = None
    if needs_gradient:  # first, as it needs more
        shard = Call.of(head, work._replace(wanted=_ALL), chosen, memory_budget_bytes).shard
    call = Call.of(head, work, chosen, memory_budget_bytes, shard)
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_logprob.triton import forward
    elif chosen is Backend.NATIVE:
        from xopd_kernels.linear_logprob.native import forward
    else:
        from xopd_kernels.linear_logprob.reference import forward
    return forward(call, hidden, target, ignore_index)


def _workload(hidden: Tensor, head: Head, wanted: Wanted, needs_entropy: bool) -> Workload:
    work = Workload.of(Operator.LOGPROB, hidden, head.weight, wanted)
    return work._replace(has_softcap=head.softcap is not None, needs_entropy=needs_entropy)


@linear_logprob_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    main_grad: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_group: str,
    ignore_index: int,
    needs_entropy: bool,
    needs_gradient: bool,
    memory_budget_bytes: int | None,
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
    memory_budget_bytes: int | None,
    backend: str,
) -> Triple:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]); [0] for each that is not wanted."""
    head = Head(weight, bias, temperature, softcap, logit_scale, vocab_group)
    upstream = LinearLogprob(d_logprob, d_lse, d_entropy)
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    options = (ignore_index, memory_budget_bytes, backend)
    return _run_backward(upstream, entropy, hidden, head, target, options, wanted, None)


def _run_backward(
    upstream: LinearLogprob,
    entropy: Tensor,
    hidden: Tensor,
    head: Head,
    target: Tensor,
    options: tuple[int, int | None, str],
    wanted: Wanted,
    main_grad: Tensor | None,
) -> HeadGradient:
    """The backward pass on the backend of `options` = (ignore_index, budget, backend)."""
    ignore_index, budget, backend = options
    chosen = resolve(backend, hidden.device, hidden.dtype)
    work = _workload(hidden, head, wanted, upstream.entropy.numel() > 0)
    work = work._replace(adds_to_main_grad=main_grad is not None)
    call = Call.of(head, work, chosen, budget)
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_logprob.triton import backward
    elif chosen is Backend.NATIVE:
        from xopd_kernels.linear_logprob.native import backward
    else:
        from xopd_kernels.linear_logprob.reference import backward
    return backward(call, upstream, entropy, hidden, target, ignore_index, main_grad)


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
    memory_budget_bytes: int | None,
    backend: str,
) -> Triple:
    return empty_gradients(hidden, weight, Wanted(wants_hidden, wants_weight, wants_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    hidden, weight, bias, target, main_grad, *scalars = inputs
    ctx.save_for_backward(hidden, weight, bias, target, output[2])
    # Not saved: others add to it between forward and backward, which is no error.
    ctx.main_grad = main_grad
    ctx.scalars = scalars


def _backward(ctx: Any, d_logprob: Tensor, d_lse: Tensor, d_entropy: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, target, entropy = ctx.saved_tensors
    *transform, vocab_group, ignore_index, _, _, budget, backend = ctx.scalars
    wanted = Wanted(*ctx.needs_input_grad[:3])
    gradients: Triple
    if ctx.main_grad is not None and wanted.weight:
        refuse_graph_of_main_grad()
        head = Head(weight, bias, *Transform(*transform), vocab_group)
        upstream = LinearLogprob(d_logprob, d_lse, d_entropy)
        options = (ignore_index, budget, backend)
        gradients = _run_backward(
            upstream, entropy, hidden, head, target, options, wanted, ctx.main_grad
        )
        wanted = wanted._replace(weight=False)
    else:
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
            budget,
            backend,
        )
    read = [grad if is_wanted else None for grad, is_wanted in zip(gradients, wanted, strict=True)]
    return (*read, *[None] * (2 + len(ctx.scalars)))


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_backward_op.register_autograd(raise_double_backward)
