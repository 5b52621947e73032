"""Tile shapes: a committed table and a pure function, no autotuning at the first call.

`benchmarks/` measures; what it finds is written here. The rows were chosen by their compiled
resources (no spills on sm_80, sm_90 and sm_100, see `xopd_kernels.inspect`), not yet by timing.
"""

import enum
from dataclasses import dataclass

import torch

LOGITS_BYTES = 640_000_000  # device memory for the fp32 logits of one row chunk
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 128, 4096  # more rows than that no longer help the GEMMs
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
    slab_tiles: int = 8  # LOGITS: column tiles that one program folds into its statistics


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


def chunk_rows(rows: int, vocab_size: int) -> int:
    """Rows of a chunk whose fp32 logits fit LOGITS_BYTES: a multiple of 128, at most `rows`."""
    fitting = LOGITS_BYTES // (4 * vocab_size) // MIN_CHUNK_ROWS * MIN_CHUNK_ROWS
    return min(rows, max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, fitting)))
