"""The error budget: error against fp64 <= 1.05 * that of plain torch in the same dtype + rounding.

A norm over thousands of elements averages the luck of single roundings; a norm over three does
not: plain torch may happen to be exact there. `ErrorPool` therefore asks the same of many small
cases together, each in units of its own conditioning.
"""

import math

import torch
from torch import Tensor

BUDGET_FACTOR = 1.05  # error against fp64 <= this * the error of plain torch + rounding band


def assert_within_budget(
    name: str, actual: Tensor, baseline: Tensor, oracle: Tensor, conditioning: float = 0.0
) -> None:
    """AssertionError unless the error of `actual` is within the budget.

    ``|actual - oracle| <= 1.05 * |baseline - oracle| + band`` in the 2-norm; the band is one
    rounding of every element of the result to the dtype of `actual`, and `conditioning`: what
    one rounding of the logits does to the result, for cases too small to average over.
    """
    truth = oracle.detach().double()
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, oracle {list(truth.shape)}")
    error = distance(actual, truth)
    allowed = BUDGET_FACTOR * distance(baseline, truth)
    allowed += torch.finfo(actual.dtype).eps * truth.norm().item() + conditioning
    if not error <= allowed:  # a NaN error fails, too
        raise AssertionError(f"{name}: error {error:.3e} against fp64, budget {allowed:.3e}")


class ErrorPool:
    """Many small cases as one vector, each in units of its conditioning, under the same budget."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = {}  # of error, error of plain torch, band

    def add(
        self, name: str, actual: Tensor, baseline: Tensor, oracle: Tensor, conditioning: float
    ) -> None:
        """Add a case; its unit is one rounding of the result and of the logits."""
        truth = oracle.detach().double()
        dtype = torch.finfo(actual.dtype)
        band = dtype.eps * truth.norm().item()
        unit = conditioning + band + dtype.tiny
        # A baseline that is off by more than the unit would hide the other cases.
        plain = min(distance(baseline, truth) / unit, 1.0)
        sums = self._squares.setdefault(name, [0.0, 0.0, 0.0])
        for i, value in enumerate((distance(actual, truth) / unit, plain, band / unit)):
            sums[i] += value**2

    def check(self) -> None:
        """AssertionError unless every result is within the budget."""
        for name, sums in self._squares.items():
            error, plain, band = (math.sqrt(x) for x in sums)
            allowed = BUDGET_FACTOR * plain + band
            if not error <= allowed:
                raise AssertionError(f"{name}: pooled error {error:.4g}, budget {allowed:.4g}")


def distance(value: Tensor, truth: Tensor) -> float:
    """2-norm of the error of `value`."""
    norm: float = (value.detach().double() - truth).norm().item()
    return norm


def split_non_finite(name: str, actual: Tensor, oracle: Tensor) -> Tensor:
    """Mask of the elements where both are finite; AssertionError if the others are not the same."""
    finite = oracle.detach().isfinite()
    rest, expected = actual.detach()[~finite].double(), oracle.detach()[~finite].double()
    same = torch.equal(rest.nan_to_num(0.0, 1.0, -1.0), expected.nan_to_num(0.0, 1.0, -1.0))
    if not (same and actual.detach()[finite].isfinite().all()):
        raise AssertionError(f"{name}: not finite where the oracle is, or another infinity")
    return finite
