"""On a CUDA device: the divergences, and what all operators promise about streams and graphs."""

import pytest
import torch

from xopd_kernels import (
    Backend,
    Operator,
    Workload,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    memory_plan,
)
from xopd_kernels.testing import assert_within_budget, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TRITON = {"backend": Backend.TRITON}
ROWS, VOCAB_SIZE, DIM, TEACHER_DIM, TOP_K = 1031, 32_003, 520, 264, 17  # ragged
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("divergence", "hidden", "weight", "bias")


def make_pair(dtype):
    student = make_inputs(ROWS, VOCAB_SIZE, DIM, dtype, device="cuda")
    teacher = make_inputs(ROWS, VOCAB_SIZE + 64, TEACHER_DIM, dtype, device="cuda", seed=1)
    weight = torch.rand(ROWS, device="cuda")
    weight[::5] = 0.0
    return student, (teacher.hidden.detach(), teacher.weight.detach()), weight


def dense(student, teacher, weight, beta):
    """Plain torch in the dtype of the inputs, softmax in fp32 (fp64)."""
    wide = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
    z = torch.nn.functional.linear(student.hidden, student.weight, student.bias).to(wide)
    log_p = z.log_softmax(-1)
    log_q = (teacher[0] @ teacher[1][:VOCAB_SIZE].t()).to(wide).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        terms = q * (log_q - log_p)
    elif beta == 1:
        terms = p * (log_p - log_q)
    else:
        log_m = ((1 - beta) * p + beta * q).log()
        terms = beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
    return terms.sum(-1) * weight


def run(student, teacher, weight, beta):
    out = linear_divergence(
        *student[:2], *teacher, beta=beta, bias=student.bias, token_weight=weight, **TRITON
    )
    return [out.divergence, *torch.autograd.grad(out.divergence.sum(), student[:3])]


def run_top_k(student, ids, logprob, weight, beta=1.0, tail="bucket"):
    options = {"beta": beta, "tail": tail, "bias": student.bias, "token_weight": weight}
    out = linear_topk_divergence(*student[:2], ids, logprob, **options, **TRITON)
    return [out.divergence, *torch.autograd.grad(out.divergence.sum(), student[:3])]


def make_top_k(teacher):
    log_q = (teacher[0] @ teacher[1][:VOCAB_SIZE].t()).float().log_softmax(-1)
    ids = log_q.topk(TOP_K).indices
    return ids, log_q.gather(1, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_error_budget(dtype, beta):
    student, teacher, weight = make_pair(dtype)
    results = [run(student, teacher, weight, beta)]
    for x in (student, student.to(torch.float64)):
        frozen = tuple(t.to(x.hidden.dtype) for t in teacher)
        out = dense(x, frozen, weight.to(x.hidden.dtype).double(), beta)
        results.append([out, *torch.autograd.grad(out.sum(), x[:3])])
    for name, *values in zip(NAMES, *results, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "ignore"])
def test_top_k_equals_the_reference(dtype, beta, tail):
    student, teacher, weight = make_pair(dtype)
    ids, logprob = make_top_k(teacher)
    actual = run_top_k(student, ids, logprob, weight, beta, tail)
    wide = student.to(torch.float64)
    exact = linear_topk_divergence(
        *wide[:2],
        ids,
        logprob.double(),
        beta=beta,
        tail=tail,
        bias=wide.bias,
        token_weight=weight.double(),
        backend=Backend.REFERENCE,
    ).divergence
    oracle = [exact, *torch.autograd.grad(exact.sum(), wide[:3])]
    for one, other in zip(actual, oracle, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_repeats_bitwise_and_never_waits_for_the_host(beta):
    student, teacher, weight = make_pair(torch.bfloat16)
    ids, logprob = make_top_k(teacher)

    def both():
        return run(student, teacher, weight, beta) + run_top_k(student, ids, logprob, weight)

    expected = both()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [both() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in again:
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_own_upstream_gradients_are_exact():
    student, teacher, weight = make_pair(torch.float32)
    upstream = torch.randn(ROWS, device="cuda")
    out = linear_divergence(*student[:2], *teacher, token_weight=weight, **TRITON)
    actual = torch.autograd.grad((out.divergence * upstream).sum(), student[:2])
    folded = linear_divergence(*student[:2], *teacher, token_weight=weight * upstream, **TRITON)
    expected = torch.autograd.grad(folded.divergence.sum(), student[:2])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_forward_and_backward_in_a_cuda_graph():
    inputs = make_inputs(ROWS, VOCAB_SIZE, DIM, torch.bfloat16, device="cuda")
    advantage = torch.randn(ROWS, device="cuda")

    def step():
        out = linear_policy_loss(*inputs[:2], inputs.target, advantage=advantage, **TRITON)
        return [out.loss, *torch.autograd.grad(out.loss, inputs[:2])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("budget", [None, 256_000_000])
@pytest.mark.parametrize("rows", [4096, 16_384])
def test_peak_memory_is_within_the_plan(rows, budget):
    vocab_size, dim = 151_936, 1024
    hidden = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, dim, device="cuda", dtype=torch.bfloat16) / 32
    weight.requires_grad_()
    target = torch.randint(vocab_size, (rows,), device="cuda")
    teacher = torch.zeros(rows, device="cuda")
    work = Workload(Operator.POLICY_LOSS, rows, vocab_size, dim, torch.bfloat16)
    plan = memory_plan(work, Backend.TRITON, budget)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_policy_loss(
        hidden, weight, target, teacher_logprob=teacher, memory_budget_bytes=budget, **TRITON
    )
    out.loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    # The allocator rounds each tensor up to 512 bytes, and some of them to 2 MiB.
    assert extra <= plan.peak_bytes + 32 * 2**20


def test_a_head_on_another_stream():
    inputs = make_inputs(256, 1000, 64, torch.bfloat16, device="cuda")
    expected = linear_logprob(*inputs[:2], inputs.target, **TRITON).logprob
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = linear_logprob(*inputs[:2], inputs.target, **TRITON).logprob
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(actual, expected)
