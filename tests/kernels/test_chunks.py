"""How rows are cut into chunks: none of them is so small that its products lose digits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xopd_kernels import Backend, Operator, Workload, linear_logprob, memory_plan
from xopd_kernels.chunk.reference import LiveRows


@given(st.integers(0, 500), st.integers(1, 200))
def test_parts(live: int, step: int) -> None:
    """All rows in order, at most `step` at a time, and no last chunk of a few."""
    parts = list(LiveRows(None, live, live).parts(step))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
    assert not parts or parts[-1].stop == live
    sizes = [part.stop - part.start for part in parts]
    assert all(0 < size <= step for size in sizes)
    assert len(sizes) == -(-live // step)
    if len(sizes) > 1 and step > 32:
        assert sizes[-1] >= 16


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])
def test_the_last_row_is_as_exact_as_the_others(backend):
    """One row more than a chunk has; alone, its d_hidden was off by ten times as much."""
    vocab_size, dim, budget = 40_000, 16, 2**23
    work = Workload(Operator.LOGPROB, 4096, vocab_size, dim, torch.float32)
    rows = memory_plan(work, backend, budget).chunk_rows + 1
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=rng)
    weight = torch.randn(vocab_size, dim, generator=rng) / 4
    target = torch.randint(vocab_size, (rows,), generator=rng)
    found = []
    for dtype, settings in (
        (torch.float64, {"backend": Backend.REFERENCE}),
        (torch.float32, {"backend": backend, "memory_budget_bytes": budget}),
    ):
        leaf = hidden.to(dtype).requires_grad_()
        linear_logprob(leaf, weight.to(dtype), target, **settings).logprob.sum().backward()
        found.append(leaf.grad.double())
    exact, actual = found
    error = (actual - exact).norm(dim=1) / exact.norm(dim=1)
    assert error[-1] < 4 * error.median()
