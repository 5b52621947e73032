"""What every operator does with its arguments before the schema: check, unwrap, cast, flatten."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from xopd_kernels.backend import BackendChoice
from xopd_kernels.records import Transform, Wanted
from xopd_kernels.shard import local_shard
from xopd_kernels.validation import (
    check_backend,
    check_budget,
    check_group,
    check_head,
    check_target,
    check_tensors,
)

# What autocast changes: F.linear leaves float64 and integers alone.
_AUTOCAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class HeadInputs(NamedTuple):
    """Checked arguments of one head, as the operator schemas take them."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], this rank's shard of it with vocab_group
    bias: Tensor | None  # [V]
    main_grad: Tensor | None  # [V, D] fp32, of the weight; None if it has none or is frozen
    scalars: Transform
    vocab_group: str  # name of the process group; "" = not sharded
    shape: torch.Size  # of the tokens

    def first_classes(self, count: int) -> "HeadInputs":
        """Without the classes beyond `count`: sliced away, never padded."""
        bias = None if self.bias is None else first_classes(self.bias, count)
        main_grad = None if self.main_grad is None else first_classes(self.main_grad, count)
        weight = first_classes(self.weight, count)
        return self._replace(weight=weight, bias=bias, main_grad=main_grad)


def first_classes(values: Tensor, count: int) -> Tensor:
    """The first `count` rows; `values` itself if it has no more."""
    return values if len(values) == count else values[:count]


def refuse_shards(heads: list[HeadInputs], operator: str) -> None:
    """Raise for an operator that needs the whole vocabulary on every rank."""
    if any(head.vocab_group for head in heads):
        raise NotImplementedError(
            f"{operator} takes whole weights, got one that is sharded over its vocabulary; use "
            "weight.full_tensor(), or linear_logprob and linear_policy_loss, which take shards"
        )


def prepare_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    vocab_group: ProcessGroup | None = None,
    prefix: str = "",
) -> HeadInputs:
    """Checked and flattened inputs of a head; raises TypeError or ValueError."""
    check_group(vocab_group)
    given = weight
    hidden, weight, bias, group_name = local_shard(hidden, weight, bias, vocab_group, prefix)
    main_grad = None if prefix else _main_grad(given, weight)  # a teacher is a constant
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check_head(hidden, weight, bias, transform, prefix)
    temperature, softcap, logit_scale = transform
    scalars = Transform(
        float(temperature), None if softcap is None else float(softcap), float(logit_scale)
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    return HeadInputs(rows, weight, bias, main_grad, scalars, group_name, hidden.shape[:-1])


HeadArguments = tuple[Tensor, Tensor, Tensor | None, Transform]  # hidden, weight, bias, scalars


def check_pair(student: HeadArguments, teacher: HeadArguments) -> int:
    """Classes that student and teacher share; raises unless both heads score the same tokens."""
    check_head(*student)
    check_head(*teacher, "teacher_")
    hidden, teacher_hidden = student[0], teacher[0]
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            "teacher_hidden must have the leading shape of hidden "
            f"{list(hidden.shape[:-1])}, got {list(teacher_hidden.shape[:-1])}; one row a token"
        )
    if (hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise TypeError(
            "hidden and teacher_hidden must both be fp64 or neither, got "
            f"{hidden.dtype} and {teacher_hidden.dtype}"
        )
    return min(student[1].shape[0], teacher[1].shape[0])


def prepare_target(target: Tensor, hidden: Tensor) -> Tensor:
    """The target [N] of `hidden` [..., D]; raises TypeError or ValueError."""
    check_target(target, hidden)
    return target.reshape(-1)


def prepare_options(
    required: list[tuple[str, Tensor]],
    optional: list[tuple[str, Tensor | None]],
    memory_budget_bytes: int | None,
    backend: BackendChoice,
) -> str:
    """Check all tensors of a call, its budget and backend; the backend as schemas carry it."""
    check_tensors(required, optional)
    check_budget(memory_budget_bytes)
    for name, value in (*required, *optional):
        # The operators have no forward-mode formula; autograd would take the tangent for zero.
        if value is None or torch.compiler.is_compiling():
            continue
        if forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent (torch.func.jvp, torch.autograd."
                "forward_ad); xopd_kernels has reverse mode only"
            )
    return check_backend(backend)


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wanted:
    """The gradients that autograd will ask for."""
    if not torch.is_grad_enabled():
        return Wanted(False, False, False)
    has_bias_gradient = bias is not None and bias.requires_grad
    return Wanted(hidden.requires_grad, weight.requires_grad, has_bias_gradient)


def main_grad_to_add_ahead(head: HeadInputs, main_grad_ahead: bool) -> Tensor | None:
    """The main_grad that the forward pass adds d_weight to; raises where it must not or cannot."""
    if not isinstance(main_grad_ahead, bool):
        raise TypeError(f"main_grad_ahead must be a bool, got {type(main_grad_ahead).__name__}")
    if not main_grad_ahead or not head.weight.requires_grad or not torch.is_grad_enabled():
        return None
    if head.main_grad is None:
        raise ValueError(
            "main_grad_ahead=True needs weight.main_grad, a contiguous float32 tensor of the shape "
            "of weight: set it, or leave main_grad_ahead out"
        )
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise NotImplementedError(
            "main_grad_ahead=True under saved-tensor hooks (torch.utils.checkpoint, save_on_cpu): "
            "where the forward pass runs again, it would add d_weight to main_grad twice; take "
            "the operator out of their reach, or leave main_grad_ahead out"
        )
    return head.main_grad


def _main_grad(given: Tensor, weight: Tensor) -> Tensor | None:
    """The fp32 accumulator that a training framework keeps beside the weight, if it does.

    `weight` is what the operator reads of the weight `given`: itself, or this rank's shard.
    """
    main_grad: Any = getattr(given, "main_grad", None)
    if main_grad is None or not weight.requires_grad or not torch.is_grad_enabled():
        return None
    if not given.is_leaf:
        raise ValueError(
            "weight has main_grad but is no leaf: the gradient would end there, and never reach "
            "what it was made from; set main_grad on the parameter and pass that"
        )
    if given._backward_hooks:
        raise ValueError(
            "weight has main_grad and gradient hooks; the hooks would see no gradient: "
            "remove them or the attribute"
        )
    if weight is not given and isinstance(main_grad, type(given)):
        shard: Any = main_grad  # both are DTensors
        main_grad = shard.to_local()
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "weight has main_grad, which torch.compile cannot update; call the operator outside "
            "the compiled region or remove the attribute"
        )
    found = type(main_grad).__name__
    if isinstance(main_grad, Tensor):
        expected = (torch.float32, weight.shape, weight.device)
        is_plain = main_grad.is_contiguous() and weight.dtype != torch.float64
        if (main_grad.dtype, main_grad.shape, main_grad.device) == expected and is_plain:
            return main_grad
        found = (
            f"{main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}, strides "
            f"{main_grad.stride()}, for a weight of {weight.dtype}"
        )
    raise ValueError(
        f"weight.main_grad must be contiguous float32 {list(weight.shape)} on "
        f"{weight.device}, beside a weight that is not fp64, got {found}"
    )


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs as F.linear would see them: in the autocast dtype where autocast is on.

    Done here, not by register_autocast, which would also round the per-token fp32 inputs.
    """
    device_type = hidden.device.type
    if hidden.dtype not in _AUTOCAST_DTYPES or device_type == "meta":
        return hidden, weight, bias
    if not torch.is_autocast_enabled(device_type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
