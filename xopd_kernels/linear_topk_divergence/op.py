"""torch.library schemas of linear_topk_divergence: forward with gradients, their scaling, autograd.

The forward operator computes the gradients of the sum over the tokens; the backward pass scales
them, or computes them again where the upstream gradient differs from token to token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xopd_kernels.backend import Backend, resolve
from xopd_kernels.chunk.autograd import Triple, empty_held_gradients, raise_double_backward
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.rows import AheadOfTime, row_gradients
from xopd_kernels.linear_topk_divergence import reference
from xopd_kernels.memory import Operator, Workload
from xopd_kernels.records import Head, HeadGradient, LinearDivergence, TopK, Wanted

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Options(NamedTuple):
    """The scalars of the schema."""

    beta: float
    has_tail: bool
    temperature: float
    softcap: float | None
    logit_scale: float
    memory_budget_bytes: int | None
    backend: str


def _run(
    tensors: tuple[Tensor | None, ...], options: _Options, wanted: Wanted, keeps_fp32: bool
) -> tuple[LinearDivergence, HeadGradient]:
    """The forward pass of the tensors of the schema on the backend of the options."""
    hidden, weight, bias, teacher_ids, teacher_logprob, token_weight = tensors
    if hidden is None or weight is None or teacher_ids is None or teacher_logprob is None:
        raise TypeError("hidden, weight, teacher_ids and teacher_logprob must be tensors")
    beta, has_tail, temperature, softcap, scale, budget, backend = options
    head = Head(weight, bias, temperature, softcap, scale, "")
    teacher = TopK(teacher_ids, teacher_logprob, has_tail)
    work = Workload.of(Operator.TOPK_DIVERGENCE, hidden, weight, wanted)._replace(
        top_k=teacher_ids.shape[1], has_softcap=softcap is not None
    )
    chosen = resolve(backend, hidden.device, hidden.dtype)
    call = Call.of(head, work, chosen, budget)
    if chosen is Backend.TRITON:
        from xopd_kernels.linear_topk_divergence.triton import forward

        return forward(call, hidden, teacher, token_weight, beta, keeps_fp32)
    return reference.forward(call, hidden, teacher, token_weight, beta, keeps_fp32)


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
    options = _Options(
        beta,
        has_tail,
        temperature,
        softcap,
        logit_scale,
        memory_budget_bytes,
        backend,
    )
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    result, gradient = _run(tensors, options, wanted, main_grad is not None)
    return (*result, *gradient)


@linear_topk_divergence_op.register_fake
def _(
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
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    divergence, lse, teacher_lse = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    gradients = empty_held_gradients(hidden, weight, wanted, main_grad)
    return divergence, lse, teacher_lse, *gradients


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
    options = _Options(
        beta,
        has_tail,
        temperature,
        softcap,
        logit_scale,
        memory_budget_bytes,
        backend,
    )
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    return _ahead((d_hidden, d_weight, d_bias), tensors, options, wanted).scaled(d_divergence)


@linear_topk_divergence_backward_op.register_fake
def _(d_divergence: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, *rest: Any) -> Any:
    return tuple(torch.empty_like(x) for x in (d_hidden, d_weight, d_bias))


def _ahead(
    gradients: Triple, tensors: tuple[Tensor | None, ...], options: _Options, wanted: Wanted
) -> AheadOfTime:
    def recompute(token_weight: Tensor) -> Triple:
        weight = tensors[1]
        keeps_fp32 = weight is not None and gradients[1].dtype != weight.dtype
        return _run((*tensors[:5], token_weight), options, wanted, keeps_fp32)[1]

    return AheadOfTime(gradients, tensors[5], wanted, recompute)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    # Else autograd fills zeros for the outputs nobody reads: d_weight is one of them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:], *inputs[:6])
    ctx.main_grad = inputs[6]
    ctx.scalars = inputs[7:]


def _backward(ctx: Any, d_divergence: Tensor | None, *unread: None) -> tuple[Any, ...]:
    if d_divergence is None:
        return (None,) * (7 + len(ctx.scalars))
    saved = ctx.saved_tensors
    options, wanted = _Options(*ctx.scalars[:-3]), Wanted(*ctx.needs_input_grad[:3])
    read = row_gradients(
        d_divergence,
        _ahead(saved[:3], saved[3:], options, wanted),
        ctx.main_grad,
        lambda: linear_topk_divergence_backward_op(d_divergence, *saved, *options, *wanted),
    )
    return (*read, *[None] * (4 + len(ctx.scalars)))


linear_topk_divergence_op.register_autograd(_backward, setup_context=_setup_context)
linear_topk_divergence_backward_op.register_autograd(raise_double_backward)
