"""The GEMMs of Backend.NATIVE, by dtype: the logits of a tile, and its part of both gradients.

bf16 on a processor with bf16 dot products: bf16 factors, fp32 sums and results
(`xopd_kernels.native_matmul`); the gradient by the logits is rounded to bf16 to be a factor.
Everything else: torch's fp32 GEMMs of upcast tiles. One class for each, with the same methods; the
bf16 one has all of sweep one besides, as its statistics come from the registers of the product.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.reference import add_product_
from xopd_kernels.native import SUMMED_ROWS, Rounded, Running
from xopd_kernels.native_matmul import (
    Packed,
    add_product,
    multiplies,
    pack,
    product,
    transposed_product,
)
from xopd_kernels.native_scores import Outputs, Tiles, add_scores, tiles_of_call
from xopd_kernels.records import Head, Wanted
from xopd_kernels.workload import NATIVE_TILE_CLASSES

Write = Callable[[slice, Tensor | Rounded], None]  # (tile, where d_logit [rows, T] of it goes)


def as_factors(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | Packed]:
    """`hidden` [rows, D] as the GEMMs with `weight` read it: for the gradients, for the logits."""
    if multiplies(weight.dtype, weight.shape[1]):
        rows = hidden.contiguous()
        return rows, pack(rows, is_transposed=True)
    rows = hidden.float().contiguous()
    return rows, rows


class Fp32Gemms(NamedTuple):
    """torch's GEMMs in fp32 with the tiles of a weight."""

    weight: Tensor  # [V, D]
    buffer: Tensor | None  # [step, D] fp32; None if the weight is fp32 itself

    def upcast(self, tile: slice) -> Tensor:
        """The weight [T, D] of a tile in fp32, valid until the next one is asked for."""
        weight = self.weight[tile]
        return weight if self.buffer is None else self.buffer[: len(weight)].copy_(weight)

    def logits(self, hidden: Tensor | Packed, tile: slice, out: Tensor) -> Tensor:
        """``out = hidden @ weight[tile].T``, [rows, T] fp32."""
        assert isinstance(hidden, Tensor)
        return torch.mm(hidden, self.upcast(tile).t(), out=out)

    def gradient(self, hidden: Tensor, d_tile: Tensor, step: int, wanted: Wanted) -> "Fp32Gradient":
        """The gradients of `hidden` [rows, D] and of the weight, by tiles of up to `step` classes.

        `d_tile` [step, D] fp32: memory for a tile of d_weight that is rounded.
        """
        del wanted  # d_logit is one tensor, whatever is made of it
        return Fp32Gradient(self, hidden, d_tile, hidden.new_empty(len(hidden) * step))


class Fp32Gradient(NamedTuple):
    """Both GEMMs of the gradients of a chunk, tile by tile."""

    gemms: Fp32Gemms
    hidden: Tensor  # [rows, D] fp32
    d_tile: Tensor
    d_logit: Tensor  # fp32, flat: d(loss)/d(linear output) of a tile

    def _of(self, tile: slice) -> Tensor:
        rows, classes = len(self.hidden), tile.stop - tile.start
        return self.d_logit[: rows * classes].view(rows, classes)

    def fill(self, tile: slice, write: Write) -> None:
        """Have d_logit [rows, T] of a tile written, for `sums` and `add`."""
        write(tile, self._of(tile))

    def sums(self, tile: slice) -> Tensor:
        """Its sums over the rows, [T] fp32."""
        return self._of(tile).sum(0)

    def add(
        self,
        tile: slice,
        d_hidden: Tensor | None,  # [rows, D] fp32
        d_weight: Tensor | None,  # [T, D]; fp32 if it is added to
        is_added: bool,
    ) -> None:
        """``d_hidden += d_logit @ weight[tile]``, ``d_weight = (or +=) d_logit.T @ hidden``."""
        d_logit = self._of(tile)
        if d_hidden is not None:
            add_product_(d_hidden, d_logit, self.gemms.upcast(tile))
        if d_weight is None:
            return
        if is_added:
            d_weight.addmm_(d_logit.t(), self.hidden)
        elif d_weight.dtype == torch.float32:
            torch.mm(d_logit.t(), self.hidden, out=d_weight)
        else:
            d_weight.copy_(torch.mm(d_logit.t(), self.hidden, out=self.d_tile[: len(d_weight)]))


