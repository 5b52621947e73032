"""Run a fused op inside ``lm_head.forward``: hidden states in, per-token results out, no logits.

The model calls its lm_head on the hidden states of the rows it was given. Replacing that one call,
and only while a ``fused_head`` block is open, works for every speech-LLM family without a patched
forward, and under FSDP2 the module's own hooks unshard the weight and reduce its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

Result = TypeVar("Result")


@contextmanager
def fused_head(
    lm_head: nn.Linear, op: Callable[[Tensor, Tensor, Tensor | None], Result]
) -> Iterator[None]:
    """Within the block ``lm_head(hidden)`` returns ``op(hidden, weight, bias)``.

    The model hands that result back as its ``logits``. Blocks do not nest.
    """
    if "forward" in vars(lm_head):
        raise RuntimeError("lm_head.forward is already replaced; fused_head blocks do not nest.")

    def forward(hidden: Tensor) -> Result:
        return op(hidden, lm_head.weight, lm_head.bias)

    lm_head.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del lm_head.forward
