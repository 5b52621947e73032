"""linear_logprob: the per-token log-probability of a linear head, without the logits."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xopd_kernels.backend import BackendChoice
from xopd_kernels.linear_logprob.op import linear_logprob_op
from xopd_kernels.records import Head, LinearLogprob
from xopd_kernels.validation import check_backend, check_inputs, check_tensors

# What autocast changes: F.linear leaves float64 and integers alone.
_AUTOCAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    backend: BackendChoice = "auto",
) -> LinearLogprob:
    """Log-probability of `target` under softmax of a linear head, differentiable.

    ``logprob = z[target] - lse``, ``lse = log sum exp z``, ``entropy = -sum p log p`` with
    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``.

    Args:
        hidden: [..., D] bf16, fp16, fp32 (fp64: Backend.REFERENCE only).
        weight: [V, D], dtype of hidden; with `vocab_group` this rank's shard of the rows.
        target: [...] int64 classes, already shifted; `ignore_index` marks ignored tokens.
        bias: [V], dtype of weight.
        temperature: divides the logits, after `softcap`.
        softcap: ``c * tanh(x / c)``, after `logit_scale`.
        logit_scale: multiplies ``hidden @ weight.T + bias``.
        ignore_index: tokens with this target give 0, have no gradient, and are taken out before
            the first GEMM.
        needs_entropy: compute the entropy; else it comes back as an empty tensor [0].
        vocab_group: ranks that hold contiguous row shards of one weight, in rank order. hidden
            and target must be equal on all of them; d_hidden is summed over them.
        backend: a Backend, which runs or raises, or "auto".

    Returns:
        LinearLogprob(logprob [...], lse [...], entropy [...] or [0]) in nat, fp32 (fp64 for fp64
        inputs). All three are differentiable with respect to hidden, weight and bias; the
        backward recomputes the logits: 4U in all, U = 2 N V D. `linear_policy_loss` costs 3U.

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
    check_tensors([("hidden", hidden), ("weight", weight), ("target", target), ("bias", bias)])
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    head = Head(weight, bias, temperature, softcap, logit_scale, group_name(vocab_group))
    check_inputs(hidden, head, target)
    name = check_backend(backend)
    shape = target.shape
    logprob, lse, entropy = linear_logprob_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        float(temperature),
        softcap,
        float(logit_scale),
        head.vocab_group,
        ignore_index,
        needs_entropy,
        name,
    )
    if needs_entropy:
        entropy = entropy.view(shape)
    return LinearLogprob(logprob.view(shape), lse.view(shape), entropy)


def autocast_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs as F.linear would see them: in the autocast dtype where autocast is on.

    Done here, not by register_autocast, which would also round the per-token fp32 inputs.
    """
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type) or hidden.dtype not in _AUTOCAST_DTYPES:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def group_name(group: ProcessGroup | None) -> str:
    """The name by which an operator schema carries a process group; "" for None."""
    return "" if group is None else str(group.group_name)
