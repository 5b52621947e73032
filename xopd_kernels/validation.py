"""Checks shared by the operators: each error names the argument, what it got, and the remedy.

Only metadata is read here, so the checks cost no device synchronisation and trace under
torch.compile. Values of `target` are checked inside the operators (see `check_target_range`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xopd_kernels.backend import Backend, BackendChoice
from xopd_kernels.records import Head

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(named: Sequence[tuple[str, Tensor | None]]) -> None:
    """Raise unless each value is None or a tensor on the device of the first."""
    device: torch.device | None = None
    for name, value in named:
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        device = value.device if device is None else device
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, {named[0][0]} on {device}; move it")


def check_inputs(hidden: Tensor, head: Head, target: Tensor) -> None:
    """Raise TypeError/ValueError unless hidden [..., D], head and target [...] fit together."""
    weight, bias = head.weight, head.bias
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"hidden must be bf16, fp16, fp32 or fp64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight must have the dtype of hidden ({hidden.dtype}), got {weight.dtype}; "
            "cast one of them or use torch.autocast"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; use target.long()")
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "hidden must be [..., D] and weight [V, D] with one D, got "
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must have V >= 1 and D >= 1, got {list(weight.shape)}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have the leading shape of hidden {list(hidden.shape[:-1])}, got "
            f"{list(target.shape)}; it is already shifted: one class for each hidden row"
        )
    if bias is not None:
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias must have the dtype of weight {weight.dtype}, got {bias.dtype}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    problem = head.problem()
    if problem is not None:
        raise ValueError(problem)


def check_per_token(named: Sequence[tuple[str, Tensor | None]], target: Tensor) -> None:
    """Raise unless every tensor given is floating point and has the shape of target."""
    for name, value in named:
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
        if value.shape != target.shape:
            raise ValueError(
                f"{name} must have the shape of target {list(target.shape)}, "
                f"got {list(value.shape)}; one value for each token"
            )


def check_backend(backend: BackendChoice) -> str:
    """The name of the backend as the operator schemas carry it."""
    if isinstance(backend, Backend):
        return str(backend.value)
    if backend != "auto":
        raise ValueError(f'backend must be a Backend or "auto", got {backend!r}')
    return backend


def check_target_range(target: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a live CPU target is no class; `target` holds no ignored entry.

    Not for CUDA tensors: reading them would stall the host. There the log-prob becomes NaN.
    """
    if target.device.type != "cpu" or target.numel() == 0:
        return
    low, high = torch.aminmax(target)
    if int(low) < 0 or int(high) >= vocab_size:
        raise ValueError(
            f"target must lie in [0, {vocab_size}) or equal ignore_index, got values from "
            f"{int(low)} to {int(high)}"
        )
