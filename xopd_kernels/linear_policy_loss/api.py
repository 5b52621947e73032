"""linear_policy_loss: the clipped policy-gradient loss of a linear head at the cost of 3 GEMMs."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xopd_kernels.backend import BackendChoice
from xopd_kernels.chunk.autograd import compute_ahead
from xopd_kernels.inputs import (
    main_grad_to_add_ahead,
    prepare_head,
    prepare_options,
    prepare_target,
    wanted_gradients,
)
from xopd_kernels.linear_policy_loss.op import linear_policy_loss_op, run
from xopd_kernels.linear_policy_loss.sparse_op import linear_policy_loss_sparse_op
from xopd_kernels.linear_policy_loss.sparse_op import run as run_sparse
from xopd_kernels.records import PolicyLoss, SparsePolicyLoss, Transform
from xopd_kernels.validation import (
    check_clamp,
    check_index,
    check_number,
    check_per_token,
    check_sparsity,
)


@overload
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    teacher_logprob: Tensor | None = None,
    advantage: Tensor | None = None,
    old_logprob: Tensor | None = None,
    token_weight: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    advantage_clamp: float = 10.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_group: ProcessGroup | None = None,
    gradient: Literal["exact"] = "exact",
    max_gradient_error: None = None,
    gradient_seed: None = None,
    main_grad_ahead: bool = False,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> PolicyLoss: ...


@overload
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    teacher_logprob: Tensor | None = None,
    advantage: Tensor | None = None,
    old_logprob: Tensor | None = None,
    token_weight: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    advantage_clamp: float = 10.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_group: ProcessGroup | None = None,
    gradient: Literal["sparse", "unbiased"],
    max_gradient_error: float,
    gradient_seed: int | None = None,
    main_grad_ahead: bool = False,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> SparsePolicyLoss: ...


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    teacher_logprob: Tensor | None = None,
    advantage: Tensor | None = None,
    old_logprob: Tensor | None = None,
    token_weight: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    advantage_clamp: float = 10.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_group: ProcessGroup | None = None,
    gradient: Literal["exact", "sparse", "unbiased"] = "exact",
    max_gradient_error: float | None = None,
    gradient_seed: int | None = None,
    main_grad_ahead: bool = False,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> PolicyLoss | SparsePolicyLoss:
    """Clipped policy loss of sampled tokens; the gradients are computed in the forward pass.

    ``loss = -sum_i token_weight_i * min(ratio_i * A_i, clip(ratio_i, 1-clip_low, 1+clip_high)
    * A_i)`` with ``ratio = exp(logprob - old_logprob)`` and logprob as in `linear_logprob`
    (PPO, arXiv:1707.06347, eq. 7). With `teacher_logprob` the advantage is
    ``clamp(teacher_logprob - stopgrad(logprob), -advantage_clamp, advantage_clamp)``: on-policy
    distillation by the single-sample reverse KL.

    Args:
        hidden: [..., D] bf16, fp16, fp32 (fp64: Backend.REFERENCE only).
        weight: [V, D], dtype of hidden; with `vocab_group` this rank's shard of the rows.
        target: [...] int64 sampled tokens, already shifted; `ignore_index` marks ignored ones.
        teacher_logprob: [...] nat. Exactly one of this and `advantage`. No gradient flows to
            these two, `old_logprob` and `token_weight`: they are constants.
        advantage: [...] used as it is, without the clamp.
        old_logprob: [...] nat, of the policy that sampled; None: this one, so ratio = 1.
        token_weight: [...] carries mask, normaliser and loss scale; None: 1. A token of weight 0
            is ignored as one of target `ignore_index` is.
        clip_low, clip_high: >= 0; the ratio is clipped to [1 - clip_low, 1 + clip_high].
        advantage_clamp: > 0, nat; math.inf for none.
        bias, temperature, softcap, logit_scale, ignore_index, vocab_group,
            memory_budget_bytes, backend: as in `linear_logprob`.
        gradient: "exact", or "sparse": about one GEMM in all, as most entries of the gradient of
            the logits are left out, within `max_gradient_error`. "unbiased": as sparse, and one
            class that is drawn for each row stands for those left out, so that the expectation of
            the gradient is exact. Only "exact" takes a `vocab_group`.
        max_gradient_error: e >= 0; with "sparse" and "unbiased" only, which need it. With the
            gradients dz_i of the transformed logits and dz'_i as used,
            ``sum_i ||dz_i - dz'_i||_1 <= e * sum_i ||dz_i||_1``, so d_hidden of a row is off by
            at most ``||dz_i - dz'_i||_1 * max_v ||s_v W_v - u_i||`` (s_v: slope between linear
            output and logit; u_i: `chunk.sparse.Tail`). e = 0: as "exact".
            `chunk.sparse.choose_rows` is the rule.
        gradient_seed: int, needed by "unbiased": what is drawn is a function of it and of the
            row's number. Another one for each step.
        main_grad_ahead: add d_weight to ``weight.main_grad`` chunk by chunk in the forward pass, so
            that no [V, D] fp32 tensor waits for the backward pass. A promise: this call has one
            backward pass, in which the upstream gradient of the loss is 1 (factors, also a loss
            scale, are in `token_weight`). It is checked there: RuntimeError on the CPU, an
            assertion on a CUDA device, which does not wait. Whoever calls and never goes backward
            has changed main_grad. Without gradients it does nothing.

    Returns:
        PolicyLoss(loss [], logprob, lse, advantage, ratio [...], is_clipped [...] bool), fp32
        (fp64 for fp64 inputs). Only `loss` has a gradient: to hidden, weight and bias. Ignored
        tokens give 0 (False) in every field, and are taken out before the first GEMM.
        With "sparse" and "unbiased" SparsePolicyLoss, which adds dropped_mass [...] fp32, the
        probability of the classes without an entry in the gradient (a row left out whole:
        1 - p_target; 0 for a row that is exact, ignored, or without a gradient), and
        gradient_error [] fp32, the bound that was reached, from sums that are rounded up.

    A < 0 with a ratio that overflows gives a loss of inf, as dense PPO does: the minimum does not
    clip there. Gradients are computed in the forward pass. bf16 ones are rounded there, and once
    more if the upstream gradient is no power of two: put factors into `token_weight`. fp16 ones
    wait in fp32, so that the factor of a GradScaler comes before they could underflow.

    Cost: 3U with gradients, 2U with a frozen weight or a frozen hidden, 1U without gradients
    (U = 2 N V D); sparse: 1U, and the rest for the share of rows that stays dense. d_hidden and
    d_weight are held from forward to backward in the dtypes of their tensors; with a ``main_grad``
    d_weight in fp32, or not at all with `main_grad_ahead`.

    Numerics: fp32 logits, fp32 accumulation of d_weight, bitwise repeatable.

    Raises:
        TypeError, ValueError: an input is wrong; nothing was computed. A target out of range
            raises on the CPU; on a CUDA device its logprob is NaN, as reading it would stall.
            With `teacher_logprob` or `old_logprob` the loss and the gradients are NaN then;
            with `advantage` alone they are finite, and the row's gradient lacks its target.
        BackendUnavailableError: an explicit backend cannot run here.
        NotImplementedError: under forward-mode differentiation; a weight with main_grad under
            torch.compile; `main_grad_ahead` under saved-tensor hooks, as activation checkpointing
            runs the forward pass again.
        RuntimeError: the gradient is differentiated again; `main_grad_ahead` was promised wrongly.

    Example:
        >>> import torch
        >>> from xopd_kernels import linear_policy_loss
        >>> hidden, weight = torch.zeros(2, 4, requires_grad=True), torch.zeros(8, 4)
        >>> teacher = torch.tensor([-1.0794, 0.0])
        >>> out = linear_policy_loss(
        ...     hidden, weight, torch.tensor([3, -100]), teacher_logprob=teacher
        ... )
        >>> out.advantage
        tensor([1.0000, 0.0000])
        >>> out.loss.backward()
    """
    per_token = [
        ("teacher_logprob", teacher_logprob),
        ("advantage", advantage),
        ("old_logprob", old_logprob),
        ("token_weight", token_weight),
    ]
    required = [("hidden", hidden), ("weight", weight), ("target", target)]
    optional = [("bias", bias), *per_token]
    backend_name = prepare_options(required, optional, memory_budget_bytes, backend)
    check_index(ignore_index)
    transform = Transform(temperature, softcap, logit_scale)
    x = prepare_head(hidden, weight, bias, transform, vocab_group)
    flat_target = prepare_target(target, hidden)
    check_per_token(per_token, x.shape)
    if (teacher_logprob is None) == (advantage is None):
        count = "neither" if advantage is None else "both"
        raise ValueError(f"exactly one of teacher_logprob and advantage must be given, got {count}")
    _check_scalars(clip_low, clip_high, advantage_clamp)
    modes = ("exact", "sparse", "unbiased")
    sparsity = check_sparsity(gradient, max_gradient_error, gradient_seed, modes, x.vocab_group)
    # Constants: without detach the loss would ask for a gradient that nobody computes.
    terms = (None if value is None else value.detach().reshape(-1) for _, value in per_token)
    tensors = (*x[:3], flat_target, *terms)
    bounds = (float(clip_low), float(clip_high), float(advantage_clamp))
    options = (x.vocab_group, ignore_index, memory_budget_bytes, backend_name)
    scalars, wanted = (*bounds, *x.scalars, *options), wanted_gradients(*x[:3])
    main_grad = main_grad_to_add_ahead(x, main_grad_ahead)
    if sparsity is not None and sparsity.leaves_out:
        every = (*scalars, *sparsity)
        if main_grad is not None:
            loss, *rows, error = compute_ahead(run_sparse, tensors, every, wanted, main_grad)
        else:
            results = linear_policy_loss_sparse_op(*tensors, x.main_grad, *every, *wanted)
            loss, *rows, error = results[:8]
        shaped = (row.detach().view(x.shape) for row in rows)
        return SparsePolicyLoss._make([loss, *shaped, error.detach()])
    if main_grad is not None:
        loss, *rows = compute_ahead(run, tensors, scalars, wanted, main_grad)
    else:
        loss, *rows, _, _, _ = linear_policy_loss_op(*tensors, x.main_grad, *scalars, *wanted)
    result = PolicyLoss(loss, *(row.detach().view(x.shape) for row in rows))
    if sparsity is None:
        return result
    nothing = torch.zeros_like(result.logprob, dtype=torch.float32)
    return SparsePolicyLoss(*result, nothing, nothing.new_zeros(()))


def _check_scalars(clip_low: float, clip_high: float, advantage_clamp: float) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        check_number(name, value)
        if not value >= 0:  # a NaN fails, too
            raise ValueError(f"{name} must be >= 0, got {value}")
    check_clamp(advantage_clamp)
