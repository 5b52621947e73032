"""Checks shared by the operators: each error names the argument, what it got, and the remedy.

Only metadata is read here, so the checks cost no device synchronisation and trace under
torch.compile. Values of `target` are checked inside the operators (see `check_target_range`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xopd_kernels.backend import Backend, BackendChoice
from xopd_kernels.records import Sparsity, Transform

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# 1 - beta is rounded to fp32; nearer to 1 little of it would be left.
_LEAST_BETA = 1e-6


def check_tensors(
    required: Sequence[tuple[str, Tensor]], optional: Sequence[tuple[str, Tensor | None]]
) -> None:
    """Raise unless the values are tensors on the device of the first; optional ones may be None."""
    device: torch.device | None = None
    given = [(name, value) for name, value in optional if value is not None]
    for name, value in (*required, *given):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise TypeError(f"{name} must be a dense tensor, got {kind}; use .to_dense() or pad it")
        device = value.device if device is None else device
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, {required[0][0]} on {device}; move it")


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, prefix: str = ""
) -> None:
    """Raise TypeError/ValueError unless hidden [..., D], weight [V, D] and bias [V] fit together.

    `prefix` stands before their names among the arguments of the caller ("teacher_").
    """
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"{prefix}hidden must be bf16, fp16, fp32 or fp64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{prefix}weight must have the dtype of {prefix}hidden ({hidden.dtype}), got "
            f"{weight.dtype}; cast one of them or use torch.autocast"
        )
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{prefix}hidden must be [N, D], or with more leading dimensions, and {prefix}weight "
            f"[V, D] with one D, got "
            f"{prefix}hidden {list(hidden.shape)} and {prefix}weight {list(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{prefix}weight must have V >= 1 and D >= 1, got {list(weight.shape)}")
    if bias is not None:
        if bias.dtype != weight.dtype:
            raise TypeError(
                f"{prefix}bias must have the dtype of {prefix}weight {weight.dtype}, "
                f"got {bias.dtype}; use {prefix}bias.to({prefix}weight.dtype)"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    check_number("temperature", transform.temperature)
    check_number(f"{prefix}logit_scale", transform.logit_scale)
    if transform.softcap is not None:
        check_number(f"{prefix}softcap", transform.softcap)
    problem = transform.problem(prefix)
    if problem is not None:
        raise ValueError(problem)


def check_target(target: Tensor, hidden: Tensor) -> None:
    """Raise unless target is int64 and has the leading shape of hidden [..., D]."""
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; use target.long()")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have the leading shape of hidden {list(hidden.shape[:-1])}, got "
            f"{list(target.shape)}; it is already shifted: one class for each hidden row"
        )


def check_budget(memory_budget_bytes: int | None) -> None:
    """Raise unless the budget is None or a positive int; what it must hold is checked later."""
    budget = memory_budget_bytes
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int):
        kind = type(budget).__name__
        raise TypeError(
            f"memory_budget_bytes must be None or an int of bytes, got {kind}: {budget!r}; "
            "64 MB are 64_000_000"
        )
    if not 0 < budget < 2**62:
        raise ValueError(f"memory_budget_bytes must be > 0 and < 2**62, got {budget}")


def check_number(name: str, value: float) -> None:
    """Raise TypeError unless `value` is a Python number, ValueError unless it fits a float."""
    if isinstance(value, bool) or not isinstance(
        value, int | float | torch.SymFloat | torch.SymInt
    ):
        hint = f"; use float({name})" if hasattr(value, "item") else ""
        raise TypeError(
            f"{name} must be a number of Python, got {type(value).__name__}: {value!r}{hint}"
        )
    if isinstance(value, int):
        try:
            float(value)
        except OverflowError:
            bits = value.bit_length()
            raise ValueError(f"{name} must fit a float, got an int of {bits} bits") from None


def check_index(ignore_index: int) -> None:
    """Raise unless ignore_index is an int64."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        kind = type(ignore_index).__name__
        raise TypeError(f"ignore_index must be an int, got {kind}: {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, got {ignore_index}")


