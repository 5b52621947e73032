"""memory_plan at its edges: few rows, no live ones, a frozen head."""

import functools
import re

import pytest
import torch

from tests.kernels.test_memory_plan import CASES, allocations, peak
from xopd_kernels import (
    Backend,
    Operator,
    Wanted,
    Workload,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    memory_plan,
)


def least_budget(work: Workload, backend: Backend) -> int:
    """The one that an error asks for."""
    with pytest.raises(ValueError, match="must be at least") as refused:
        memory_plan(work, backend, 1)
    return int(re.findall(r"at least (\d+)", str(refused.value))[0])


@pytest.mark.parametrize("vocab_size", [2000, 4101, 152_064])
@pytest.mark.parametrize("backend", [*Backend])
@CASES
def test_a_budget_that_is_enough_stays_enough(case, backend, vocab_size):
    """Few rows, whose tiles grow with the budget; what an error asks for is accepted."""
    work = case.workload(2, vocab_size, 64, torch.bfloat16)
    least = least_budget(work, backend)
    for percent in range(100, 6000, 7):
        budget = least * percent // 100
        assert memory_plan(work, backend, budget).workspace_bytes <= budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_live_tokens_nothing_is_summed(dtype):
    """No [V, D] fp32 sum for chunks that do not come."""
    hidden, weight = torch.randn(100, 512), torch.randn(20_000, 512)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    target, advantage = torch.full((100,), -100), torch.ones(100)
    work = Workload.of(Operator.POLICY_LOSS, *leaves, Wanted(True, True, False))
    call = functools.partial(linear_policy_loss, *leaves, target, advantage=advantage)
    sizes = allocations(lambda: torch.autograd.grad(call(backend=Backend.NATIVE).loss, leaves))
    assert peak(sizes) <= memory_plan(work, Backend.NATIVE).peak_bytes


@pytest.mark.parametrize("is_mean", [True, False])
def test_a_frozen_head_scales_d_hidden_where_it_is(is_mean):
    """Per-token results with one upstream factor or several: no fp32 copy of d_hidden."""
    hidden = torch.randn(4096, 512).bfloat16().requires_grad_()
    weight = torch.randn(64, 512).bfloat16()
    scale = torch.tensor(0.5) if is_mean else torch.rand(4096)
    work = Workload(
        *(Operator.DIVERGENCE, 4096, 64, 512, torch.bfloat16),
        wanted=Wanted(hidden=True, weight=False, bias=False),
        teacher_dim=512,
    )

    def run():
        out = linear_divergence(hidden, weight, hidden.detach(), -weight, memory_budget_bytes=2**21)
        return torch.autograd.grad((out.divergence * scale).sum(), hidden)

    assert peak(allocations(run)) <= memory_plan(work, Backend.NATIVE, 2**21).peak_bytes


def test_one_chunk_at_a_time_is_there():
    """The packed hidden states of a chunk are gone before those of the next one come."""
    hidden, weight = torch.randn(256, 4096).bfloat16(), torch.randn(100, 4096).bfloat16()
    other, teacher = torch.randn(256, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    work = Workload(
        *(Operator.DIVERGENCE, 256, 100, 4096, torch.bfloat16),
        wanted=Wanted(hidden=False, weight=False, bias=False),
        teacher_dim=64,
    )
    budget = least_budget(work, Backend.NATIVE)
    call = functools.partial(linear_divergence, hidden, weight, other, teacher)
    sizes = allocations(lambda: call(memory_budget_bytes=budget, backend=Backend.NATIVE))
    assert peak(sizes) <= memory_plan(work, Backend.NATIVE, budget).peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_of_ids_beside_logits_that_are_not_kept(dtype):
    rows, classes, dim, count = 1500, 4101, 65, 32
    hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(classes, dim).to(dtype)
    ids = torch.arange(count).repeat(rows, 1)
    teacher = torch.full((rows, count), -8.0)
    work = Workload(
        *(Operator.TOPK_DIVERGENCE, rows, classes, dim, dtype),
        wanted=Wanted(hidden=False, weight=False, bias=False),
        top_k=count,
    )
    call = functools.partial(linear_topk_divergence, hidden, weight, ids, teacher)
    assert peak(allocations(lambda: call(backend=Backend.NATIVE))) <= (
        memory_plan(work, Backend.NATIVE).peak_bytes
    )


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])
def test_a_plan_refuses_what_the_call_refuses(backend):
    """A frozen hidden: a log-prob's forward pass does not know what gradients will be asked for."""
    hidden, weight = torch.randn(16, 256), torch.randn(64, 256, requires_grad=True)
    target = torch.zeros(16, dtype=torch.int64)
    work = Workload.of(Operator.LOGPROB, hidden, weight, Wanted(False, True, False))
    least = least_budget(work, backend)
    call = functools.partial(linear_logprob, hidden, weight, target, backend=backend)
    with pytest.raises(ValueError, match=f"at least {least} "):
        call(memory_budget_bytes=least - 1)
    call(memory_budget_bytes=least).logprob.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "wanted",
    [Wanted(True, True, True), Wanted(False, False, True), Wanted(True, False, False)],
    ids=str,
)
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("operator", [Operator.POLICY_LOSS, Operator.DIVERGENCE])
def test_a_bias_of_two_bytes_is_in_the_plan(operator, softcap, backend, wanted, dtype):
    """NATIVE upcasts it for all tiles that a call of the kernels goes through."""
    rows, vocab_size, dim = 64, 40_000, 32
    leaves = [torch.randn(*shape).to(dtype) for shape in ((rows, dim), (vocab_size, dim))]
    leaves.append(torch.randn(vocab_size).to(dtype))
    hidden, weight, bias = (x.requires_grad_(y) for x, y in zip(leaves, wanted, strict=True))
    is_divergence = operator is Operator.DIVERGENCE
    work = Workload.of(operator, hidden, weight, wanted)
    work = work._replace(teacher_dim=dim * is_divergence, has_softcap=softcap is not None)
    budget = least_budget(work, backend)
    teacher = [-x.detach() for x in leaves]

    def run():
        options = {"bias": bias, "memory_budget_bytes": budget, "backend": backend}
        options["softcap"] = softcap
        if is_divergence:
            options["teacher_bias"] = teacher[2]
            loss = linear_divergence(hidden, weight, *teacher[:2], **options).divergence.sum()
        else:
            target, options["advantage"] = torch.arange(rows), torch.ones(rows)
            loss = linear_policy_loss(hidden, weight, target, **options).loss
        return torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])

    assert peak(allocations(run)) <= memory_plan(work, backend, budget).peak_bytes
