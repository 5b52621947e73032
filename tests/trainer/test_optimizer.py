"""The schedule and AdamW's settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from xopd.config import OptimConfig
from xopd.optimizer import build_optimizer, learning_rate


def test_warm_up_then_constant() -> None:
    config = OptimConfig(learning_rate=0.4, warmup_steps=4, cosine_decay=False)
    rates = [learning_rate(step, 100, config) for step in (0, 1, 3, 4, 99)]
    assert rates == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])


def test_cosine_to_zero() -> None:
    config = OptimConfig(learning_rate=0.4, warmup_steps=0)
    assert learning_rate(0, 10, config) == pytest.approx(0.4)
    assert learning_rate(5, 10, config) == pytest.approx(0.2)
    assert learning_rate(9, 10, config) == pytest.approx(0.2 * (1 + math.cos(0.9 * math.pi)))
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > 0  # no step is wasted


def test_the_first_update_is_that_of_adamw_by_hand() -> None:
    config = OptimConfig(learning_rate=0.1, beta1=0.5, beta2=0.75, eps=0.1, weight_decay=0.2)
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer([parameter], config)
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    # Bias correction makes both first moments those of the gradient itself.
    expected = 2.0 * (1 - 0.1 * 0.2) - 0.1 * 3.0 / (3.0 + 0.1)
    assert parameter.item() == pytest.approx(expected, rel=1e-6)
