"""The ranks of a run: which one this process is, and what they tell each other.

`torchrun` starts one process for each rank and says in the environment which is which. Without it a
run is one process with no process group, and every exchange below is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from xopd.errors import UserError

T = TypeVar("T")
CPU = torch.device("cpu")


class WorldError(UserError):
    """Ranks that cannot be joined, and why."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of a run. Every method but the properties is called by all ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in rank order, on every rank. Any object that pickles."""
        if self.size == 1:
            return [value]
        found = [value] * self.size  # to be overwritten
        dist.all_gather_object(found, value)
        return found

    def total(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the ranks, in fp64 and in rank order: the same on every rank."""
        columns = zip(*self.gather(list(values)), strict=True)
        return [sum(column) for column in columns]

    def first(self, value: T) -> T:
        """What the first rank says, on every rank: for what could look different to each."""
        return self.gather(value)[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns on the first rank, on every rank; a UserError that it raises too.

        The other ranks wait for it and do not call `work`.
        """
        found = self.together(lambda: [work()] if self.is_first else [])
        return self.first(found)[0]

    def together(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns on this rank; a UserError of one rank ends all of them."""
        found: list[T] = []
        problem: UserError | None = None
        try:
            found.append(work())
        except UserError as error:
            problem = error
        words = self.gather(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, other in enumerate(words):
            if other is not None:
                raise UserError(f"rank {rank}: {other}")
        return found[0]

    def deal(self, count: int, work: Callable[[int], T]) -> list[T]:
        """``[work(0), .., work(count - 1)]`` on every rank, each worked out by one of them.

        A rank that has none left repeats the last one: a sharded model needs all ranks in a pass.
        """

        def share() -> list[tuple[int, T]]:
            found: list[tuple[int, T]] = []
            for start in range(0, count, self.size):
                number = start + self.rank
                answer = work(min(number, count - 1))
                if number < count:
                    found.append((number, answer))
            return found

        mine = self.together(share)
        answered = dict(item for part in self.gather(mine) for item in part)
        return [answered[number] for number in range(count)]

    def any(self, flag: bool) -> bool:
        """Whether a rank says so; a decision that all must take together."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()


ALONE = World()  # one process on the CPU


def is_first_process() -> bool:
    """Whether this process writes what is written once, also before and after the ranks join."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


@contextmanager
def joined(timeout_s: float) -> Iterator[World]:
    """Join the ranks that `torchrun` started, or be the only one; leave them at the end.

    timeout_s: a rank that waits longer for the others raises, where it would hang for ever. A
    process group that the caller has made is used as it is, and stays.
    """
    is_cuda = torch.cuda.is_available()
    if dist.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else CPU
        yield World(dist.get_rank(), dist.get_world_size(), device)
        return
    if not dist.is_torchelastic_launched():
        yield World(device=torch.device("cuda" if is_cuda else "cpu"))
        return
    local = int(os.environ["LOCAL_RANK"])  # set by torchrun, as RANK and WORLD_SIZE are
    if is_cuda and local >= torch.cuda.device_count():
        raise WorldError(
            f"rank {os.environ['RANK']} is process {local} of this machine, which has "
            f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node."
        )
    device = torch.device("cuda", local) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    # Objects travel over gloo on either device: no message of a few bytes waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
