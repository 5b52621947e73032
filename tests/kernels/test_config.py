"""The tile table and its selection."""

import pytest
import torch

from xopd_kernels.linear_logprob import config
from xopd_kernels.linear_logprob.config import Stage, chunk_rows, select


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


@pytest.mark.parametrize("tile", config.TABLE.values())
def test_tiles_are_what_tensor_cores_take(tile):
    """tl.dot needs at least 16 on each side, and tl.arange powers of two."""
    for size in (tile.rows, tile.columns, tile.inner, tile.warps):
        assert size & (size - 1) == 0
    assert min(tile.rows, tile.columns, tile.inner) >= 16


@pytest.mark.parametrize("vocab_size", [1, 32_000, 151_936, 256_000, 10_000_000])
def test_chunks_fit_their_budget(vocab_size):
    rows = chunk_rows(1_000_000, vocab_size)
    assert rows % 128 == 0
    assert 128 <= rows <= 4096
    assert rows == 128 or rows * vocab_size * 4 <= config.LOGITS_BYTES
    assert chunk_rows(5, vocab_size) == 5
