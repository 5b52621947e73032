"""A vocabulary sharded over ranks: the combination of (max, sum, target logit), 3 floats a row.

Shards are contiguous, in rank order, and may differ in size. hidden and target are the same on
every rank; each rank gets the full d_hidden and the d_weight of its shard.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)


class VocabShard(NamedTuple):
    """This rank's part of the classes; `group` is None where the vocabulary is not sharded."""

    offset: int  # global class of the first local row
    classes: int  # of all ranks
    largest: int  # classes of the largest shard: every rank cuts its rows for that one
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight: Tensor, group_name: str) -> "VocabShard":
        """The shard that `weight` [V_local, D] is of the group of that name ("": not sharded).

        With a group the sizes are exchanged, which waits for the device.
        """
        size = weight.shape[0]
        if not group_name:
            return cls(0, size, size, None)
        # Operator schemas carry names; torch has no public way from a name back to its group.
        group = _resolve_process_group(group_name)  # type: ignore[arg-type]
        mine = torch.tensor([size], device=weight.device)
        sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, mine, group)
        counts = [int(x) for x in torch.cat(sizes).tolist()]
        rank = dist.get_rank(group)
        return cls(sum(counts[:rank]), sum(counts), max(counts), group)

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


def local_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab_group: ProcessGroup | None,
    prefix: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """(hidden, weight, bias) as local tensors, and the name of the group that shards the classes.

    A DTensor weight must be sharded on dim 0 of a one-dimensional mesh. Whether hidden is the
    same on all ranks cannot be seen in a plain tensor, and FSDP2 shards its parameters on dim 0,
    too, with other tokens on every rank: so either hidden is a replicated DTensor, or vocab_group
    says so.
    """
    name = "" if vocab_group is None else str(vocab_group.group_name)
    plain = (Tensor, torch.nn.Parameter)
    if type(weight) in plain and type(hidden) in plain:
        _check_classes(weight, vocab_group)
        return hidden, weight, bias, name
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(weight, DTensor):
        if isinstance(hidden, DTensor):
            raise TypeError(
                "hidden is a DTensor, weight is not; use hidden.to_local() or make weight a "
                "DTensor that is sharded on dim 0 of the same mesh"
            )
        return hidden, weight, bias, name
    if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(
            f"a DTensor {prefix}weight must be sharded on dim 0 of a one-dimensional mesh, got "
            f"placements {weight.placements} on a mesh of shape "
            f"{tuple(weight.device_mesh.shape)}; use .to_local() of a replicated one and of "
            "hidden, or .full_tensor()"
        )
    group = weight.device_mesh.get_group()
    _check_classes(weight, group)
    if isinstance(hidden, DTensor):
        if hidden.device_mesh != weight.device_mesh or hidden.placements != (Replicate(),):
            raise ValueError(
                f"{prefix}hidden must be replicated on the mesh of weight, got placements "
                f"{hidden.placements} on {hidden.device_mesh}"
            )
        hidden = hidden.to_local(grad_placements=[Replicate()])
    elif name != str(group.group_name):
        raise ValueError(
            f"{prefix}weight is a DTensor sharded over its vocabulary, {prefix}hidden is a plain "
            "tensor: if it is the same on all ranks (tensor parallel), pass "
            "vocab_group=weight.device_mesh.get_group() to an operator that has it; a parameter "
            "sharded by FSDP2 must be unsharded first: call the operator inside the module's "
            "forward"
        )
    if isinstance(bias, DTensor):
        if bias.placements != (Shard(0),) or bias.device_mesh != weight.device_mesh:
            raise ValueError(f"{prefix}bias must be sharded as weight is, got {bias.placements}")
        bias = bias.to_local()
    return hidden, weight.to_local(), bias, str(group.group_name)


def _check_classes(weight: Tensor, group: ProcessGroup | None) -> None:
    """Raise if this rank of the group, or for a DTensor any rank of it, would hold no class."""
    if group is None:
        return
    ranks, local = dist.get_world_size(group), 1
    # Shard(0) cuts as torch.chunk does: all shards but the last ones are full. Asking the whole
    # shape makes all ranks raise, where else one would leave the others waiting for it.
    if type(weight) in (Tensor, torch.nn.Parameter):
        local = weight.shape[0]
    elif -(-weight.shape[0] // ranks) * (ranks - 1) >= weight.shape[0]:
        local = 0
    if weight.ndim == 2 and local == 0:
        raise ValueError(
            f"weight {list(weight.shape)} is sharded over {ranks} ranks, which needs at least one "
            "class on every rank; use fewer ranks or shard it less unevenly"
        )
