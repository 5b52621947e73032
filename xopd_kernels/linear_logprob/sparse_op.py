"""torch.library schemas of linear_logprob with a sparse gradient: forward, backward, autograd.

The forward operator hands out the lists from which the backward pass makes the gradient; only the
rows whose list lacks too much are computed again. Of the statistics the log-prob alone has a
gradient: that of the lse and of the entropy is no multiple of the probabilities.
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
from xopd_kernels.records import (
    Entries,
    GradientSink,
    Head,
    HeadGradient,
    Sparsity,
    Transform,
    Wanted,
)
from xopd_kernels.workload import Operator, Workload

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Forward the logits of a chunk are kept until its lists are made, as for a gradient.
_LISTS = Wanted(hidden=True, weight=False, bias=False)
_NOTHING = Wanted(False, False, False)  # NATIVE makes them tile by tile: chunks as without one
_ALL = Wanted(hidden=True, weight=True, bias=True)


@torch.library.custom_op("xopd_kernels::linear_logprob_sparse", mutates_args=())
def linear_logprob_sparse_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    main_grad: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    needs_entropy: bool,
    max_gradient_error: float,
    memory_budget_bytes: int | None,
    backend: str,
) -> Results:
    """(logprob, lse [N], entropy [N] or [0], gradient_error [], *Entries).

    `main_grad` [V, D] is only kept for the backward pass.
    """
    head = Head(weight, bias, temperature, softcap, logit_scale, "")
    chosen = resolve(backend, hidden.device, hidden.dtype)
    wanted = _NOTHING if chosen is Backend.NATIVE else _LISTS
    work = _workload(hidden, head, wanted)._replace(needs_entropy=needs_entropy)
    # First, so that a budget that is too small for the backward pass is refused now.
    shard = Call.of(head, work._replace(wanted=_ALL), chosen, memory_budget_bytes).shard
    call = Call.of(head, work, chosen, memory_budget_bytes, shard)
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_logprob.sparse_triton import forward_sparse
    elif chosen is Backend.NATIVE:
        from xopd_kernels.linear_logprob.sparse_native import forward_sparse
    else:
        from xopd_kernels.linear_logprob.sparse_reference import forward_sparse
    sparsity = Sparsity("sparse", max_gradient_error, 0)
    result, entries, error = forward_sparse(call, hidden, target, ignore_index, sparsity)
    return (*result, error, *entries)


def _workload(hidden: Tensor, head: Head, wanted: Wanted) -> Workload:
    work = Workload.of(Operator.LOGPROB, hidden, head.weight, wanted)
    return work._replace(has_softcap=head.softcap is not None, is_sparse=True)


@linear_logprob_sparse_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    main_grad: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    needs_entropy: bool,
    max_gradient_error: float,
    memory_budget_bytes: int | None,
    backend: str,
) -> Results:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0]
    length = Workload.of(Operator.LOGPROB, hidden, weight, _LISTS).list_length(rows)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if needs_entropy else 0, dtype=dtype),
        hidden.new_empty((), dtype=torch.float32),
        target.new_empty(rows, length),
        hidden.new_empty(rows, length, dtype=dtype),
        target.new_empty(rows, dtype=torch.bool),
        hidden.new_empty(rows, dtype=torch.float32),
    )


@torch.library.custom_op("xopd_kernels::linear_logprob_sparse_backward", mutates_args=())
def linear_logprob_sparse_backward_op(
    d_logprob: Tensor,
    ids: Tensor,
    derivative: Tensor,
    is_dense: Tensor,
    dropped_mass: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    memory_budget_bytes: int | None,
    backend: str,
) -> Triple:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]); [0] for each that is not wanted."""
    head = Head(weight, bias, temperature, softcap, logit_scale, "")
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    entries = Entries(ids, derivative, is_dense, dropped_mass)
    tensors, options = (hidden, target, d_logprob), (memory_budget_bytes, backend)
    return _run_backward(head, tensors, entries, ignore_index, options, wanted, GradientSink())


def _run_backward(
    head: Head,
    tensors: tuple[Tensor, Tensor, Tensor],
    entries: Entries,
    ignore_index: int,
    options: tuple[int | None, str],
    wanted: Wanted,
    sink: GradientSink,
) -> HeadGradient:
    """The backward pass; `tensors`: hidden, target, upstream; `options`: budget, backend."""
    hidden, target, upstream = tensors
    budget, backend = options
    chosen = resolve(backend, hidden.device, hidden.dtype)
    work = _workload(hidden, head, wanted)
    work = work._replace(adds_to_main_grad=sink.main_grad is not None)
    call = Call.of(head, work, chosen, budget)
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_logprob.sparse_triton import backward_sparse
    elif chosen is Backend.NATIVE:
        from xopd_kernels.linear_logprob.sparse_native import backward_sparse
    else:
        from xopd_kernels.linear_logprob.sparse_reference import backward_sparse
    return backward_sparse(call, hidden, target, entries, upstream, ignore_index, sink)


@linear_logprob_sparse_backward_op.register_fake
def _(
    d_logprob: Tensor,
    ids: Tensor,
    derivative: Tensor,
    is_dense: Tensor,
    dropped_mass: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    memory_budget_bytes: int | None,
    backend: str,
) -> Triple:
    return empty_gradients(hidden, weight, Wanted(wants_hidden, wants_weight, wants_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    hidden, weight, bias, target, main_grad, *scalars = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, *output[4:])
    # Not saved: others add to it between forward and backward, which is no error.
    ctx.main_grad = main_grad
    ctx.scalars = scalars


def _backward(ctx: Any, d_logprob: Tensor | None, *unread: None) -> tuple[Any, ...]:
    if d_logprob is None:
        return (None,) * (5 + len(ctx.scalars))
    hidden, weight, bias, target, *kept = ctx.saved_tensors
    *transform, ignore_index, _, _, budget, backend = ctx.scalars
    wanted = Wanted(*ctx.needs_input_grad[:3])
    gradients: Triple
    if ctx.main_grad is not None and wanted.weight:
        refuse_graph_of_main_grad()
        head = Head(weight, bias, *Transform(*transform), "")
        tensors, options = (hidden, target, d_logprob), (budget, backend)
        sink = GradientSink(ctx.main_grad)
        entries = Entries(*kept)
        gradients = _run_backward(head, tensors, entries, ignore_index, options, wanted, sink)
        wanted = wanted._replace(weight=False)
    else:
        gradients = linear_logprob_sparse_backward_op(
            d_logprob,
            *kept,
            hidden,
            weight,
            bias,
            target,
            *transform,
            ignore_index,
            *wanted,
            budget,
            backend,
        )
    read = [grad if is_wanted else None for grad, is_wanted in zip(gradients, wanted, strict=True)]
    return (*read, *[None] * (2 + len(ctx.scalars)))


linear_logprob_sparse_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_sparse_backward_op.register_autograd(raise_double_backward)
