"""Run a fused op in place of lm_head: hidden states in, per-token results out, no logits.

The model calls its lm_head on the hidden states of the rows it was given. Replacing that one call,
and only while a ``fused_head`` block is open, works for every speech-LLM family without a patched
forward, and under FSDP2 the module's own hooks unshard the weight and reduce its gradient.

Vocabulary-parallel, the weight is never gathered: FSDP2 shards it on dim 0, so that a rank's shard
is a block of classes. The hidden states of all ranks come together instead, each rank computes with
its own classes, and the kernels exchange three numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

IGNORE = -100


class Head(NamedTuple):
    """What the hidden states are multiplied with."""

    weight: Tensor  # [V, D], or the rows of this rank's classes
    bias: Tensor | None
    first_class: int = 0
    group: ProcessGroup | None = None  # of ranks that hold the other classes


# A NamedTuple of per-token tensors, and perhaps a scalar loss.
Result = TypeVar("Result", bound=tuple[Any, ...])
HeadOp = Callable[[Tensor, Head, Sequence[Tensor]], Result]


@contextmanager
def fused_head(
    model: PreTrainedModel,
    op: HeadOp[Result],
    values: Sequence[Tensor] = (),
    *,
    is_vocab_parallel: bool = False,
) -> Iterator[None]:
    """Within the block ``lm_head(hidden)`` is ``op(hidden, head, values)``.

    The model hands that result back as its ``logits``. Blocks do not nest. values: [B, T] each,
    what the op needs of every token, the target first. Vocabulary-parallel all ranks run the block
    together, op gets [N, D] and [N] of the tokens of all ranks whose target is not IGNORE, and a
    loss comes back as one part in as many as there are ranks, which add up to it.
    """
    lm_head: nn.Linear = model.get_output_embeddings()
    if "forward" in vars(lm_head) or isinstance(lm_head, _OverRanks):
        raise RuntimeError("lm_head is already replaced; fused_head blocks do not nest.")
    if not is_vocab_parallel:

        def forward(hidden: Tensor) -> Result:
            return op(hidden, Head(lm_head.weight, lm_head.bias), values)

        lm_head.forward = forward  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del lm_head.forward
        return
    path = next(name for name, module in model.named_modules() if module is lm_head)
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    # Another module, not another forward: the hooks of the real one would gather its weight.
    setattr(owner, name, _OverRanks(lm_head, op, values))
    try:
        yield
    finally:
        setattr(owner, name, lm_head)


class _OverRanks(nn.Module):
    """Stands in for an lm_head whose classes are spread over ranks."""

    def __init__(self, lm_head: nn.Linear, op: HeadOp[Any], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._inner = [lm_head]  # in a list: not a submodule, whose parameters would count twice
        self._op, self._values = op, values

    def forward(self, hidden: Tensor) -> tuple[Any, ...]:
        head = _local_head(self._inner[0], hidden)
        if head.group is None:
            raise RuntimeError("a vocabulary-parallel lm_head has a group")
        is_live = self._values[0] != IGNORE
        counts = _gathered_counts(int(is_live.sum()), hidden.device, head.group)
        rows = _GatheredRows.apply(hidden[is_live], counts, head.group)  # type: ignore[no-untyped-call]
        values = [_gathered(value[is_live], counts, head.group) for value in self._values]
        result = self._op(rows, head, values)
        ranks, rank = len(counts), dist.get_rank(head.group)
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

        def back(field: Tensor) -> Tensor:
            if field.ndim == 0:
                return field / ranks
            if field.shape[0] == 0:
                return field  # not asked for
            placed = field.new_zeros(is_live.shape)
            placed[is_live] = field[mine]
            return placed

        found: tuple[Any, ...] = type(result)(*(back(field) for field in result))
        return found


def _local_head(lm_head: nn.Linear, hidden: Tensor) -> Head:
    """This rank's classes, in the precision and on the device of the hidden states."""
    weight, bias = lm_head.weight, lm_head.bias
    if not isinstance(weight, DTensor):
        raise RuntimeError("a vocabulary-parallel lm_head must be sharded by FSDP2")
    group = weight.device_mesh.get_group()
    # Shards are cut as torch.chunk cuts: all but the last ones are full.
    size = -(-weight.shape[0] // dist.get_world_size(group))
    first = min(weight.shape[0], size * dist.get_rank(group))
    local = weight.to_local().to(hidden.device, hidden.dtype)
    local_bias: Tensor | None = bias
    if isinstance(bias, DTensor):
        local_bias = bias.to_local().to(hidden.device, hidden.dtype)
    return Head(local, local_bias, first, group)


def _gathered_counts(count: int, device: torch.device, group: ProcessGroup) -> list[int]:
    mine = torch.tensor([count], device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group)
    return [int(x) for x in torch.cat(found).tolist()]


def _gathered(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Rows of all ranks, in rank order; of unlike number, so they travel padded."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded, group)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


class _GatheredRows(torch.autograd.Function):
    """Rows of all ranks, and back the gradient of this rank's own.

    Each rank's loss is one part in n of the whole, and every rank has the whole gradient of its
    hidden states times that: n times it is the gradient that this rank alone would have.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ctx.ranks = len(counts)
        return _gathered(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.mine] * ctx.ranks, None, None
