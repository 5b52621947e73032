"""The passes in float64 torch, and blocks to run them on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.native import Logits, Running

EPSILON = 2.0**-23


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block(rows: int, classes: int, seed: int = 0, spread: float = 4.0, gap: int = 0) -> Tensor:
    """A [rows, classes] block of normal values whose rows lie `gap` elements apart."""
    values = torch.randn(rows, classes + gap, generator=seeded(seed)) * spread
    return values[:, :classes]


def linear(x: Tensor) -> Logits:
    return Logits(x, None, 1.0, None)


def logits_of(logits: Logits) -> Tensor:
    """z in float64; without a cap rounded as float32 arithmetic rounds it."""
    scaled = logits.x if logits.bias is None else logits.x + logits.bias
    scaled = scaled * logits.scale
    if logits.cap is None:
        return scaled.double()
    return logits.cap * scaled.double().tanh()


def slope_of(logits: Logits) -> Tensor:
    """dz/dx in float64."""
    scale = torch.tensor(logits.scale).double()
    if logits.cap is None:
        return scale.expand_as(logits.x)
    scaled = logits.x if logits.bias is None else logits.x + logits.bias
    return scale * logits.cap / (scaled * logits.scale).double().cosh().square()


def fresh(rows: int, id_count: int, has_moment: bool = True) -> Running:
    return Running(
        torch.full((rows,), -torch.inf),
        torch.zeros(rows, dtype=torch.float64),
        torch.zeros(rows, dtype=torch.float64) if has_moment else None,
        torch.full((rows, id_count), torch.nan),
    )


def ids_of(rows: int, classes: int, count: int, seed: int = 0) -> Tensor:
    """`count` distinct classes for each row, ascending."""
    order = torch.rand(rows, classes, generator=seeded(seed)).argsort(1)
    return order[:, :count].sort(1).values.contiguous()


class Statistics(NamedTuple):
    """The statistics of rows in float64."""

    maximum: Tensor
    total: Tensor
    moment: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Statistics:
        maximum = z.amax(1)
        shifted = z - maximum.where(maximum.isfinite(), 0.0)[:, None]
        e = shifted.exp()
        return cls(maximum, e.sum(1), (e * shifted.clamp(min=-1000.0)).sum(1))
