"""On a CUDA device: error budget, bitwise repeats, no host synchronisation, peak memory."""

import pytest
import torch

from xopd_kernels import (
    Backend,
    Operator,
    Workload,
    linear_logprob,
    linear_policy_loss,
    memory_plan,
)
from xopd_kernels.records import PolicyTerms, Wanted
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logprob,
    dense_policy_loss,
    make_head,
    make_inputs,
    make_terms,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TRITON = {"backend": Backend.TRITON}
SHAPE = (1031, 32_003, 520)  # ragged


def make_case(dtype, distribution=Distribution.RANDOM, shape=SHAPE):
    inputs = make_inputs(*shape, dtype, distribution, device="cuda")
    logprob = dense_logprob(inputs.hidden, make_head(inputs), inputs.target).logprob
    return inputs, make_terms(logprob)


def run_policy_loss(inputs, terms):
    out = linear_policy_loss(
        *inputs[:2],
        inputs.target,
        bias=inputs.bias,
        advantage=terms.teacher_logprob,
        token_weight=terms.token_weight,
        **TRITON,
    )
    return [out.loss, out.logprob, *torch.autograd.grad(out.loss, inputs[:3])]


def run_logprob(inputs):
    rows = linear_logprob(
        *inputs[:2], inputs.target, bias=inputs.bias, needs_entropy=True, **TRITON
    )
    total = rows.logprob.sum() + 0.3 * rows.entropy.sum()
    return [*rows, *torch.autograd.grad(total, inputs[:3])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("distribution", Distribution)
def test_policy_loss_error_budget(dtype, distribution):
    inputs, terms = make_case(dtype, distribution)
    given = PolicyTerms(None, terms.teacher_logprob, None, terms.token_weight, 0.2, 0.2, 10.0)
    results = [run_policy_loss(inputs, terms)[1:]]
    for x in (inputs, inputs.to(torch.float64)):
        out = dense_policy_loss(x.hidden, make_head(x, True), x.target, given)
        grads = torch.autograd.grad(out.loss, x[:3])
        results.append([out.logprob * (terms.token_weight != 0), *grads])
    for name, *values in zip(("logprob", "hidden", "weight", "bias"), *results, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("distribution", Distribution)
def test_logprob_error_budget(dtype, distribution):
    inputs, _ = make_case(dtype, distribution)
    results = [run_logprob(inputs)]
    for x in (inputs, inputs.to(torch.float64)):
        rows = dense_logprob(x.hidden, make_head(x, True), x.target)
        total = rows.logprob.sum() + 0.3 * rows.entropy.sum()
        results.append([*rows, *torch.autograd.grad(total, x[:3])])
    names = ("logprob", "lse", "entropy", "hidden", "weight", "bias")
    for name, *values in zip(names, *results, strict=True):
        assert_within_budget(name, *values)


def test_repeats_bitwise():
    inputs, terms = make_case(torch.bfloat16)
    expected = run_policy_loss(inputs, terms) + run_logprob(inputs)
    for _ in range(20):
        again = run_policy_loss(inputs, terms) + run_logprob(inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_no_host_synchronisation():
    inputs, terms = make_case(torch.bfloat16)
    run_policy_loss(inputs, terms)  # compiles
    run_logprob(inputs)
    main_grad = torch.zeros(SHAPE[1:], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_policy_loss(inputs, terms)
        run_logprob(inputs)
        inputs.weight.main_grad = main_grad
        options = {"advantage": terms.teacher_logprob, "main_grad_ahead": True, **TRITON}
        linear_policy_loss(*inputs[:2], inputs.target, **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert main_grad.any()


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_target_out_of_range_is_nan(backend):
    inputs, _ = make_case(torch.bfloat16)
    target = inputs.target.clone()
    target[:2] = torch.tensor([SHAPE[1], -1])
    out = linear_logprob(*inputs[:2], target, backend=backend)
    assert out.logprob[:2].isnan().all()
    assert out.logprob[2:].isfinite().all()


@pytest.mark.parametrize("rows", [4096, 16_384])
def test_peak_memory_does_not_grow_with_the_logits(rows):
    hidden = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 1024, device="cuda", dtype=torch.bfloat16) / 32
    target = torch.randint(len(weight), (rows,), device="cuda")
    teacher = torch.zeros(rows, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_policy_loss(hidden, weight, target, teacher_logprob=teacher, **TRITON).loss
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    wanted = Wanted(hidden=True, weight=False, bias=False)
    work = Workload(Operator.POLICY_LOSS, rows, len(weight), 1024, torch.bfloat16, wanted)
    plan = memory_plan(work, Backend.TRITON)
    assert plan.workspace_bytes <= 640_000_000
    assert 0.8 * plan.peak_bytes <= extra <= plan.peak_bytes
