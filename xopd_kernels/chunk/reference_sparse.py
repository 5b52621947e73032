"""Lists of classes and their sparse gradients in eager torch: Backend.REFERENCE.

The gradient keeps its dense form: what is left out is set to 0. Only results are sparse here, not
the work; the backends that save the GEMMs are held against this one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.sparse import Choice, RowMass, raised_mass, row_uniform


class Lists(NamedTuple):
    """The likeliest classes of rows, beside those that are kept always; probabilities as masses."""

    ids: Tensor  # [rows, K] int64, ascending
    p: Tensor  # [rows, K] dtype of the arithmetic
    outside: Tensor  # [rows] fp64 mass of all other classes, not below the true one
    rest: Tensor  # [rows] fp64 mass of all classes but those that are kept always

    @classmethod
    def of(cls, e: Tensor, total: Tensor, kept: Tensor, length: int, step: int) -> "Lists":
        """From e = exp(logit - maximum) [rows, V], whose mass is e / `total` [rows].

        `kept` [rows, k] int64 are the classes kept always. The list has the `length` classes of
        largest e among the others, or all of them; of equal ones those of lower number. Works on
        `step` rows at a time.
        """
        length = min(length, e.shape[1] - kept.shape[1])
        ids = torch.empty(len(e), length, dtype=torch.int64, device=e.device)
        p, outside = e.new_empty(len(e), length), e.new_empty(len(e))
        for begin in range(0, len(e), step):
            part = slice(begin, begin + step)
            block = e[part].nan_to_num(0.0).scatter_(1, kept[part], -1.0)
            if length:
                ids[part] = _largest(block, length)
            p[part] = block.gather(1, ids[part])
            outside[part] = block.scatter_(1, ids[part], 0.0).scatter_(1, kept[part], 0.0).sum(1)
        p.div_(total[:, None])
        outside = outside.double() / total
        return cls(ids, p, raised_mass(outside, outside, e.dtype), outside + p.sum(1))

    def mass(self, scale: Tensor, norm: Tensor) -> RowMass:
        """What the rule reads, with the factors and norms [rows]."""
        return RowMass(scale, norm, self.rest, self.outside, self.p)


def _largest(values: Tensor, count: int) -> Tensor:
    """[rows, count] columns of the largest `values` [rows, V], ascending; of equal ones the first.

    torch.topk does not say which of equal ones it takes.
    """
    least = values.topk(count, dim=1).values[:, -1:]
    chosen, ties = values > least, values == least
    open_places = count - chosen.sum(1, keepdim=True)
    chosen |= ties & (ties.cumsum(1, dtype=torch.int32) <= open_places)
    return chosen.nonzero()[:, 1].view(len(values), count)


def leave_out_(
    e: Tensor, kept: Tensor, lists: Lists, mass: RowMass, choice: Choice, step: int
) -> None:
    """Set the entries of the sparse rows of e [rows, V] to 0 that the rule leaves out."""
    spared = choice.is_spared(mass)
    rows = choice.is_sparse.nonzero().squeeze(1)
    for begin in range(0, len(rows), step):
        row = rows[begin : begin + step, None]
        ids = lists.ids[row[:, 0]]
        at_kept = e[row, kept[row[:, 0]]]
        at_ids = e[row, ids].masked_fill_(spared[row[:, 0]], 0.0)
        e.index_fill_(0, row[:, 0], 0.0)
        e[row, ids] = at_ids
        e[row, kept[row[:, 0]]] = at_kept


class Drawn(NamedTuple):
    """A class for all that are left out of a row, drawn by their masses."""

    rows: Tensor  # [n] int64 of the chunk: sparse ones that lack something
    ids: Tensor  # [n] int64
    value: Tensor  # [n] sum of e over the classes that are left out

    @classmethod
    def of(
        cls, e: Tensor, kept: Tensor, lists: Lists, spared: Tensor, rows: Tensor, uniform: Tensor
    ) -> "Drawn":
        """For the `rows` [n] of e [rows, V], before anything is left out, by `uniform` [n]."""
        left = e[rows].scatter_(1, kept[rows], 0.0)
        listed = left.gather(1, lists.ids[rows]).masked_fill_(~spared[rows], 0.0)
        running = left.scatter_(1, lists.ids[rows], listed).cumsum(1, dtype=torch.float64)
        total = running[:, -1]
        # A class without mass leaves the running sum as it is, and is never the first above.
        point = torch.minimum(total * uniform, torch.nextafter(total, torch.zeros_like(total)))
        ids = (running <= point[:, None]).sum(1).clamp(max=e.shape[1] - 1)
        is_any = total > 0
        return cls(rows[is_any], ids[is_any], total[is_any].to(e.dtype))


def draw(
    e: Tensor,
    kept: Tensor,
    lists: Lists,
    mass: RowMass,
    choice: Choice,
    numbers: tuple[int, Tensor],
    step: int,
) -> Drawn:
    """A class for each sparse row; `numbers`: the seed, and the rows' numbers [rows] among all."""
    spared, rows = choice.is_spared(mass), choice.is_sparse.nonzero().squeeze(1)
    uniform = row_uniform(numbers[0], numbers[1])
    parts = [
        Drawn.of(e, kept, lists, spared, row, uniform[row])
        for begin in range(0, len(rows), step)
        for row in (rows[begin : begin + step],)
    ]
    nothing = Drawn(rows[:0], rows[:0], e.new_empty(0))
    return Drawn(*(torch.cat(x) for x in zip(nothing, *parts, strict=True)))
