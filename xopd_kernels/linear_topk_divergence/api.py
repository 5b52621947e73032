"""linear_topk_divergence: a linear head against the top-k log-probs of a teacher, at 3U."""

from typing import Literal, overload

import torch
from torch import Tensor

from xopd_kernels.backend import BackendChoice
from xopd_kernels.chunk.autograd import compute_ahead
from xopd_kernels.inputs import (
    main_grad_to_add_ahead,
    prepare_head,
    prepare_options,
    refuse_shards,
    wanted_gradients,
)
from xopd_kernels.linear_topk_divergence.op import linear_topk_divergence_op, run
from xopd_kernels.linear_topk_divergence.sparse_op import linear_topk_divergence_sparse_op
from xopd_kernels.linear_topk_divergence.sparse_op import run as run_sparse
from xopd_kernels.records import LinearDivergence, SparseDivergence, Transform
from xopd_kernels.validation import check_beta, check_per_token, check_sparsity


@overload
def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    *,
    beta: float = 1.0,
    tail: Literal["bucket", "ignore"] = "bucket",
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: Literal["exact"] = "exact",
    max_gradient_error: None = None,
    main_grad_ahead: bool = False,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> LinearDivergence: ...


@overload
def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    *,
    beta: float = 1.0,
    tail: Literal["bucket", "ignore"] = "bucket",
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: Literal["sparse"],
    max_gradient_error: float,
    main_grad_ahead: bool = False,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> SparseDivergence: ...


