"""AdamW over the trained parameters and its learning-rate schedule (torch's own, foreach)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from xopd.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW with the configured moments; the loop sets the learning rate each step."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """rate * min(1, (step+1)/warmup) * (1 + cos(pi step/steps))/2 of 0-based ``step``."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = 0.5 * (1.0 + math.cos(math.pi * step / steps)) if config.cosine_decay else 1.0
    return config.learning_rate * warm * decay