def check_sparsity(
    gradient: str,
    max_gradient_error: float | None,
    gradient_seed: int | None = None,
    modes: tuple[str, ...] = ("exact", "sparse"),
    vocab_group: str = "",
) -> Sparsity | None:
    """What a call may leave out of its gradient, None for "exact"; raises unless it is clear."""
    if gradient not in modes:
        names = " or ".join(f'"{mode}"' for mode in modes)
        hint = "; linear_policy_loss alone has it" if gradient == "unbiased" else ""
        raise ValueError(f"gradient must be {names}, got {gradient!r}{hint}")
    if gradient == "unbiased" and gradient_seed is None:
        raise ValueError(
            'gradient_seed must be an int with gradient="unbiased", got None; pass another one for '
            "each step, for example the number of the step"
        )
    if gradient != "unbiased" and gradient_seed is not None:
        raise ValueError(
            f'gradient_seed must be left out with gradient="{gradient}", got {gradient_seed!r}: '
            'only "unbiased" draws'
        )
    if gradient == "exact":
        if max_gradient_error is not None:
            raise ValueError(
                f'max_gradient_error must be None with gradient="exact", got '
                f'{max_gradient_error!r}; it bounds what gradient="sparse" leaves out'
            )
        return None
    if max_gradient_error is None:
        raise ValueError(
            f'max_gradient_error must be given with gradient="{gradient}": the part of the '
            "gradient of the logits that may be left out, for example 0.01"
        )
    check_number("max_gradient_error", max_gradient_error)
    if not 0.0 <= max_gradient_error < math.inf:
        raise ValueError(f"max_gradient_error must be finite and >= 0, got {max_gradient_error}")
    if vocab_group:
        raise ValueError(
            f'gradient="{gradient}" takes a whole weight, got one that is sharded over its '
            'vocabulary (vocab_group); use gradient="exact"'
        )
    if gradient_seed is not None:
        if isinstance(gradient_seed, bool) or not isinstance(gradient_seed, int):
            kind = type(gradient_seed).__name__
            hint = "; use int(gradient_seed)" if hasattr(gradient_seed, "item") else ""
            raise TypeError(f"gradient_seed must be an int, got {kind}: {gradient_seed!r}{hint}")
        if not -(2**63) <= gradient_seed < 2**63:
            raise ValueError(f"gradient_seed must fit 64 bits, got {gradient_seed}")
    return Sparsity(gradient, float(max_gradient_error), gradient_seed or 0)


def check_group(vocab_group: ProcessGroup | None) -> None:
    """Raise TypeError unless vocab_group is a process group or None."""
    if vocab_group is not None and not isinstance(vocab_group, ProcessGroup):
        kind = type(vocab_group).__name__
        raise TypeError(
            f"vocab_group must be a torch.distributed.ProcessGroup or None, got {kind}: "
            f"{vocab_group!r}"
        )


def check_per_token(named: Sequence[tuple[str, Tensor | None]], shape: torch.Size) -> None:
    """Raise unless every tensor given is floating point and of `shape`, one value a token."""
    for name, value in named:
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}; use .float()")
        if value.shape != shape:
            raise ValueError(
                f"{name} must have one value for each token, shape {list(shape)}, "
                f"got {list(value.shape)}"
            )


def check_backend(backend: BackendChoice) -> str:
    """The name of the backend as the operator schemas carry it."""
    if isinstance(backend, Backend):
        return str(backend.value)
    if backend != "auto":
        raise ValueError(
            f'backend must be "auto", Backend.NATIVE, Backend.REFERENCE or Backend.TRITON, got '
            f"{backend!r}"
        )
    return backend


def check_clamp(advantage_clamp: float) -> None:
    """Raise unless the bound of the advantage is > 0."""
    check_number("advantage_clamp", advantage_clamp)
    if not advantage_clamp > 0:  # a NaN fails, too
        raise ValueError(
            f"advantage_clamp must be > 0, got {advantage_clamp}; use math.inf for no clamp"
        )


def check_beta(beta: float) -> None:
    """Raise unless beta names a divergence."""
    check_number("beta", beta)
    meaning = "0 = KL(teacher || student), 1 = KL(student || teacher), between: Jensen-Shannon"
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}; {meaning}")
    if beta not in (0.0, 1.0) and not _LEAST_BETA <= beta <= 1.0 - _LEAST_BETA:
        raise ValueError(
            f"beta must be 0, 1 or at least {_LEAST_BETA:g} from both, got {beta}: less of one "
            f"model in the mixture is lost in fp32; {meaning}"
        )


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


_MAX_LOG_MASS = 0.02  # log-probs rounded to bf16 may hold a little more than 1


def check_top_k(teacher_ids: Tensor, teacher_logprob: Tensor, vocab_size: int) -> None:
    """Raise ValueError if CPU ids [n, K] of live rows are no classes or repeat in a row.

    Or if their log-probs hold more mass than 1, as probabilities or negated log-probs do.
    """
    if teacher_ids.device.type != "cpu" or teacher_ids.numel() == 0:
        return
    ordered = teacher_ids.sort(1).values
    low, high = int(ordered[:, 0].min()), int(ordered[:, -1].max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"teacher_ids must lie in [0, {vocab_size}), got values from {low} to {high}; give "
            "tokens without ids the token_weight 0"
        )
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("teacher_ids must be distinct in a row, got a repeated id")
    mass = teacher_logprob.double().logsumexp(1).max()
    if mass > _MAX_LOG_MASS:
        raise ValueError(
            f"teacher_logprob must be log-probs of the whole distribution; a row's hold a mass of "
            f"{mass.exp().item():.4g} > 1"
        )
