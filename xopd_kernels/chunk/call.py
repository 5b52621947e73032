"""One call of an operator, as the backends see it: the head, its shard, and how rows are cut."""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.backend import Backend
from xopd_kernels.memory import Blocks, Panel, chunk_rows
from xopd_kernels.records import Head, Wanted
from xopd_kernels.shard import VocabShard
from xopd_kernels.workload import Workload


class Call(NamedTuple):
    """What every backend function needs besides its tensors."""

    head: Head
    shard: VocabShard
    work: Workload
    step: int  # rows of a chunk
    blocks: Blocks  # of REFERENCE
    panel: Panel  # of NATIVE

    @classmethod
    def of(
        cls,
        head: Head,
        work: Workload,
        backend: Backend,
        budget: int | None,
        shard: VocabShard | None = None,
    ) -> "Call":
        """Cut the rows within the budget; ValueError if it is too small.

        `shard`: of another call with the same head; None: found out, by asking the other ranks.
        """
        if shard is None:
            shard = VocabShard.of(head.weight, head.vocab_group)
        # Chunks for the largest shard: every rank of a group must cut the rows alike, however
        # uneven the shards, or their collectives would not meet.
        work = work._replace(vocab_size=shard.largest)
        step = chunk_rows(work, backend, budget)
        blocks = Blocks.of(work, budget) if backend is Backend.REFERENCE else Blocks(0, 0, 0)
        panel = Panel.of(work, budget) if backend is Backend.NATIVE else Panel(0, 0, 0, 0, 0)
        return cls(head, shard, work, step, blocks, panel)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return self.work.arithmetic

    @property
    def held_dtype(self) -> torch.dtype:
        """Of the gradients that are handed out: fp16 ones would underflow before a factor comes."""
        return torch.float32 if self.work.holds_fp32 else self.work.dtype

    @property
    def wanted(self) -> Wanted:
        """The gradients that somebody reads."""
        return self.work.wanted

    def empty(self, rows: int) -> Tensor:
        """An uninitialised [rows, V] buffer of logits."""
        shape = (rows, len(self.head.weight))
        return torch.empty(shape, dtype=self.dtype, device=self.head.weight.device)
