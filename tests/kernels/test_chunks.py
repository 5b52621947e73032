"""How rows are cut into chunks, and that the products of a few rows lose no digits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xopd_kernels import (
    Backend,
    Operator,
    Workload,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    memory_plan,
    native_matmul,
)
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.memory import Panel
from xopd_kernels.needs import MIB


@given(st.integers(0, 500), st.integers(1, 200))
def test_parts(live: int, step: int) -> None:
    """All rows in order, at most `step` at a time."""
    parts = list(LiveRows(None, live, live).parts(step))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
    assert not parts or parts[-1].stop == live
    sizes = [part.stop - part.start for part in parts]
    assert all(0 < size <= step for size in sizes)
    assert len(sizes) == -(-live // step)


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


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("how", ["rows", "masked", "no advantage"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_few_rows_are_as_exact_as_many(backend, count, how, threads):
    """Of a head whose rows share a part, as real ones do; alone, they were off by ten times."""
    torch.set_num_threads(threads)
    rows, vocab_size, dim = 64, 40_000, 16
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=rng)
    weight = torch.randn(vocab_size, dim, generator=rng) / 4 + 1.0
    target, advantage = torch.randint(vocab_size, (rows,), generator=rng), torch.ones(rows)

    def d_hidden(dtype, settings, few):
        leaf, targets, advantages = hidden.to(dtype), target.clone(), advantage.clone()
        if few and how == "rows":
            leaf, targets, advantages = leaf[:count], targets[:count], advantages[:count]
        elif few and how == "masked":
            targets[count:] = -100
        elif few:
            advantages[count:] = 0.0
        leaf = leaf.clone().requires_grad_()
        out = linear_policy_loss(leaf, weight.to(dtype), targets, advantage=advantages, **settings)
        out.loss.backward()
        return leaf.grad.double()

    exact = d_hidden(torch.float64, {"backend": Backend.REFERENCE}, False)
    settings = {"backend": backend}
    many, few = (d_hidden(torch.float32, settings, is_few) for is_few in (False, True))
    of_many = (many - exact).norm(dim=1) / exact.norm(dim=1)
    error = (few[:count] - exact[:count]).norm() / exact[:count].norm()
    assert error < 2 * of_many.median()


@pytest.mark.parametrize("operator", [Operator.POLICY_LOSS, Operator.LOGPROB, Operator.DIVERGENCE])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tiles_change_nothing(operator, softcap):
    """bf16 products: two tiles of 6048 classes, or three of 4032 within a lower budget."""
    if not native_matmul.is_available():
        pytest.skip("this CPU has no bf16 dot products")
    rows, vocab_size, dim = 300, 9001, 64
    rng = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, rows, dim, generator=rng).to(torch.bfloat16)
    weight, given = (torch.randn(2, vocab_size, dim, generator=rng) / 4).to(torch.bfloat16)
    bias = torch.randn(vocab_size, generator=rng).to(torch.bfloat16)
    target = torch.randint(vocab_size, (rows,), generator=rng)
    advantage = torch.randn(rows, generator=rng)
    advantage[::7] = 0  # rows that leave before the products of the gradient
    work = Workload(
        operator, rows, vocab_size, dim, torch.bfloat16, has_softcap=softcap is not None
    )
    work = work._replace(teacher_dim=dim * (operator is Operator.DIVERGENCE))
    found = []
    for budget, classes in ((32 * MIB, 4032), (48 * MIB, 6048)):
        assert Panel.of(work, budget).tile_classes == classes
        assert memory_plan(work, Backend.NATIVE, budget).chunk_rows == rows
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        settings = {"bias": leaves[2], "softcap": softcap, "memory_budget_bytes": budget}
        settings["backend"] = Backend.NATIVE
        if operator is Operator.POLICY_LOSS:
            loss = linear_policy_loss(*leaves[:2], target, advantage=advantage, **settings).loss
        elif operator is Operator.LOGPROB:
            out = linear_logprob(*leaves[:2], target, needs_entropy=True, **settings)
            loss = (out.logprob * advantage + out.entropy).sum()
        else:
            out = linear_divergence(*leaves[:2], other, given, beta=0.5, **settings)
            loss = out.divergence.sum()
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    for one, another in zip(*found, strict=True):
        if operator is Operator.DIVERGENCE:  # its sums are those of 1024 classes of a tile
            assert (one - another).norm() <= 1e-4 * one.norm()
        else:
            assert one.equal(another) and one.isfinite().all()
