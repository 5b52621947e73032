"""A vocabulary sharded over ranks: the combination of (max, sum, target logit), 3 floats a row.

Shards are contiguous, in rank order, and may differ in size. hidden and target are the same on
every rank; each rank gets the full d_hidden and the d_weight of its shard.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)


class VocabShard(NamedTuple):
    """This rank's part of the classes; `group` is None where the vocabulary is not sharded."""

    offset: Tensor  # [] int64, global class of the first local row (a tensor: no host sync)
    vocab_size: Tensor  # [] int64, classes of all ranks
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight: Tensor, group_name: str) -> "VocabShard":
        """The shard that `weight` [V_local, D] is of the group of that name ("": not sharded)."""
        size = torch.tensor(weight.shape[0], device=weight.device)
        if not group_name:
            return cls(torch.zeros_like(size), size, None)
        # Operator schemas carry names; torch has no public way from a name back to its group.
        group = _resolve_process_group(group_name)  # type: ignore[arg-type]
        sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, size, group)
        ends = torch.stack(sizes).cumsum(0)
        return cls(ends[dist.get_rank(group)] - size, ends[-1], group)

    def maximum_(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.SUM, self.group)
        return values
