"""linear_logprob: the per-token log-probability of a linear head, without the logits."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xopd_kernels.backend import BackendChoice
from xopd_kernels.inputs import (
    prepare_head,
    prepare_options,
    prepare_target,
    wanted_gradients,
)
from xopd_kernels.linear_logprob.op import linear_logprob_op
from xopd_kernels.linear_logprob.sparse_op import linear_logprob_sparse_op
from xopd_kernels.records import Entries, LinearLogprob, SparseLinearLogprob, Transform
from xopd_kernels.validation import check_index, check_sparsity


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    needs_entropy: bool = False,
    vocab_group: ProcessGroup | None = None,
    gradient: Literal["exact"] = "exact",
    max_gradient_error: None = None,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> LinearLogprob: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    needs_entropy: bool = False,
    vocab_group: ProcessGroup | None = None,
    gradient: Literal["sparse"],
    max_gradient_error: float,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> SparseLinearLogprob: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    needs_entropy: bool = False,
    vocab_group: ProcessGroup | None = None,
    gradient: Literal["exact", "sparse"] = "exact",
    max_gradient_error: float | None = None,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> LinearLogprob | SparseLinearLogprob:
    """Log-probability of `target` under softmax of a linear head, differentiable.

    ``logprob = z[target] - lse``, ``lse = log sum exp z``, ``entropy = -sum p log p`` with
    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``.

    Args:
        hidden: [..., D] bf16, fp16, fp32 (fp64: Backend.REFERENCE only).
        weight: [V, D], dtype of hidden; with `vocab_group` this rank's shard of the rows. Where it
            has an fp32 attribute ``main_grad`` [V, D], its gradient is added there, unrounded, and
            ``weight.grad`` stays as it is. Every backward pass through the result adds to it, also
            one that asks for other gradients only.
        target: [...] int64 classes, already shifted; `ignore_index` marks ignored tokens.
        bias: [V], dtype of weight.
        temperature: divides the logits, after `softcap`.
        softcap: ``c * tanh(x / c)``, after `logit_scale`.
        logit_scale: multiplies ``hidden @ weight.T + bias``.
        ignore_index: tokens with this target give 0, have no gradient, and are taken out before
            the first GEMM.
        needs_entropy: compute the entropy; else it comes back as an empty tensor [0]. With "sparse"
            it is for reading alone: detached, it brings no gradient into a loss.
        vocab_group: ranks that hold contiguous row shards of one weight, in rank order. hidden
            and target must be equal on all of them; d_hidden is summed over them. A DTensor
            weight sharded on dim 0 brings its group along if hidden is a replicated DTensor.
        gradient: "exact", or "sparse": the gradient of a row comes from a list of its likeliest
            classes that waits for the backward pass, so that logits are computed again only where
            the list lacks too much. Not with `vocab_group`.
        max_gradient_error: e >= 0; with "sparse" only, which needs it. Of every row
            ``||dz - dz'||_1 <= e * ||dz||_1``, dz the gradient of the transformed logits and dz'
            the one that is used, whatever the upstream gradient. e = 0: that of "exact".
        memory_budget_bytes: bound of the workspace (not of the gradients and of the fp32 sum of
            d_weight), see `memory_plan`; None: 48 MiB on a CPU, 640 MB on a CUDA device. It decides
            how many rows are computed at a time; the least one that is accepted is slow.
        backend: a Backend, which runs or raises, or "auto".

    Returns:
        LinearLogprob(logprob [...], lse [...], entropy [...] or [0]) in nat, fp32 (fp64 for fp64
        inputs). All three are differentiable with respect to hidden, weight and bias; the
        backward recomputes the logits: 4U in all, U = 2 N V D. `linear_policy_loss` costs 3U.
        With "sparse" SparseLinearLogprob, whose logprob alone is differentiable (1U, and the rest
        for the share of rows that stays dense). It adds dropped_mass [...] fp32, the probability
        of the classes without an entry in the gradient (0 for ignored and dense rows), and
        gradient_error [] fp32, the bound that the worst row reached.

    Numerics: fp32 logits and sums, d_weight accumulates in fp32, bitwise repeatable. Under
    autocast hidden, weight and bias are cast to its dtype, as F.linear would.

    Raises:
        TypeError, ValueError: an input is wrong; nothing was computed. A target out of range
            raises on the CPU; on a CUDA device it gives a NaN logprob, as reading it would stall,
            and the row's gradient is finite but lacks its target.
        BackendUnavailableError: an explicit backend cannot run here.
        RuntimeError: the gradient is differentiated again.

    Example:
        >>> import torch
        >>> from xopd_kernels import linear_logprob
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
        >>> linear_logprob(hidden, weight, torch.tensor([3, -100])).logprob
        tensor([-2.0794,  0.0000])
    """
    tensors = [("hidden", hidden), ("weight", weight), ("target", target)]
    backend_name = prepare_options(tensors, [("bias", bias)], memory_budget_bytes, backend)
    check_index(ignore_index)
    transform = Transform(temperature, softcap, logit_scale)
    x = prepare_head(hidden, weight, bias, transform, vocab_group)
    if not isinstance(needs_entropy, bool):
        raise TypeError(f"needs_entropy must be a bool, got {needs_entropy!r}")
    sparsity = check_sparsity(gradient, max_gradient_error, vocab_group=x.vocab_group)
    flat_target, has_gradient = prepare_target(target, hidden), any(wanted_gradients(*x[:3]))
    if sparsity is not None and sparsity.leaves_out and has_gradient:
        logprob, lse, entropy, error, *entries = linear_logprob_sparse_op(
            *x[:3],
            flat_target,
            x.main_grad,
            *x.scalars,
            ignore_index,
            needs_entropy,
            sparsity.max_error,
            memory_budget_bytes,
            backend_name,
        )
        # A copy: the backward pass reads it, and whoever logs it may change it.
        dropped = Entries(*entries).dropped_mass.detach().clone()
        rows = (logprob, lse.detach(), entropy.detach(), dropped)
        shaped = _shaped(rows, x.shape, needs_entropy)
        return SparseLinearLogprob._make([*shaped, error.detach()])
    results = linear_logprob_op(
        *x[:3],
        flat_target,
        x.main_grad,
        *x.scalars,
        x.vocab_group,
        ignore_index,
        needs_entropy,
        has_gradient,
        memory_budget_bytes,
        backend_name,
    )
    logprob, lse, entropy = _shaped(results, x.shape, needs_entropy)
    if sparsity is None:
        return LinearLogprob(logprob, lse, entropy)
    nothing = torch.zeros_like(logprob, dtype=torch.float32)
    detached = (lse.detach(), entropy.detach())
    return SparseLinearLogprob(logprob, *detached, nothing, nothing.new_zeros(()))


def _shaped(rows: tuple[Tensor, ...], shape: torch.Size, needs_entropy: bool) -> list[Tensor]:
    """The values [N] in the shape of the tokens; the third one, the entropy, if there is one."""
    is_given = (True, True, needs_entropy, True)
    return [row.view(shape) if given else row for row, given in zip(rows, is_given, strict=False)]
