"""A bf16 d_weight of several chunks without an fp32 sum: d_logit waits for the last chunk.

The GEMMs of the gradients read d_logit rounded to bf16, an eighth (two models) or a quarter of the
logits that it is made of. So each chunk leaves it, transposed, at the start of every tile's part of
d_weight; the next one has its logits behind it, and fewer rows. When all rows are there, one
GEMM a tile replaces them by d_weight, which is rounded once.
"""

import torch
from torch import Tensor

from xopd_kernels.memory import Panel, next_kept_rows
from xopd_kernels.native_matmul import pack, product
from xopd_kernels.native_scores import Outputs


class KeptGradient:
    """d_logit of the chunks so far, in the memory of d_weight."""

    def __init__(self, weight: Tensor, models: int, panel: Panel) -> None:
        self.weight = weight  # [V, D] bf16: d_weight
        self.models = models
        self.panel = panel
        self.hidden: list[Tensor] = []  # [rows, D] bf16 of each chunk

    @property
    def _rows(self) -> int:
        """Rows that are kept, an odd chunk with a row of zeros."""
        return sum(len(hidden) + len(hidden) % 2 for hidden in self.hidden)

    def place(self, rows: int) -> tuple[Outputs, int]:
        """Where the logits of the next chunk lie, and how many of the `rows` left it has."""
        words, width = self.weight.view(torch.float32).view(-1), self.weight.shape[1] // 2
        step = next_kept_rows(width, self.models, self._rows, rows, self.panel.kept_step)
        return Outputs(words, width, self._rows // 2), step

    def block(self, tile: slice, rows: int) -> Tensor:
        """Memory for d_logit.T [T, rows] of the next chunk, flat, over its own logits."""
        classes, width = tile.stop - tile.start, self.weight.shape[1]
        begin = tile.start * width + classes * self._rows
        return self.weight.view(-1)[begin : begin + classes * (rows + rows % 2)]

    def write(self, tiles: list[slice]) -> None:
        """Replace what is kept by d_weight."""
        hidden = torch.cat(self.hidden)
        rows, packed = len(hidden), pack(hidden)
        if rows == 0:
            self.weight.zero_()
            return
        even = rows + rows % 2
        buffer = hidden.new_zeros(max(tile.stop - tile.start for tile in tiles), even)
        for tile in tiles:
            d_logit, begin, source = buffer[: tile.stop - tile.start], 0, tile.start
            source *= self.weight.shape[1]
            for part in self.hidden:
                width = len(part) + len(part) % 2
                kept = self.weight.view(-1)[source : source + len(d_logit) * width]
                d_logit[:, begin : begin + len(part)] = kept.view(-1, width)[:, : len(part)]
                begin, source = begin + len(part), source + kept.numel()
            product(d_logit[:, :rows], packed, self.weight[tile])