class Bf16Gemms(NamedTuple):
    """bf16 GEMMs with fp32 results with the tiles of a weight."""

    weight: Tensor  # [V, D] bf16
    step: int  # most classes of a tile

    def rows(self, tile: slice) -> Tensor:
        """The weight [T, D] of a tile, with unit inner stride."""
        weight = self.weight[tile]
        return weight if weight.stride(1) == 1 else weight.contiguous()

    def logits(self, hidden: Tensor | Packed, tile: slice, out: Tensor) -> Tensor:
        """``out = hidden @ weight[tile].T``, [rows, T] fp32; the weight is read where it lies."""
        assert isinstance(hidden, Packed)
        return transposed_product(self.rows(tile), hidden, out)

    def score(
        self,
        hidden: Tensor | Packed,
        head: Head,
        out: Outputs,
        ids: Tensor,
        running: Running,
    ) -> None:
        """The linear outputs of all tiles, kept if `out` has a place for each, and statistics."""
        assert isinstance(hidden, Packed)
        tile, tiles = min(self.step, NATIVE_TILE_CLASSES), tiles_of_call(len(self.weight))
        # A weight without unit inner stride is copied by tiles.
        kept = max(1, tiles * tile // self.step) if self.weight.stride(1) == 1 else 1
        for begin in range(0, len(self.weight), kept * self.step):
            part = slice(begin, min(begin + kept * self.step, len(self.weight)))
            bias = None if head.bias is None else head.bias[part].float().contiguous()
            cut = tile, self.step, begin
            classes = Tiles(self.rows(part), *cut, bias, *head.scale_and_cap)
            place = out.after(begin) if out.words_of_class > 0 else None
            add_scores(classes, hidden, place, ids, running)

    def gradient(self, hidden: Tensor, d_tile: Tensor, step: int, wanted: Wanted) -> "Bf16Gradient":
        """As `Fp32Gemms.gradient`; `d_tile` is not used."""
        del d_tile  # a product is rounded as it is written
        return Bf16Gradient(self, pack(hidden), RoundedTiles.of(hidden, step, wanted))


class RoundedTiles(NamedTuple):
    """Memory for d(loss)/d(linear output) in bf16, of one tile after the other."""

    rows: int
    straight: Tensor | None  # all of them flat
    transposed: Tensor | None
    row_sums: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, step: int, wanted: Wanted) -> "RoundedTiles":
        """For the rows of `hidden` [rows, D] bf16 and up to `step` classes."""
        rows, new = len(hidden), hidden.new_empty
        groups = -(-rows // SUMMED_ROWS)
        return cls(
            rows,
            new(rows * (step + step % 2)) if wanted.hidden else None,
            new(step * (rows + rows % 2)) if wanted.weight else None,
            new(groups * step, dtype=torch.float32) if wanted.bias else None,
        )

    def of_tile(self, tile: slice) -> Rounded:
        """Where a tile goes."""
        rows, classes = self.rows, tile.stop - tile.start
        return Rounded(
            _at_start(self.straight, rows, classes + classes % 2),
            _at_start(self.transposed, classes, rows + rows % 2),
            _at_start(self.row_sums, -(-rows // SUMMED_ROWS), classes),
        )

    def sums(self, tile: slice) -> Tensor:
        """The sums over the rows of a tile that is there, [T] fp32."""
        sums = self.of_tile(tile).sums
        assert sums is not None
        return sums.sum(0)


def _at_start(memory: Tensor | None, rows: int, columns: int) -> Tensor | None:
    return None if memory is None else memory[: rows * columns].view(rows, columns)


class Bf16Gradient(NamedTuple):
    """Both GEMMs of the gradients of a chunk, tile by tile, of d_logit rounded to bf16."""

    gemms: Bf16Gemms
    hidden: Packed  # [rows, D]
    d_logit: RoundedTiles

    def fill(self, tile: slice, write: Write) -> None:
        """As `Fp32Gradient.fill`."""
        write(tile, self.d_logit.of_tile(tile))

    def sums(self, tile: slice) -> Tensor:
        """As `Fp32Gradient.sums`: before they are rounded."""
        return self.d_logit.sums(tile)

    def add(
        self,
        tile: slice,
        d_hidden: Tensor | None,  # [rows, D] fp32
        d_weight: Tensor | None,  # [T, D] bf16 or fp32; fp32 if it is added to
        is_added: bool,
    ) -> None:
        """As `Fp32Gradient.add`."""
        straight, transposed, _ = self.d_logit.of_tile(tile)
        if d_hidden is not None and straight is not None:
            add_product(straight[:, : tile.stop - tile.start], self.gemms.rows(tile), d_hidden)
        if d_weight is not None and transposed is not None:
            product(transposed[:, : self.hidden.k], self.hidden, d_weight, is_added)
