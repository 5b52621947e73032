"""torch.library schemas of linear_topk_divergence: forward with gradients, their scaling, autograd.

The forward operator computes the gradients of the sum over the tokens; the backward pass scales
them, or computes them again where the upstream gradient differs from token to token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xopd_kernels.backend import Backend, resolve
from xopd_kernels.chunk.autograd import Tensors, Triple
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.rows import Results, RowOperator
from xopd_kernels.records import GradientSink, Head, HeadGradient, LinearDivergence, TopK, Wanted
from xopd_kernels.workload import Operator, Workload


class Prepared(NamedTuple):
    """What the tensors and scalars of the schema mean to a backend."""

    backend: Backend
    call: Call
    hidden: Tensor
    teacher: TopK
    token_weight: Tensor | None
    beta: float


def prepare(
    tensors: Tensors,
    scalars: tuple[Any, ...],
    wanted: Wanted,
    sink: GradientSink,
    is_sparse: bool = False,
) -> Prepared:
    """The backend that is chosen, and the arguments of its functions."""
    hidden, weight, bias, teacher_ids, teacher_logprob, token_weight = tensors
    if hidden is None or weight is None or teacher_ids is None or teacher_logprob is None:
        raise TypeError("hidden, weight, teacher_ids and teacher_logprob must be tensors")
    beta, has_tail, temperature, softcap, scale, budget, backend = scalars
    head = Head(weight, bias, temperature, softcap, scale, "")
    teacher = TopK(teacher_ids, teacher_logprob, has_tail)
    work = Workload.of(Operator.TOPK_DIVERGENCE, hidden, weight, wanted)._replace(
        top_k=teacher_ids.shape[1],
        has_softcap=softcap is not None,
        adds_to_main_grad=sink.main_grad is not None,
        is_sparse=is_sparse,
    )
    chosen = resolve(backend, hidden.device, hidden.dtype)
    call = Call.of(head, work, chosen, budget)
    return Prepared(chosen, call, hidden, teacher, token_weight, beta)


def run(
    tensors: Tensors, scalars: tuple[Any, ...], wanted: Wanted, sink: GradientSink
) -> tuple[LinearDivergence, HeadGradient]:
    """The forward pass of the tensors and the scalars of the schema."""
    given = prepare(tensors, scalars, wanted, sink)
    if given.backend is Backend.TRITON:
        from xopd_kernels.linear_topk_divergence.triton import forward
    elif given.backend is Backend.NATIVE:
        from xopd_kernels.linear_topk_divergence.native import forward
    else:
        from xopd_kernels.linear_topk_divergence.reference import forward
    return forward(*given[1:], sink)


_ROWS = RowOperator(run, tensors=6)


@torch.library.custom_op("xopd_kernels::linear_topk_divergence", mutates_args=())
def linear_topk_divergence_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    token_weight: Tensor | None,
    main_grad: Tensor | None,
    beta: float,
    has_tail: bool,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    memory_budget_bytes: int | None,
    backend: str,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Results:
    """(divergence, lse, teacher_lse, d_hidden, d_weight, d_bias).

    With `main_grad` d_weight is handed out in fp32, unrounded; the backward pass adds it there.
    """
    tensors = (hidden, weight, bias, teacher_ids, teacher_logprob, token_weight)
    scalars = (
        beta,
        has_tail,
        temperature,
        softcap,
        logit_scale,
        memory_budget_bytes,
        backend,
    )
    wanted = (wants_hidden, wants_weight, wants_bias)
    return _ROWS.forward(tensors, main_grad, scalars, wanted)


@linear_topk_divergence_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    token_weight: Tensor | None,
    main_grad: Tensor | None,
    *rest: Any,
) -> Results:
    return _ROWS.fake(hidden, weight, main_grad, rest[-3:])


@torch.library.custom_op("xopd_kernels::linear_topk_divergence_backward", mutates_args=())
def linear_topk_divergence_backward_op(
    d_divergence: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    token_weight: Tensor | None,
    beta: float,
    has_tail: bool,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    memory_budget_bytes: int | None,
    backend: str,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Triple:
    """The gradients (d_hidden, d_weight, d_bias) of the sum, for the upstream gradient [N]."""
    tensors = (hidden, weight, bias, teacher_ids, teacher_logprob, token_weight)
    scalars = (
        beta,
        has_tail,
        temperature,
        softcap,
        logit_scale,
        memory_budget_bytes,
        backend,
    )
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    ahead = _ROWS.ahead((d_hidden, d_weight, d_bias), tensors, scalars, wanted)
    return ahead.scaled(d_divergence)


@linear_topk_divergence_backward_op.register_fake
def _(d_divergence: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, *rest: Any) -> Any:
    return tuple(torch.empty_like(x) for x in (d_hidden, d_weight, d_bias))


_ROWS.register_autograd(linear_topk_divergence_op, linear_topk_divergence_backward_op)
