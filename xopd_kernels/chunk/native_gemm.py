"""The GEMMs of Backend.NATIVE, by dtype: the logits of a tile, and its part of both gradients.

bf16 on a processor with bf16 dot products: bf16 factors, fp32 sums and results
(`xopd_kernels.native_matmul`); the gradient by the logits is rounded to bf16 to be a factor.
Everything else: torch's fp32 GEMMs of upcast tiles. One class for each, with the same methods; the
bf16 one has all of sweep one besides, as its statistics come from the registers of the product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.reference import add_product_
from xopd_kernels.native import Running
from xopd_kernels.native_matmul import (
    Packed,
    multiplies,
    pack,
    packed_size,
    product,
    round_both,
    transposed_product,
)
from xopd_kernels.native_scores import Outputs, Tiles, add_scores, tiles_of_call
from xopd_kernels.records import Head


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

    def gradient(self, hidden: Tensor, d_tile: Tensor) -> "Fp32Gradient":
        """The gradients of `hidden` [rows, D] and of the weight.

        `d_tile` [step, D] fp32: memory for a tile of d_weight that is rounded.
        """
        return Fp32Gradient(self, hidden, d_tile)


class Fp32Gradient(NamedTuple):
    """Both GEMMs of the gradients of a chunk, tile by tile."""

    gemms: Fp32Gemms
    hidden: Tensor  # [rows, D] fp32
    d_tile: Tensor

    def add(
        self,
        tile: slice,
        d_logit: Tensor,  # [rows, T] fp32
        d_hidden: Tensor | None,  # [rows, D] fp32
        d_weight: Tensor | None,  # [T, D]; fp32 if it is added to
        is_added: bool,
    ) -> None:
        """``d_hidden += d_logit @ weight[tile]``, ``d_weight = (or +=) d_logit.T @ hidden``."""
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
        # A weight without unit inner stride is copied by tiles.
        tiles = tiles_of_call(len(self.weight)) if self.weight.stride(1) == 1 else 1
        for begin in range(0, len(self.weight), tiles * self.step):
            part = slice(begin, min(begin + tiles * self.step, len(self.weight)))
            bias = None if head.bias is None else head.bias[part].float().contiguous()
            classes = Tiles(self.rows(part), self.step, begin, bias, *head.scale_and_cap)
            place = out.after(begin) if out.words_of_class > 0 else None
            add_scores(classes, hidden, place, ids, running)

    def gradient(self, hidden: Tensor, d_tile: Tensor) -> "Bf16Gradient":
        """The gradients of `hidden` [rows, D] and of the weight; `d_tile` is not used."""
        del d_tile  # a product is rounded as it is written
        rows, step = len(hidden), self.step
        return Bf16Gradient(
            self,
            hidden.new_empty(packed_size(step, hidden.shape[1]), dtype=torch.int32),
            pack(hidden),
            hidden.new_empty(rows * (step + step % 2)),
            hidden.new_empty(step * (rows + rows % 2)),
        )


class Bf16Gradient(NamedTuple):
    """Both GEMMs of the gradients of a chunk, tile by tile, of d_logit rounded to bf16."""

    gemms: Bf16Gemms
    words: Tensor  # int32, flat: a packed tile of the weight
    hidden: Packed  # [rows, D]
    straight: Tensor  # bf16, flat: d_logit
    transposed: Tensor  # bf16, flat: d_logit.T

    def add(
        self,
        tile: slice,
        d_logit: Tensor,  # [rows, T] fp32
        d_hidden: Tensor | None,  # [rows, D] fp32
        d_weight: Tensor | None,  # [T, D] bf16 or fp32; fp32 if it is added to
        is_added: bool,
    ) -> None:
        """As `Fp32Gradient.add`."""
        straight, transposed = round_both(
            d_logit,
            None if d_hidden is None else self.straight,
            None if d_weight is None else self.transposed,
        )
        if d_hidden is not None and straight is not None:
            weight = pack(self.gemms.rows(tile), self.words)
            product(straight, weight, d_hidden, is_added=True)
        if d_weight is not None and transposed is not None:
            product(transposed, self.hidden, d_weight, is_added)
