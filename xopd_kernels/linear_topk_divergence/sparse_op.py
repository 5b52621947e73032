"""torch.library schemas of linear_topk_divergence with a sparse gradient.

As `op`, with two more results: the mass without an entry in the gradient, and the bound reached.
"""

from typing import Any

import torch
from torch import Tensor

from xopd_kernels.backend import Backend
from xopd_kernels.chunk.autograd import Tensors, Triple
from xopd_kernels.chunk.rows import RowOperator
from xopd_kernels.linear_topk_divergence.op import prepare
from xopd_kernels.linear_topk_divergence.op import run as run_exact
from xopd_kernels.records import GradientSink, HeadGradient, SparseDivergence, Sparsity, Wanted


def run(
    tensors: Tensors, scalars: tuple[Any, ...], wanted: Wanted, sink: GradientSink
) -> tuple[SparseDivergence, HeadGradient]:
    """The forward pass of the tensors and the scalars of the schema; the last: the error."""
    *exact, max_error = scalars
    if not any(wanted):  # nothing to leave out
        result, gradient = run_exact(tensors, tuple(exact), wanted, sink)
        nothing = torch.zeros_like(result.lse, dtype=torch.float32)
        return SparseDivergence(*result, nothing, nothing.new_zeros(())), gradient
    given = prepare(tensors, tuple(exact), wanted, sink, is_sparse=True)
    if given.backend is Backend.TRITON:
        from xopd_kernels.linear_topk_divergence.sparse_triton import forward_sparse
    elif given.backend is Backend.NATIVE:
        from xopd_kernels.linear_topk_divergence.sparse_native import forward_sparse
    else:
        from xopd_kernels.linear_topk_divergence.sparse_reference import forward_sparse
    sparsity = Sparsity("sparse", max_error, 0)
    result, gradient, dropped, error = forward_sparse(*given[1:], sink, sparsity)
    return SparseDivergence(*result, dropped, error), gradient


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_ROWS = RowOperator(run, tensors=6, is_sparse=True)


@torch.library.custom_op("xopd_kernels::linear_topk_divergence_sparse", mutates_args=())
def linear_topk_divergence_sparse_op(
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
    max_gradient_error: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Results:
    """The fields of SparseDivergence and (d_hidden, d_weight, d_bias)."""
    tensors = (hidden, weight, bias, teacher_ids, teacher_logprob, token_weight)
    transform, options = (temperature, softcap, logit_scale), (memory_budget_bytes, backend)
    scalars = (beta, has_tail, *transform, *options, max_gradient_error)
    sink = GradientSink(keeps_fp32=main_grad is not None)
    result, gradient = run(tensors, scalars, Wanted(wants_hidden, wants_weight, wants_bias), sink)
    return (*result, *gradient)


@linear_topk_divergence_sparse_op.register_fake
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
    exact = _ROWS.fake(hidden, weight, main_grad, rest[-3:])
    dropped = hidden.new_empty(len(hidden), dtype=torch.float32)
    return (*exact[:3], dropped, dropped.new_empty(()), *exact[3:])


@torch.library.custom_op("xopd_kernels::linear_topk_divergence_sparse_backward", mutates_args=())
def linear_topk_divergence_sparse_backward_op(
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
    max_gradient_error: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Triple:
    """The gradients (d_hidden, d_weight, d_bias) of the sum, for the upstream gradient [N]."""
    tensors = (hidden, weight, bias, teacher_ids, teacher_logprob, token_weight)
    transform, options = (temperature, softcap, logit_scale), (memory_budget_bytes, backend)
    scalars = (beta, has_tail, *transform, *options, max_gradient_error)
    wanted = Wanted(wants_hidden, wants_weight, wants_bias)
    ahead = _ROWS.ahead((d_hidden, d_weight, d_bias), tensors, scalars, wanted)
    return ahead.scaled(d_divergence)


@linear_topk_divergence_sparse_backward_op.register_fake
def _(d_divergence: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, *rest: Any) -> Any:
    return tuple(torch.empty_like(x) for x in (d_hidden, d_weight, d_bias))


_ROWS.register_autograd(linear_topk_divergence_sparse_op, linear_topk_divergence_sparse_backward_op)
