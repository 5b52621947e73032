"""AdamW over the trained parameters (torch's own), its state by name, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from xopd.sections import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW with the configured moments; the loop sets the learning rate each step."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Both moments of each parameter, named `exp_avg.<name>` and `exp_avg_sq.<name>`.

    Sharded as the parameter is. Where no update was made yet they are set to zero, as AdamW's own
    first step does, so that a checkpoint can be loaded into them.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        found |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
    return found


def updates_made(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]
) -> dict[str, int]:
    """Updates behind the moments of each parameter; fewer for one that had no gradient at times."""
    states = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return {name: int(state["step"]) if state else 0 for name, state in states.items()}


def set_updates_made(
    optimizer: torch.optim.AdamW,
    parameters: Mapping[str, nn.Parameter],
    counts: Mapping[str, int],
) -> None:
    """Continue after that many updates, with the moments as they are."""
    for name, parameter in parameters.items():
        step = torch.tensor(float(counts[name]), dtype=torch.float32)
        optimizer.state[parameter]["step"] = step


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """rate * min(1, (step+1)/warmup) * (1 + cos(pi step/steps))/2 of 0-based ``step``."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = 0.5 * (1.0 + math.cos(math.pi * step / steps)) if config.cosine_decay else 1.0
    return config.learning_rate * warm * decay
