"""A provider of the sparse study: its gradients, their distance from the exact ones, its lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.sparse_problem import GradientError, Inputs, Truth, gradient_error, kept_entries
from xopd_bench.errors import BenchError
from xopd_bench.record import Line
from xopd_kernels import Backend, linear_policy_loss

_ROUNDING = 1e-6  # of a bound that is handed out in fp32


class Gradients(NamedTuple):
    """What a provider computes."""

    d_hidden: Tensor
    d_weight: Tensor
    dropped_mass: Tensor | None  # [N]
    bound: Tensor | None  # [] gradient_error


def policy_loss(inputs: Inputs, backend: Backend, error: float | None) -> Gradients:
    """Loss and gradients by our operator; error None: exact."""
    hidden, weight, target, teacher_logprob, token_weight = inputs
    if error is None:
        out = linear_policy_loss(
            hidden,
            weight,
            target,
            teacher_logprob=teacher_logprob,
            token_weight=token_weight,
            backend=backend,
        )
        d_hidden, d_weight = torch.autograd.grad(out.loss, (hidden, weight))
        return Gradients(d_hidden, d_weight, None, None)
    sparse = linear_policy_loss(
        hidden,
        weight,
        target,
        teacher_logprob=teacher_logprob,
        token_weight=token_weight,
        gradient="sparse",
        max_gradient_error=error,
        backend=backend,
    )
    d_hidden, d_weight = torch.autograd.grad(sparse.loss, (hidden, weight))
    # The bound stays a tensor while the clock runs: reading it would wait for the device.
    return Gradients(d_hidden, d_weight, sparse.dropped_mass, sparse.gradient_error)


def verified(
    inputs: Inputs, truth: Truth, backend: Backend, thresholds: Mapping[str, float | None]
) -> dict[str, Line]:
    """The first pass of every provider: its lists, and how far its gradients are from exact."""
    lines: dict[str, Line] = {}
    dropped: dict[str, Tensor] = {}
    is_left_out: dict[str, Tensor] = {}
    for name, error in thresholds.items():
        found = policy_loss(inputs, backend, error)
        lines[name] = {
            "d_hidden": _rounded(gradient_error(found.d_hidden, truth.d_hidden)),
            "d_weight": _rounded(gradient_error(found.d_weight, truth.d_weight)),
        }
        if error is not None and found.dropped_mass is not None and found.bound is not None:
            bound = float(found.bound)
            if not bound <= error * (1.0 + _ROUNDING):
                raise BenchError(f"gradient_error {bound} is above max_gradient_error {error}")
            lines[name]["bound"] = bound
            dropped[name] = found.dropped_mass
            is_left_out[name] = ~found.d_hidden.any(1) & (found.dropped_mass > 0)
    kept = kept_entries(inputs, truth.lse, torch.stack(list(dropped.values())))
    for (name, mass), counts in zip(dropped.items(), kept, strict=True):
        lines[name] |= _lists(counts, mass, is_left_out[name])
    return lines


def _lists(kept: Tensor, dropped_mass: Tensor, is_left_out: Tensor) -> Line:
    """What became of the rows [N]: listed, dense, or left out whole."""
    is_dense = dropped_mass == 0
    listed = kept[~(is_dense | is_left_out)].double()
    return {
        "kept_mean": round(float(listed.mean()), 3) if len(listed) else None,
        "kept_max": int(listed.max()) if len(listed) else None,
        "dense_share": round(float(is_dense.double().mean()), 5),
        "left_out_share": round(float(is_left_out.double().mean()), 5),
        "dropped_mass_mean": float(dropped_mass.double().mean()),
        "dropped_mass_max": float(dropped_mass.max()),
    }


def _rounded(found: GradientError) -> dict[str, float]:
    return {"relative": float(f"{found.relative:.6g}"), "cosine": round(found.cosine, 9)}
