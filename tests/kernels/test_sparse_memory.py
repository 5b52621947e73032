"""memory_plan of sparse gradients: lists are counted, bounded, and what is allocated."""

import pytest
import torch

from tests.kernels.test_memory_plan import DIM, MIB, TOP_K, VOCAB_SIZE, allocations, peak
from xopd_kernels import (
    Backend,
    MemoryPlan,
    Operator,
    Wanted,
    Workload,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    memory_plan,
)
from xopd_kernels.testing import Distribution, make_inputs
from xopd_kernels.workload import LIST_BYTES, NATIVE_TILE_CLASSES, TAIL_BYTES, TAIL_CLASSES

BACKENDS = pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])
OPERATORS = [Operator.LOGPROB, Operator.POLICY_LOSS, Operator.TOPK_DIVERGENCE]
EVERY = pytest.mark.parametrize("operator", OPERATORS)
WIDE = 151_936


def workload(operator: Operator, rows: int, dtype: torch.dtype, softcap=None) -> Workload:
    top_k = TOP_K if operator is Operator.TOPK_DIVERGENCE else 0
    work = Workload(operator, rows, VOCAB_SIZE, DIM, dtype, top_k=top_k, is_sparse=True)
    return work._replace(has_softcap=softcap is not None)


def measure(work: Workload, backend: Backend, budget=None, softcap=None, **options) -> list[int]:
    """Allocations of forward and backward; half of the rows are peaked, the others broad."""
    shape = (work.rows, work.vocab_size, work.dim)
    inputs = make_inputs(*shape, work.dtype, Distribution.PEAKED)
    hidden, weight, target = inputs.hidden, inputs.weight, inputs.target
    given = {"gradient": "sparse", "max_gradient_error": 0.05, "softcap": softcap}
    given |= {"memory_budget_bytes": budget, "backend": backend, **options}
    teacher = torch.full((work.rows,), -4.0)
    ids = torch.arange(TOP_K).repeat(work.rows, 1)

    def loss():
        if work.operator is Operator.LOGPROB:
            return linear_logprob(hidden, weight, target, **given).logprob.sum()
        if work.operator is Operator.POLICY_LOSS:
            return linear_policy_loss(hidden, weight, target, advantage=teacher, **given).loss
        logprob = teacher[:, None].expand(ids.shape)
        return linear_topk_divergence(hidden, weight, ids, logprob, **given).divergence.sum()

    return allocations(lambda: torch.autograd.grad(loss(), (hidden, weight)))


def assert_planned(sizes: list[int], plan: MemoryPlan) -> None:
    """Below the plan, and the plan without the lists is not far above."""
    assert peak(sizes) <= plan.peak_bytes
    assert peak(sizes) >= 0.6 * (plan.peak_bytes - plan.list_bytes)


@BACKENDS
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_a_call(backend, operator, dtype):
    work = workload(operator, 1024, dtype)
    assert_planned(measure(work, backend), memory_plan(work, backend))


@BACKENDS
@EVERY
def test_a_low_budget_is_kept(backend, operator):
    work = workload(operator, 512, torch.float32)
    plan = memory_plan(work, backend, 8 * MIB)
    assert plan.workspace_bytes <= 8 * MIB
    assert_planned(measure(work, backend, 8 * MIB), plan)


@BACKENDS
def test_the_other_modes(backend):
    work = workload(Operator.POLICY_LOSS, 512, torch.float32, softcap=8.0)
    unbiased = {"gradient": "unbiased", "gradient_seed": 1}
    plan = memory_plan(work, backend)
    assert_planned(measure(work, backend, softcap=8.0), plan)
    assert_planned(measure(work, backend, softcap=8.0, **unbiased), plan)


