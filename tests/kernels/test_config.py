"""The tile table and its selection."""

import pytest
import torch

from xopd_kernels.chunk import config
from xopd_kernels.chunk.config import (
    Scoring,
    Stage,
    l2_tile,
    select,
    select_persistent,
    select_scoring,
)


def test_newest_entry_that_is_not_newer_than_the_device():
    for stage in Stage:
        assert select(stage, torch.bfloat16, 86) is config.TABLE[80, 2, stage]
        assert select(stage, torch.float16, 100) is config.TABLE[90, 2, stage]
        assert select(stage, torch.float32, 90) is config.TABLE[80, 4, stage]


def test_unknown_device_and_dtype_raise():
    with pytest.raises(ValueError, match=r"capability=75; .* capabilities \[80, 90\]"):
        select(Stage.LOGITS, torch.bfloat16, 75)
    with pytest.raises(ValueError, match=r"dtype=torch.float64"):
        select(Stage.LOGITS, torch.float64, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [90, 100, 120])
def test_scoring_is_persistent_where_tma_can_read(dtype, capability):
    assert select_scoring(dtype, capability, is_aligned=True) is Scoring.PERSISTENT
    assert select_scoring(dtype, capability, is_aligned=False) is Scoring.TILED
    assert select_persistent(dtype, capability) is config.PERSISTENT_TABLE[90, 2]


@pytest.mark.parametrize("is_aligned", [True, False])
def test_scoring_is_tiled_elsewhere(is_aligned):
    for capability in (80, 86, 89):
        assert select_scoring(torch.bfloat16, capability, is_aligned) is Scoring.TILED
    for capability in (80, 90, 100):
        assert select_scoring(torch.float32, capability, is_aligned) is Scoring.TILED


def test_scoring_on_an_unknown_device_or_dtype_raises():
    with pytest.raises(ValueError, match=r"no scoring variant .* capability=75"):
        select_scoring(torch.bfloat16, 75, is_aligned=True)
    with pytest.raises(ValueError, match=r"no scoring variant for dtype=torch.float64"):
        select_scoring(torch.float64, 90, is_aligned=True)
    with pytest.raises(ValueError, match=r"no persistent tile .* capabilities \[\]"):
        select_persistent(torch.float32, 90)


def test_every_persistent_choice_has_a_tile():
    for (arch, size), scoring in config.SCORING_TABLE.items():
        if scoring is Scoring.PERSISTENT:
            assert any(a <= arch and s == size for a, s in config.PERSISTENT_TABLE)


# H100, A100, B200, and one with a small L2.
@pytest.mark.parametrize(
    ("processors", "l2_mib", "columns"),
    [(132, 50, 4224), (108, 40, 3456), (148, 126, 9472), (82, 6, 5248)],
)
def test_l2_tile_is_whole_waves_within_its_share(processors, l2_mib, columns):
    rows, actual = l2_tile(processors, l2_mib * 2**20)
    assert (rows, actual) == (2048, columns)
    gemm_tiles = rows // config.GEMM_TILE_ROWS * actual // config.GEMM_TILE_COLUMNS
    assert gemm_tiles % processors == 0
    if l2_mib > 6:  # there one wave is more than the L2
        assert rows * actual * 4 <= config.L2_SHARE * l2_mib * 2**20


@pytest.mark.parametrize("tile", [*config.TABLE.values(), *config.PERSISTENT_TABLE.values()])
def test_tiles_are_what_tensor_cores_take(tile):
    """tl.dot needs at least 16 on each side, and tl.arange powers of two."""
    for size in (tile.rows, tile.columns, tile.inner, tile.warps):
        assert size & (size - 1) == 0
    assert min(tile.rows, tile.columns, tile.inner) >= 16