def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprob: Tensor,
    *,
    beta: float = 1.0,
    tail: Literal["bucket", "ignore"] = "bucket",
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: Literal["exact", "sparse"] = "exact",
    max_gradient_error: float | None = None,
    main_grad_ahead: bool = False,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> LinearDivergence | SparseDivergence:
    """Divergence of a student's distribution from what a teacher says of its K likeliest classes.

    With the tail as a bucket both distributions have K + 1 classes: the ids, and all others as
    one, with ``q_rest = max(1 - sum q, 2^-24)``, as fp32 log-probs cannot tell less, and 0 if
    K = V. Divergences as in `linear_divergence`. The bucket bounds the student's mass outside the
    ids, which a sum over the ids alone leaves free.

    Args:
        hidden: [..., D] bf16, fp16, fp32 (fp64: Backend.REFERENCE only).
        weight: [V, D], dtype of hidden. An fp32 ``main_grad`` is used as in `linear_policy_loss`.
        teacher_ids: [..., K] int64 classes, distinct in a row.
        teacher_logprob: [..., K] nat, of the teacher's whole distribution (not renormalised over
            the ids), at the same temperature.
        beta: in [0, 1]; 0 = KL(teacher || student), 1 = KL(student || teacher), else JSD.
        tail: "bucket", or "ignore": the plain sum over the K ids, as others compute it; it is no
            divergence and can be negative.
        token_weight: [...] as in `linear_divergence`.
        bias, temperature, softcap, logit_scale, memory_budget_bytes, backend: as in
            `linear_logprob`.
        gradient: "exact", or "sparse": of the classes besides the ids only those of a list have a
            gradient, within `max_gradient_error`; for every beta and tail.
        max_gradient_error: e >= 0; with "sparse" only, which needs it. Of the sum over the tokens
            ``sum_i ||dz_i - dz'_i||_1 <= e * sum_i ||dz_i||_1``, as in `linear_policy_loss`. Where
            the upstream gradient differs from token to token, the gradients are computed again,
            and the bound is that of the weighted sum.
        main_grad_ahead: as in `linear_policy_loss`; every token's upstream gradient is 1 (a sum).

    Returns:
        LinearDivergence(divergence, lse, teacher_lse), [...] fp32 (fp64 for fp64 inputs);
        teacher_lse is the log of the mass that the ids hold. Only `divergence` has a gradient: to
        hidden, weight and bias. With "sparse" SparseDivergence, which adds dropped_mass [...]
        fp32, the student's probability of the classes without an entry in the gradient (1: the
        row is left out whole), and gradient_error [] fp32, the bound that was reached; both are
        those of upstream gradients of 1.

    Cost, numerics and what raises: as `linear_divergence`, 3U. Backend.TRITON takes K <= 256. The
    student's mass outside the ids is summed over the other classes, as 1 - sum p would cancel.
    Ids that repeat in a row or are no class raise ValueError on the CPU; on a CUDA device they
    give NaN, as reading them would stall.

    Example:
        >>> import torch
        >>> from xopd_kernels import linear_topk_divergence
        >>> ids, logprob = torch.tensor([[3, 5]]), torch.tensor([[0.25, 0.25]]).log()
        >>> zeros = torch.zeros(1, 4), torch.zeros(8, 4)
        >>> linear_topk_divergence(*zeros, ids, logprob, beta=0.0).divergence
        tensor([0.1438])
    """
    required = [
        ("hidden", hidden),
        ("weight", weight),
        ("teacher_ids", teacher_ids),
        ("teacher_logprob", teacher_logprob),
    ]
    per_token = [("token_weight", token_weight)]
    optional = [("bias", bias), *per_token]
    backend_name = prepare_options(required, optional, memory_budget_bytes, backend)
    check_beta(beta)
    if tail not in ("bucket", "ignore"):
        raise ValueError(f'tail must be "bucket" or "ignore", got {tail!r}')
    x = prepare_head(hidden, weight, bias, Transform(temperature, softcap, logit_scale))
    refuse_shards([x], "linear_topk_divergence")
    _check_teacher(teacher_ids, teacher_logprob, x.shape, len(x.weight))
    check_per_token(per_token, x.shape)
    top_k = teacher_ids.shape[-1]
    tensors = (
        *x[:3],
        teacher_ids.reshape(-1, top_k),
        teacher_logprob.detach().reshape(-1, top_k),
        None if token_weight is None else token_weight.detach().reshape(-1),
    )
    scalars = (float(beta), tail == "bucket", *x.scalars, memory_budget_bytes, backend_name)
    sparsity = check_sparsity(gradient, max_gradient_error)
    wanted, main_grad = wanted_gradients(*x[:3]), main_grad_to_add_ahead(x, main_grad_ahead)
    if sparsity is not None and sparsity.leaves_out:
        every = (*scalars, sparsity.max_error)
        if main_grad is not None:
            results = compute_ahead(run_sparse, tensors, every, wanted, main_grad)
        else:
            operator = linear_topk_divergence_sparse_op
            results = operator(*tensors, x.main_grad, *every, *wanted)[:5]
        divergence, *rest, error = results
        shaped = (row.detach().view(x.shape) for row in rest)
        return SparseDivergence._make([divergence.view(x.shape), *shaped, error.detach()])
    if main_grad is not None:
        divergence, lse, teacher_lse = compute_ahead(run, tensors, scalars, wanted, main_grad)
    else:
        results = linear_topk_divergence_op(*tensors, x.main_grad, *scalars, *wanted)
        divergence, lse, teacher_lse, _, _, _ = results
    rows = (row.detach().view(x.shape) for row in (lse, teacher_lse))
    result = LinearDivergence(divergence.view(x.shape), *rows)
    if sparsity is None:
        return result
    nothing = torch.zeros_like(result.lse, dtype=torch.float32)
    return SparseDivergence(*result, nothing, nothing.new_zeros(()))


def _check_teacher(ids: Tensor, logprob: Tensor, shape: torch.Size, classes: int) -> None:
    """Raise unless ids and logprob are [..., K] with 1 <= K <= V."""
    if ids.dtype != torch.int64:
        raise TypeError(f"teacher_ids must be int64, got {ids.dtype}; use teacher_ids.long()")
    if not logprob.is_floating_point():
        raise TypeError(f"teacher_logprob must be floating point, got {logprob.dtype}")
    if ids.ndim != len(shape) + 1 or ids.shape[:-1] != shape:
        raise ValueError(f"teacher_ids must be {[*shape, 'K']}, got {list(ids.shape)}")
    if logprob.shape != ids.shape:
        raise ValueError(
            f"teacher_logprob must have the shape of teacher_ids {list(ids.shape)}, "
            f"got {list(logprob.shape)}"
        )
    if not 1 <= ids.shape[-1] <= classes:
        raise ValueError(
            f"teacher_ids must hold from 1 to V = {classes} ids a token, got K = {ids.shape[-1]}"
        )