@EVERY
@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("rows", [1024, 8192, 65_536])
def test_the_lists_are_bounded(backend, operator, rows):
    """Whatever the number of tokens: 40 MiB, of log-probs also those that wait, 20 MiB."""
    work = workload(operator, rows, torch.bfloat16)._replace(vocab_size=WIDE, dim=2048)
    plan = memory_plan(work, backend)
    searched, tile = 16 * WIDE, 4 * 2048 * NATIVE_TILE_CLASSES  # of d_weight, not rounded yet
    tail = TAIL_BYTES + 4 * 2048 * (TAIL_CLASSES + 4) + 8 * WIDE
    assert 0 < plan.list_bytes <= 1.5 * LIST_BYTES + searched + tile + tail
    exact = memory_plan(work._replace(is_sparse=False), backend)
    more = plan.peak_bytes - exact.peak_bytes
    # NATIVE: fewer tiles at a time where there is one in fp32.
    assert 0 < more <= plan.list_bytes if backend is Backend.NATIVE else more == plan.list_bytes
    assert exact.list_bytes == 0


def test_without_a_gradient_there_are_no_lists():
    work = workload(Operator.POLICY_LOSS, 1024, torch.float32)
    work = work._replace(wanted=Wanted(False, False, False))
    assert memory_plan(work, Backend.REFERENCE).list_bytes == 0


@pytest.mark.parametrize(
    ("vocab_size", "rows", "length"),
    [
        (40, 10, 40),  # all classes
        (1000, 10, 64),
        (32_000, 10, 1000),  # V / 32
        (151_936, 8192, LIST_BYTES // (8192 * 24)),
        (151_936, 10**9, 2),  # never the target alone
    ],
)
def test_the_length_of_a_list(vocab_size, rows, length):
    work = Workload(Operator.POLICY_LOSS, rows, vocab_size, 8, torch.bfloat16, is_sparse=True)
    assert work.list_length(rows) == length


@pytest.mark.parametrize("ignored", [0, 1])
@BACKENDS
def test_long_lists_of_log_probs(backend, ignored):
    """One ignored row, and the lists of a chunk are a copy: not all of a chunk's at a time."""
    rows, classes = 1740, 32_000
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 4, generator=rng), torch.randn(classes, 4, generator=rng)
    # As many classes as a list has hold all of the mass.
    hidden[:, 0], weight[:, 0] = 1.0, 9.0 * (torch.rand(classes, generator=rng) < 1 / 32)
    target = torch.randint(classes, (rows,), generator=rng)
    target[:ignored] = -100
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    work = Workload.of(Operator.LOGPROB, *leaves, Wanted(True, True, False))
    plan = memory_plan(work._replace(is_sparse=True), backend, 400 * MIB)
    given = {"gradient": "sparse", "max_gradient_error": 0.3, "memory_budget_bytes": 400 * MIB}

    def call():
        out = linear_logprob(*leaves, target, backend=backend, **given)
        assert out.dropped_mass.count_nonzero() > 0.8 * rows
        return torch.autograd.grad(out.logprob.sum(), leaves)

    assert peak(allocations(call)) <= plan.peak_bytes


@pytest.mark.parametrize("softcap", [None, 8.0])
@BACKENDS
def test_a_wide_head(backend, softcap):
    """The classes that stand for those left out, D numbers each, weigh more than the lists."""
    rows, classes, dim = 32, 1024, 8192
    hidden, weight = torch.randn(rows, dim).requires_grad_(), torch.randn(classes, dim)
    work = Workload.of(Operator.POLICY_LOSS, hidden, weight, Wanted(True, False, False))
    work = work._replace(is_sparse=True, has_softcap=softcap is not None)
    given = {"gradient": "sparse", "max_gradient_error": 0.3, "softcap": softcap}
    given |= {"advantage": torch.ones(rows), "backend": backend}

    def call():
        loss = linear_policy_loss(hidden, weight, torch.arange(rows), **given).loss
        return torch.autograd.grad(loss, hidden)

    plan = memory_plan(work, backend)
    assert 0.6 * plan.peak_bytes <= peak(allocations(call)) <= plan.peak_bytes
