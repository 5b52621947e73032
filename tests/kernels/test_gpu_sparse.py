"""Sparse gradients on a CUDA device: the bound, repeats, no host synchronisation, memory."""

import pytest
import torch

from tests.kernels.sparse_cases import Kind, row_of
from xopd_kernels import (
    Backend,
    Operator,
    Workload,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    memory_plan,
)
from xopd_kernels.records import Wanted
from xopd_kernels.testing import Distribution, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TRITON = {"backend": Backend.TRITON}
SPARSE = {"gradient": "sparse", "max_gradient_error": 0.1, **TRITON}
UNBIASED = {"gradient": "unbiased", "max_gradient_error": 0.1, "gradient_seed": 5, **TRITON}
MODES = pytest.mark.parametrize("mode", [SPARSE, UNBIASED], ids=lambda mode: mode["gradient"])
SHAPE = (1031, 32_003, 520)  # ragged
BUDGET_BYTES = 70_000_000  # several chunks


def signal(rows):
    """Advantages or weights of very different sizes, some 0."""
    rng = torch.Generator().manual_seed(1)
    size = 10.0 ** (-3 * torch.rand(rows, generator=rng))
    values = torch.randn(rows, generator=rng) * size
    return values.masked_fill(torch.arange(rows) % 7 == 3, 0.0).cuda()


def teacher_of(rows, classes, count=9):
    rng = torch.Generator("cuda").manual_seed(2)
    logits = 3 * torch.randn(rows, classes, generator=rng, device="cuda")
    logprob, ids = logits.log_softmax(1).topk(count)
    return ids, logprob


def run(inputs, operator, **options):
    """(the result, its sum as it is differentiated)."""
    weight = signal(len(inputs.hidden))
    call = {"bias": inputs.bias, **options}
    if operator is linear_topk_divergence:
        teacher = teacher_of(len(inputs.hidden), len(inputs.weight))
        out = operator(*inputs[:2], *teacher, beta=0.4, token_weight=weight, **call)
        return out, out.divergence.sum()
    if operator is linear_logprob:
        out = operator(*inputs[:2], inputs.target, **call)
        return out, (out.logprob * weight).sum()
    out = operator(*inputs[:2], inputs.target, advantage=weight, **call)
    return out, out.loss


def both(inputs, operator, **options):
    out, loss = run(inputs, operator, **options)
    return [*out, *torch.autograd.grad(loss, inputs[:3])]


def logit_gradient(operator, logits, **options):
    """(the result, the gradient [N, V] by the logits, which are the weight of an identity)."""
    hidden = torch.eye(len(logits), device="cuda")
    weight = logits.t().contiguous().requires_grad_()
    inputs = make_inputs(len(logits), logits.shape[1], 4, torch.float32, device="cuda")
    inputs = inputs._replace(hidden=hidden, weight=weight, bias=None)
    out, loss = run(inputs, operator, **options)
    return out, torch.autograd.grad(loss, weight)[0].t().double()


@pytest.mark.parametrize("operator", [linear_policy_loss, linear_logprob, linear_topk_divergence])
@pytest.mark.parametrize("kind", Kind)
def test_bound(kind, operator):
    """The full fp32 products of an identity: what differs was left out."""
    rng = torch.Generator().manual_seed(0)
    kinds = [x for x in Kind if x is not Kind.MIXED]
    rows = [row_of(kinds[i % 6] if kind is Kind.MIXED else kind, 20_011, rng) for i in range(300)]
    logits = torch.stack(rows).float().cuda()
    exact = logit_gradient(operator, logits, **TRITON)[1]
    out, actual = logit_gradient(operator, logits, **SPARSE, memory_budget_bytes=BUDGET_BYTES)
    norm = exact.abs().sum()
    assert 0 <= out.gradient_error <= 0.1
    assert (actual - exact).abs().sum() <= (out.gradient_error + 1e-4) * norm


@pytest.mark.parametrize("operator", [linear_policy_loss, linear_logprob, linear_topk_divergence])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_error_allowed_is_the_exact_gradient(dtype, operator):
    inputs = make_inputs(*SHAPE, dtype, Distribution.PEAKED, device="cuda")
    options = {**SPARSE, "max_gradient_error": 1e-30, "memory_budget_bytes": BUDGET_BYTES}
    sparse, exact = (both(inputs, operator, **x)[-3:] for x in (options, TRITON))
    for one, other in zip(sparse, exact, strict=True):
        assert (one.float() - other.float()).norm() <= 5e-3 * other.float().norm()


@MODES
def test_repeats_bitwise(mode):
    inputs = make_inputs(*SHAPE, torch.bfloat16, Distribution.PEAKED, device="cuda")
    runs = [(linear_policy_loss, mode), (linear_logprob, SPARSE), (linear_topk_divergence, SPARSE)]
    for operator, options in runs:
        expected = both(inputs, operator, **options)
        for _ in range(10):
            again = both(inputs, operator, **options)
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@MODES
def test_no_host_synchronisation(mode):
    inputs = make_inputs(*SHAPE, torch.bfloat16, Distribution.PEAKED, device="cuda")
    weight, teacher = signal(SHAPE[0]), teacher_of(*SHAPE[:2])

    def step():
        call = {"advantage": weight, **mode}
        linear_policy_loss(*inputs[:2], inputs.target, **call).loss.backward()
        (linear_logprob(*inputs[:2], inputs.target, **SPARSE).logprob * weight).sum().backward()
        call = {"token_weight": weight, **SPARSE}
        linear_topk_divergence(*inputs[:2], *teacher, **call).divergence.sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_in_a_cuda_graph():
    inputs = make_inputs(*SHAPE, torch.bfloat16, Distribution.PEAKED, device="cuda")
    weight = signal(SHAPE[0])

    def step():
        out = linear_policy_loss(*inputs[:2], inputs.target, advantage=weight, **SPARSE)
        return [out.loss, *torch.autograd.grad(out.loss, inputs[:2])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs.hidden.mul_(0.5)
    graph.replay()
    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("rows", [4096, 16_384])
def test_peak_memory_is_as_planned(rows):
    hidden = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 1024, device="cuda", dtype=torch.bfloat16) / 32
    target = torch.randint(len(weight), (rows,), device="cuda")
    teacher = torch.zeros(rows, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(hidden, weight, target, teacher_logprob=teacher, **SPARSE).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    wanted = Wanted(hidden=True, weight=False, bias=False)
    work = Workload(Operator.POLICY_LOSS, rows, len(weight), 1024, torch.bfloat16, wanted)
    plan = memory_plan(work._replace(is_sparse=True), Backend.TRITON)
    # The allocator rounds each tensor up to 512 bytes, and some of them to 2 MiB.
    assert extra <= plan.peak_bytes + 32 * 2**20
