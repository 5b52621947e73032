"""A bf16 d_weight of several chunks without an fp32 sum: d_logit waits for the last chunk.

The GEMMs of the gradients read d_logit rounded to bf16, a quarter (of two models) or half of the
logits that it is made of. So each chunk leaves it at the start of every tile's part of d_weight;
the next one has its logits behind it, and fewer rows. When all rows are there, one GEMM a tile
adds to d_hidden, and another one replaces them by d_weight, which is rounded once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.native_gemm import Bf16Gemms
from xopd_kernels.memory import Panel, next_kept_rows
from xopd_kernels.native_matmul import add_product, factors, pack, product
from xopd_kernels.native_scores import Outputs


class KeptRows(NamedTuple):
    """The rows of a chunk that have a gradient."""

    part: slice  # the live rows of the chunk
    alive: Tensor | None  # those of them, int64; None: all
    hidden: Tensor  # [rows, D] bf16


class KeptGradient:
    """d_logit of the chunks so far, in the memory of d_weight."""

    def __init__(self, weight: Tensor, gemms: Bf16Gemms, models: int, panel: Panel) -> None:
        self.weight = weight  # [V, D] bf16: d_weight
        self.gemms = gemms
        self.models = models
        self.panel = panel
        self.chunks: list[KeptRows] = []

    @property
    def _rows(self) -> int:
        return sum(len(chunk.hidden) for chunk in self.chunks)

    def place(self, rows: int) -> tuple[Outputs, int]:
        """Where the logits of the next chunk lie, and how many of the `rows` left it has."""
        words, width = self.weight.view(torch.float32).view(-1), self.weight.shape[1] // 2
        kept = self._rows + self._rows % 2
        step = next_kept_rows(width, self.models, kept, rows, self.panel.kept_step)
        return Outputs(words, width, kept // 2), step

    def _block(self, tile: slice, first: int, rows: int) -> Tensor:
        """d_logit [rows, T] of a tile, from the row `first` of those that are kept."""
        classes = tile.stop - tile.start
        begin = tile.start * self.weight.shape[1] + first * classes
        return self.weight.view(-1)[begin : begin + rows * classes].view(rows, classes)

    def keep(self, tile: slice, d_logit: Tensor) -> None:
        """Leave d_logit [rows, T] bf16 of the next chunk, over its own logits."""
        self._block(tile, self._rows, len(d_logit)).copy_(d_logit)

    def write(self, tiles: Iterator[slice], d_hidden: Tensor | None) -> None:
        """Replace what is kept by d_weight; `d_hidden` [rows, D] fp32: added to."""
        hidden = torch.cat([chunk.hidden for chunk in self.chunks])
        rows = len(hidden)
        if rows == 0:
            self.weight.zero_()
            return
        packed, step = pack(hidden), self.gemms.step
        del hidden
        transposed = self.weight.new_empty(step * (rows + rows % 2))
        for tile in tiles:
            d_logit = self._block(tile, 0, rows)
            count, padded = tile.stop - tile.start, None
            if count % 2:
                padded = self.weight.new_empty(rows * (count + 1))
            straight, other = factors(d_logit, padded, transposed)
            if d_hidden is not None:
                left = d_logit if straight is None else straight
                add_product(left, self.gemms.rows(tile), d_hidden)
            assert other is not None
            product(other, packed, self.weight[tile])
