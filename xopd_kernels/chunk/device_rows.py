"""The rows of a call as device tensors: which are live, and what is known of each.

Row order: live rows first (a stable sort on the device). Their number stays on the device: every
kernel reads it and its programs beyond it return at once, so ignored rows cost neither
arithmetic nor a host synchronisation. Rows without a gradient are left out in the same way.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class DeviceRows(NamedTuple):
    """The live rows first, in their order; how many there are stays on the device."""

    order: Tensor  # [N] int64
    counts: Tensor  # [chunks] int32: live rows of each chunk
    chunk: int  # rows of a chunk

    @classmethod
    def of(cls, is_live: Tensor, chunk: int) -> "DeviceRows":
        order = live_first(is_live)
        begins = torch.arange(0, len(is_live), chunk, device=is_live.device)
        counts = (is_live.sum() - begins).clamp(0, chunk).to(torch.int32)
        return cls(order, counts, chunk)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's rows and the device tensor that holds its live count."""
        for index in range(len(self.counts)):
            begin = index * self.chunk
            yield slice(begin, min(begin + self.chunk, len(self.order))), self.counts[index]

    def take(self, values: Tensor) -> Tensor:
        """`values` [N, ...] in the order of the live rows."""
        return values.index_select(0, self.order)

    def spread(self, values: Tensor) -> Tensor:
        """`values` [N, ...] back in the order of the input."""
        return torch.empty_like(values).index_copy_(0, self.order, values)


def live_first(is_live: Tensor) -> Tensor:
    """[N] int64: the rows that are live, then the others, each in their order."""
    return torch.sort(is_live.logical_not().to(torch.int8), stable=True).indices


class Alive(NamedTuple):
    """The rows of a chunk that have a gradient."""

    rows: (
        Tensor | None
    )  # [chunk] int64, the first `live_count` of them; None: the first of the chunk
    live_count: Tensor  # [] int32

    @classmethod
    def of(cls, coefficient: Tensor) -> "Alive":
        """Those whose `coefficient` [chunk] is not 0."""
        is_alive = coefficient != 0
        return cls(live_first(is_alive), is_alive.sum().to(torch.int32))


class RowStatistics(NamedTuple):
    """Row statistics [N] fp32 in live order; dead rows are 0."""

    logprob: Tensor
    lse: Tensor
    maximum: Tensor
    total: Tensor  # sum of exp(logit - maximum)
    entropy: Tensor | None

    @classmethod
    def zeros(cls, like: Tensor, has_entropy: bool) -> "RowStatistics":
        """Zeros [N] of the dtype and device of `like` [N]."""
        logprob, lse, maximum, total, *entropy = like.new_zeros(4 + has_entropy, len(like))
        return cls(logprob, lse, maximum, total, entropy[0] if has_entropy else None)

    def part(self, rows: slice) -> "RowStatistics":
        """The fields of these rows."""
        entropy = None if self.entropy is None else self.entropy[rows]
        return RowStatistics(
            self.logprob[rows], self.lse[rows], self.maximum[rows], self.total[rows], entropy
        )


class RowGradients(NamedTuple):
    """Gradients with respect to row statistics: [N] fp32 in live order, None if absent."""

    logprob: Tensor
    lse: Tensor | None
    entropy: Tensor | None

    def part(self, rows: slice) -> "RowGradients":
        """The fields of these rows."""
        lse, entropy = (None if x is None else x[rows] for x in self[1:])
        return RowGradients(self.logprob[rows], lse, entropy)
