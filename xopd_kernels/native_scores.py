"""Sweep one over bf16 heads in one call: logits of many tiles, and statistics from registers.

The same numbers as `native_matmul.transposed_product` and `native.add_statistics` tile by tile,
without reading the logits again, and without storing those that nobody needs.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.native import Running, c_cap, check_first_class
from xopd_kernels.native_library import address, block, call, pointers, sizes
from xopd_kernels.native_matmul import Packed, packed_size, whole
from xopd_kernels.workload import NATIVE_TILE_CLASSES, NATIVE_TILES

TILE_SUM_BYTES = 24  # for each row and tile, kept until all tiles of the call are there


def tiles_of_call(vocab_size: int) -> int:
    """Tiles that one call goes through, also where a low memory budget makes them smaller."""
    return min(NATIVE_TILES, -(-vocab_size // NATIVE_TILE_CLASSES))


class Outputs(NamedTuple):
    """Where linear outputs lie, tile by tile: [rows, T] of a tile that begins with class c at
    ``c * words_of_class + T * used``."""

    words: Tensor  # fp32, flat
    words_of_class: int  # 0: every tile at the same place
    used: int = 0  # words of a class before them

    def block(self, tile: slice, rows: int) -> Tensor:
        """The outputs [rows, T] of a tile."""
        classes = tile.stop - tile.start
        begin = tile.start * self.words_of_class + self.used * classes
        return self.words[begin : begin + rows * classes].view(rows, -1)

    def behind(self, rows: int) -> "Outputs":
        """The place after `rows` of them."""
        return self._replace(used=self.used + rows)

    def after(self, classes: int) -> "Outputs":
        """The same from another class on."""
        return self._replace(words=self.words[classes * self.words_of_class :])


class Tiles(NamedTuple):
    """Some classes of a bf16 head, and what makes logits of their linear outputs."""

    weight: Tensor  # [classes, D], D even
    tile: int  # classes of a tile, whose statistics are one sum; the last one may have fewer
    out_tile: int  # of a tile as it is kept: a multiple, or all of them
    first_class: int  # number of the first of them
    bias: Tensor | None  # [classes] fp32
    scale: float  # as in `native.Logits`
    cap: float | None


class _Scores(ctypes.Structure):
    _fields_ = (
        *pointers("weight"),
        *sizes("weight_stride"),
        *pointers("hidden"),
        *sizes("rows", "classes", "k", "tile", "out_tile"),
        *pointers("out"),
        *sizes("out_class", "out_offset"),
        *pointers("bias"),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        *sizes("first_class"),
        *pointers("ids"),
        *sizes("id_count"),
        *pointers("maximum", "total", "moment", "at_ids", "sums"),
    )


def add_scores(
    tiles: Tiles,
    hidden: Packed,
    out: Outputs | None,
    ids: Tensor,
    running: Running,
) -> None:
    """Compute ``x = (weight hidden).T`` tile by tile, and fold its logits into `running`, in place.

    `hidden` [D, rows] packed; `out`: where x goes, from the first class on, None: nowhere. `ids`
    and `running` are those of `native.add_statistics`. Raises TypeError/ValueError for a tensor
    that does not fit, RuntimeError without the products.
    """
    classes, k = tiles.weight.shape
    rows, id_count = hidden.n, ids.shape[1] if ids.ndim == 2 else 0
    _check(tiles, hidden, out)
    place: tuple[int | None, int, int] = (None, 0, 0)
    if out is not None:
        words = out.words[: classes * out.words_of_class]
        size = (classes * out.words_of_class,)
        place = (address("out.words", words, torch.float32, size), out.words_of_class, out.used)
    bias, moment = tiles.bias, running.moment
    sum_bytes = -(-classes // tiles.tile) * whole(rows) * TILE_SUM_BYTES
    sums = torch.empty(sum_bytes // 8, dtype=torch.float64)
    arguments = _Scores(
        block("weight", tiles.weight, torch.bfloat16),
        tiles.weight.stride(0),
        address("hidden.words", hidden.words, torch.int32, (packed_size(k, rows),)),
        *(rows, classes, k, tiles.tile, tiles.out_tile),
        *place,
        None if bias is None else address("bias", bias, torch.float32, (classes,)),
        *(tiles.scale, c_cap("cap", tiles.cap)),
        tiles.first_class,
        address("ids", ids, torch.int64, (rows, id_count)),
        id_count,
        address("running.maximum", running.maximum, torch.float32, (rows,)),
        address("running.total", running.total, torch.float64, (rows,)),
        None if moment is None else address("running.moment", moment, torch.float64, (rows,)),
        address("running.at_ids", running.at_ids, torch.float32, (rows, id_count)),
        sums.data_ptr(),
    )
    call("xopd_run_scores", arguments)


def _check(tiles: Tiles, hidden: Packed, out: Outputs | None) -> None:
    (classes, k), rows = tiles.weight.shape, hidden.n
    if k != hidden.k or k % 2 or tiles.tile < 1:
        raise ValueError(
            f"weight [classes, D], hidden [D, rows] and a tile must fit, D even, got "
            f"{list(tiles.weight.shape)}, {[hidden.k, rows]} and {tiles.tile}"
        )
    if tiles.out_tile < classes and (tiles.out_tile < 1 or tiles.out_tile % tiles.tile):
        raise ValueError(
            f"out_tile must be a multiple of tile={tiles.tile} or all {classes} classes, got "
            f"{tiles.out_tile}"
        )
    check_first_class(tiles.first_class)
    if out is None:
        return
    fits = 0 <= out.used <= out.words_of_class - rows
    if not fits or out.words.numel() < classes * out.words_of_class:
        raise ValueError(
            f"out must hold {rows} rows of {classes} classes, got {list(out.words.shape)} with "
            f"{out.words_of_class} words for a class, {out.used} of them used"
        )
