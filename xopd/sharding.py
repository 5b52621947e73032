"""FSDP2 as transformers applies it while it loads, and what a sharded model needs around it.

Each rank reads its own shard of each weight, so no rank ever holds a whole copy, whatever the
family: dense or mixture of experts. transformers' plan of a family says which modules are gathered
on their own: layers and the embedding, and here lm_head; what it does not name, of an Omni thinker
most of the towers, belongs to the root and stays gathered for the whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from xopd.errors import UserError
from xopd.ranks import CPU, World
from xopd.sections import Dtype, ShardingConfig

# Which modules are gathered on their own can be said since a release between 5.19 and 5.23.
HAS_PLAN = "fsdp_plan" in DistributedConfig.__dataclass_fields__


class ShardingError(UserError):
    """A way to shard that this machine does not have."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's weights go when it is loaded: whole on one device, or sharded over ranks."""

    device: torch.device = CPU
    distributed: DistributedConfig | None = None
    is_vocab_parallel: bool = False  # lm_head's weight is not gathered for loss and scores

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` takes; a sharded model is placed while it is read."""
        return {"distributed_config": self.distributed} if self.distributed else {}

    def put(self, model: PreTrainedModel) -> None:
        """Move a model that is whole; a sharded one is where it belongs."""
        if self.distributed is None:
            model.to(self.device)


def placement(world: World, dtype: Dtype, config: ShardingConfig) -> Placement:
    """Each rank's shards of every weight; on its device for a single rank."""
    if config.cpu_offload and world.device.type == "cpu":
        raise ShardingError(
            "sharding.cpu_offload is true, but this run computes in host memory: set it to false"
        )
    if world.size == 1:
        if config.cpu_offload:
            raise ShardingError(
                "sharding.cpu_offload is true, but there is one rank and nothing is sharded: start "
                "several with torchrun, or set it to false"
            )
        return Placement(world.device)
    is_parallel = config.vocab_parallel_head
    plan: dict[str, Any] = {}
    if HAS_PLAN:
        # On its own: else the root gathers it for the whole of a pass. Vocabulary-parallel it is
        # gathered for evaluations alone, and not together with the norm before it.
        style = "free_full_weight" if is_parallel else "keep_full_weight"
        plan = {"fsdp_plan": {"lm_head": style}}
    elif is_parallel:
        raise ShardingError(
            "sharding.vocab_parallel_head needs a transformers whose DistributedConfig has "
            f"fsdp_plan; transformers {transformers.__version__} has none: install a newer one"
        )
    return Placement(
        world.device,
        DistributedConfig(
            fsdp_size=world.size,
            fsdp_cpu_offload=config.cpu_offload,
            fsdp_mixed_precision=dtype is Dtype.BF16,
            **plan,
        ),
        is_parallel,
    )


def compute_device(model: nn.Module) -> torch.device:
    """Where a model computes; its weights may rest in host memory."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def settle(model: PreTrainedModel, *, recompute: bool) -> None:
    """Make a loaded model ready, on all ranks together, once what is trained has been decided.

    recompute: keep no activations inside a layer; the backward pass works them out again. FSDP2
    finds its root at the first forward pass. One pass over one token here lets parts run alone
    later: the embedding before the language model, the audio tower before both.
    """
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if is_sharded(model):
        token = torch.zeros(1, 1, dtype=torch.long, device=compute_device(model))
        with torch.no_grad():
            model(input_ids=token, use_cache=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds its parameters."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass gathered and kept for a backward pass that may not come.

    Until then the model's parameters are those whole tensors, and not the shards that the optimizer
    and a checkpoint know. No communication.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the weights of those parts, and what the root itself holds, are whole.

    All ranks enter and leave it together; inside, each may run the parts as often as it wants.
    """
    held = [model, *(module for part in parts for module in part.modules())]
    sharded = [module for module in dict.fromkeys(held) if isinstance(module, FSDPModule)]
    for module in sharded:
        # Else the first pass would release them, and the second would wait for all ranks.
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
