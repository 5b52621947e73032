"""Tile shapes: a committed table and a pure function, no autotuning at the first call.

`benchmarks/` measures; what it finds is written here. The rows were chosen by their compiled
resources (no spills on sm_80, sm_90 and sm_100, see `xopd_kernels.inspect`), not yet by timing.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

ROWS_PER_PROGRAM = 128  # of the kernels that merge row statistics
GRADIENT_BLOCK_V, GRADIENT_WARPS = 2048, 8  # of the kernel that turns logits into gradients


class Stage(enum.Enum):
    """The GEMMs of the operators; inner dimension last."""

    LOGITS = "logits"  # hidden [N, D] @ weight.T [D, V], with the online softmax
    D_HIDDEN = "d_hidden"  # d_logit [N, V] @ weight [V, D]
    D_WEIGHT = "d_weight"  # d_logit.T [V, N] @ hidden [N, D]


@dataclass(frozen=True)
class TileConfig:
    """One tile of a GEMM, [rows, columns] of the result, and how it is launched."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int  # of the software pipeline over the inner dimension
    group: int = 16  # row blocks that share a column block in L2
    slab_tiles: int = 8  # scoring: column tiles that share one set of partial statistics


# (oldest architecture, bytes of an element, stage) -> tile; an entry serves newer ones too.
TABLE: dict[tuple[int, int, Stage], TileConfig] = {
    (80, 2, Stage.LOGITS): TileConfig(128, 128, 32, warps=8, stages=3),
    (80, 2, Stage.D_HIDDEN): TileConfig(128, 128, 32, warps=8, stages=3),
    (80, 2, Stage.D_WEIGHT): TileConfig(128, 128, 32, warps=8, stages=3),
    (80, 4, Stage.LOGITS): TileConfig(64, 32, 16, warps=4, stages=2),
    (80, 4, Stage.D_HIDDEN): TileConfig(64, 64, 16, warps=8, stages=2),
    (80, 4, Stage.D_WEIGHT): TileConfig(64, 64, 16, warps=8, stages=2),
    (90, 2, Stage.LOGITS): TileConfig(128, 128, 64, warps=8, stages=3),
    (90, 2, Stage.D_HIDDEN): TileConfig(128, 128, 64, warps=8, stages=3),
    (90, 2, Stage.D_WEIGHT): TileConfig(128, 128, 64, warps=8, stages=3),
}
ARCHITECTURES = (80, 90, 100)  # those that every row is compiled and checked for


def select(stage: Stage, dtype: torch.dtype, capability: int) -> TileConfig:
    """The tile for inputs of `dtype` on compute capability `capability` (90 = 9.0).

    The newest entry that is not newer than the device; ValueError if there is none.
    """
    size = dtype.itemsize
    fitting = [arch for arch, bytes_, s in TABLE if (bytes_, s) == (size, stage)]
    known = [arch for arch in fitting if arch <= capability]
    if not known:
        raise ValueError(
            f"no tile for stage={stage.name}, dtype={dtype}, capability={capability}; the table "
            f"has capabilities {sorted(fitting)}; use Backend.REFERENCE"
        )
    return TABLE[max(known), size, stage]


_Entry = TypeVar("_Entry")


class Scoring(enum.Enum):
    """How log-probs are computed where no gradient is wanted; all results agree."""

    TILED = "tiled"  # one program for each item: any alignment, any device
    PERSISTENT = "persistent"  # a resident grid walks the items, operands through TMA
    L2_TILE = "l2_tile"  # cuBLAS into one buffer that stays in L2, folded tile by tile


# (oldest architecture, bytes of an element) -> variant; an entry serves newer ones too. L2_TILE
# waits for a device that says it is faster.
SCORING_TABLE: dict[tuple[int, int], Scoring] = {
    (80, 2): Scoring.TILED,
    (80, 4): Scoring.TILED,
    (90, 2): Scoring.PERSISTENT,
}
# The tiles of Scoring.PERSISTENT. 512 classes to a slab: at 1024 rows of 152,064 classes an H100
# has 18 items for each of its 132 processors, with 1024 classes 9 and a tenth wave for a remnant.
PERSISTENT_TABLE: dict[tuple[int, int], TileConfig] = {
    (90, 2): TileConfig(128, 256, 64, warps=8, stages=3, slab_tiles=2),
}
TMA_ALIGNMENT_BYTES = 16  # of base addresses and row strides
FOLD_BLOCK_V, FOLD_WARPS = 2048, 8  # of the kernel that folds an L2 tile into the statistics
L2_TILE_ROWS = 2048
L2_SHARE = 0.7  # of the L2 for the fp32 tile; the rest is for the operands that stream through
GEMM_TILE_ROWS, GEMM_TILE_COLUMNS = 256, 128  # of cuBLAS on large products


def select_scoring(dtype: torch.dtype, capability: int, is_aligned: bool) -> Scoring:
    """The variant for inputs of `dtype` on compute capability `capability`.

    The newest entry that is not newer than the device. PERSISTENT reads through TMA, which needs
    the base addresses and row strides of hidden and weight to be multiples of 16 bytes
    (`is_aligned`): TILED serves the others. ValueError if there is no entry.
    """
    scoring = _newest(SCORING_TABLE, "scoring variant", dtype, capability)
    is_unfit = scoring is Scoring.PERSISTENT and not is_aligned
    return Scoring.TILED if is_unfit else scoring


def select_persistent(dtype: torch.dtype, capability: int) -> TileConfig:
    """The tile of Scoring.PERSISTENT; ValueError if there is none."""
    return _newest(PERSISTENT_TABLE, "persistent tile", dtype, capability)


def l2_tile(processors: int, l2_bytes: int) -> tuple[int, int]:
    """(rows, columns) of the fp32 tile of Scoring.L2_TILE: whole waves of GEMM tiles, at least one.

    As many waves as fit L2_SHARE of the L2: 2048 x 4224 (34.6 MB) on an H100.
    """
    row_tiles = L2_TILE_ROWS // GEMM_TILE_ROWS
    wave_columns = processors // math.gcd(row_tiles, processors) * GEMM_TILE_COLUMNS
    waves = int(l2_bytes * L2_SHARE) // (4 * L2_TILE_ROWS * wave_columns)
    return L2_TILE_ROWS, max(1, waves) * wave_columns


def _newest(
    table: Mapping[tuple[int, int], _Entry], what: str, dtype: torch.dtype, capability: int
) -> _Entry:
    fitting = [arch for arch, bytes_ in table if bytes_ == dtype.itemsize]
    known = [arch for arch in fitting if arch <= capability]
    if not known:
        raise ValueError(
            f"no {what} for dtype={dtype}, capability={capability}; the table has capabilities "
            f"{sorted(fitting)}; use Backend.REFERENCE"
        )
    return table[max(known), dtype.itemsize]
