"""The Triton kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

import contextlib
import os

import pytest
import torch

from xopd_kernels import (
    Backend,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
)
from xopd_kernels.chunk import call
from xopd_kernels.records import PolicyTerms
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logprob,
    dense_policy_loss,
    make_head,
    make_inputs,
    make_terms,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
narrow = pytest.importorskip("xopd_kernels.tile.dot").narrow

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs TRITON_INTERPRET=1, set before triton is imported: a process of its own",
    ),
    # Rows beyond the live ones are computed on zeros and never stored.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
    # Triton 3.6 under numpy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLAIN: dict[str, float] = {}
ALL = {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8}  # with a bias and peaked inputs
# (N, V, D), transform, rows of a chunk (None: as the table says). All ragged; 1100 classes are
# several slabs.
CASES = [
    ((1, 1, 1), PLAIN, None),
    ((70, 300, 33), PLAIN, 48),
    ((70, 300, 33), ALL, None),
    ((40, 1100, 20), ALL, 24),
]
TRITON = {"backend": Backend.TRITON}


def set_chunk_rows(monkeypatch, chunk):
    if chunk is not None:
        monkeypatch.setattr(call, "chunk_rows", lambda work, backend, budget: chunk)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs[:3], allow_unused=True)


def project(rows):
    rng = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=rng)).sum() for x in rows)


def assert_budget(names, actual, baseline, oracle):
    for name, *values in zip(names, actual, baseline, oracle, strict=True):
        if values[2] is not None:
            assert_within_budget(name, *values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "transform", "chunk"), CASES)
def test_logprob(dtype, shape, transform, chunk, monkeypatch):
    set_chunk_rows(monkeypatch, chunk)
    has_bias = bool(transform)
    inputs = make_inputs(*shape, dtype, Distribution.PEAKED if has_bias else Distribution.RANDOM)
    bias = inputs.bias if has_bias else None
    rows = linear_logprob(
        *inputs[:2], inputs.target, bias=bias, needs_entropy=True, **transform, **TRITON
    )
    results = [[*rows, *gradients(project(rows), inputs)]]
    for x in (inputs, inputs.to(torch.float64)):
        rows = dense_logprob(x.hidden, make_head(x, has_bias, **transform), x.target)
        results.append([*rows, *gradients(project(rows), x)])
    assert_budget(("logprob", "lse", "entropy", "hidden", "weight", "bias"), *results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "transform", "chunk"), CASES)
def test_policy_loss(dtype, shape, transform, chunk, monkeypatch):
    set_chunk_rows(monkeypatch, chunk)
    has_bias = bool(transform)
    inputs = make_inputs(*shape, dtype, Distribution.PEAKED if has_bias else Distribution.RANDOM)
    exact = inputs.to(torch.float64)
    logprob = dense_logprob(inputs.hidden, make_head(inputs), inputs.target).logprob
    teacher, _, weight = make_terms(logprob)
    bias = inputs.bias if has_bias else None
    call = {"advantage": teacher, "token_weight": weight, "bias": bias, **transform}
    out = linear_policy_loss(*inputs[:2], inputs.target, **call, **TRITON)
    results = [[out.logprob, *gradients(out.loss, inputs)]]
    terms = PolicyTerms(None, teacher, None, weight, 0.2, 0.2, 10.0)
    for x in (inputs, exact):
        head = make_head(x, has_bias, **transform)
        dense = dense_policy_loss(x.hidden, head, x.target, terms)
        results.append([dense.logprob * (weight != 0), *gradients(dense.loss, x)])
    assert_budget(("logprob", "hidden", "weight", "bias"), *results)


@pytest.mark.parametrize("offset", [-1024.0, 8192.0])
@pytest.mark.parametrize("op", ["logprob", "policy"])
def test_gradients_of_a_common_offset(op, offset):
    """lse rounds to ulp(offset): gradients by way of exp(z - lse) would be off by as much."""
    inputs = make_inputs(40, 300, 20, torch.float32, offset=offset)
    advantage = torch.randn(40, generator=torch.Generator().manual_seed(1))
    results = []
    for x in (inputs, inputs, inputs.to(torch.float64)):
        head = make_head(x, True)
        if op == "logprob" and not results:
            call = {"bias": x.bias, "needs_entropy": True, **TRITON}
            value = project(linear_logprob(*x[:2], x.target, **call))
        elif op == "logprob":
            value = project(dense_logprob(x.hidden, head, x.target))
        elif not results:
            call = {"bias": x.bias, "advantage": advantage, **TRITON}
            value = linear_policy_loss(*x[:2], x.target, **call).loss
        else:
            terms = PolicyTerms(None, advantage, None, None, 0.2, 0.2, 10.0)
            value = dense_policy_loss(x.hidden, head, x.target, terms).loss
        results.append(gradients(value, x))
    assert_budget(("hidden", "weight", "bias"), *results)


@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_policy_terms_equal_the_reference(has_old, has_teacher):
    inputs = make_inputs(130, 90, 20, torch.float32)
    row = linear_logprob(*inputs[:2], inputs.target, backend=Backend.REFERENCE)
    terms = make_terms(row.logprob)
    signal = "teacher_logprob" if has_teacher else "advantage"
    call = {signal: terms.teacher_logprob, "token_weight": terms.token_weight}
    call |= {"clip_low": 0.1, "clip_high": 0.3, "advantage_clamp": 0.8}
    if has_old:
        call["old_logprob"] = terms.old_logprob
    actual, expected = (
        linear_policy_loss(*inputs[:2], inputs.target, **call, backend=backend)
        for backend in (Backend.TRITON, Backend.REFERENCE)
    )
    assert expected.is_clipped.any() == has_old
    for name, one, other in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)
    for one, other in zip(*(gradients(x.loss, inputs) for x in (actual, expected)), strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_tiles_of_minus_inf():
    """The first slabs hold nothing but -inf: a running maximum must survive that."""
    inputs = make_inputs(5, 1100, 16, torch.float32)
    bias = torch.zeros(1100)
    bias[:700] = -torch.inf
    target = torch.tensor([0, 700, 900, 1099, -100])
    rows = linear_logprob(*inputs[:2], target, bias=bias, needs_entropy=True, **TRITON)
    expected = linear_logprob(*inputs[:2], target, bias=bias, needs_entropy=True)
    assert rows.logprob[0] == -torch.inf
    for one, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(one, other)
    total = rows.logprob[1:].sum() + rows.entropy.sum()
    assert all(x.isfinite().all() for x in torch.autograd.grad(total, inputs[:2]))


def test_ignored_rows_are_not_read_and_keep_zero():
    inputs = make_inputs(40, 90, 20, torch.float32)
    dead = inputs.target == -100
    hidden = inputs.hidden.detach().masked_fill(dead[:, None], torch.nan).requires_grad_()
    out = linear_policy_loss(
        hidden, inputs.weight, inputs.target, advantage=torch.ones(40), **TRITON
    )
    grads = torch.autograd.grad(out.loss, (hidden, inputs.weight))
    assert all(x.isfinite().all() for x in (out.loss, *grads))
    assert all((field[dead] == 0).all() for field in (*out[1:], grads[0]))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_live_rows(rows):
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.full((rows,), -100)
    out = linear_policy_loss(hidden, weight, target, advantage=torch.ones(rows), **TRITON)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    assert all((x == 0).all() for x in (out.loss, *grads))


def test_strided_weight_and_repeat_bitwise():
    inputs = make_inputs(40, 90, 20, torch.bfloat16)
    wide = torch.randn(90, 33).bfloat16()
    wide[:, :20] = inputs.weight.detach()
    column_major = inputs.weight.detach().t().contiguous().t()

    def run(weight):
        weight = weight.detach().requires_grad_()
        out = linear_policy_loss(
            inputs.hidden, weight, inputs.target, advantage=torch.ones(40), **TRITON
        )
        return [out.loss, out.logprob, *torch.autograd.grad(out.loss, (inputs.hidden, weight))]

    expected = run(inputs.weight)
    for weight in (inputs.weight, wide[:, :20], column_major):
        assert all(torch.equal(a, b) for a, b in zip(run(weight), expected, strict=True))


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("op", ["logprob", "policy", "policy ahead"])
def test_main_grad_takes_every_chunk_and_keeps_what_it_holds(op, chunk, monkeypatch):
    set_chunk_rows(monkeypatch, chunk)
    inputs = make_inputs(70, 90, 20, torch.bfloat16)
    advantage = torch.linspace(-1.0, 1.0, 70)

    def loss(x, **backend):
        if op == "logprob":
            return (linear_logprob(*x[:2], x.target, **backend).logprob * advantage).sum()
        if op == "policy ahead" and backend:
            options = {"token_weight": torch.full((70,), 0.7), "main_grad_ahead": True, **backend}
            return linear_policy_loss(*x[:2], x.target, advantage=advantage, **options).loss
        return 0.7 * linear_policy_loss(*x[:2], x.target, advantage=advantage, **backend).loss

    exact = inputs.to(torch.float64)
    (expected,) = torch.autograd.grad(loss(exact), exact.weight)
    inputs.weight.main_grad = torch.full((90, 20), 3.0)
    for _ in range(2):
        loss(inputs, **TRITON).backward()
    added = (inputs.weight.main_grad - 3.0).double() / 2
    assert inputs.weight.grad is None
    assert (added - expected).norm() < 4e-3 * expected.norm()  # bf16 d_logit


@pytest.mark.parametrize("operator", [linear_divergence, linear_topk_divergence])
def test_the_forward_pass_of_a_divergence_adds_to_main_grad(operator, monkeypatch):
    set_chunk_rows(monkeypatch, 24)
    student, teacher = (make_inputs(70, 90, 20, torch.bfloat16, seed=seed) for seed in (0, 1))
    ids = torch.arange(70)[:, None] + torch.arange(5)
    is_full = operator is linear_divergence
    heads = teacher[:2] if is_full else (ids, torch.full(ids.shape, -2.0))
    main_grads = []
    for is_ahead in (False, True):
        student.weight.main_grad = torch.full((90, 20), 0.5)
        options = {"token_weight": torch.full((70,), 0.7), "main_grad_ahead": is_ahead, **TRITON}
        loss = operator(*student[:2], *heads, **options).divergence.sum()
        assert (student.weight.main_grad != 0.5).any() == is_ahead
        loss.backward()
        main_grads.append(student.weight.main_grad)
    torch.testing.assert_close(*main_grads, rtol=1e-5, atol=1e-6)


def test_target_out_of_range_raises_on_the_cpu():
    inputs = make_inputs(3, 9, 4, torch.float32)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 9\)"):
        linear_logprob(*inputs[:2], torch.tensor([0, 9, -100]), **TRITON)


@triton.jit
def narrow_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, narrow(tl.load(x_ptr + at), out_ptr.dtype.element_ty))


def test_narrow_rounds_to_nearest_even():
    """The stock interpreter truncates; half of all values would differ."""
    x = torch.cat((torch.randn(4094), torch.tensor([torch.inf, 1e-40])))
    out = torch.empty(4096, dtype=torch.bfloat16)
    narrow_kernel[(1,)](x, out, 4096)
    assert torch.equal(out, x.bfloat16())


@pytest.mark.parametrize("op", ["score", "gradient", "policy"])
def test_every_launch_is_on_the_device_of_its_tensors(op, monkeypatch):
    from xopd_kernels import target
    from xopd_kernels.chunk import triton as chunk
    from xopd_kernels.linear_policy_loss import triton as policy

    guards: list[int] = []  # those that are open
    unguarded: list[str] = []

    @contextlib.contextmanager
    def guard(tensor):
        guards.append(tensor.get_device())
        yield
        guards.pop()

    class Watched:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            if not guards:
                unguarded.append(self.name)
            return self.kernel[grid]

    monkeypatch.setattr(target, "device_guard", guard)
    monkeypatch.setattr(policy, "device_guard", guard)
    for module in (chunk, policy):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Watched(name, getattr(module, name)))
    x = make_inputs(6, 9, 5, torch.float32)
    if op == "policy":
        out = linear_policy_loss(*x[:2], x.target, advantage=torch.ones(6), **TRITON).loss
    else:
        out = linear_logprob(*x[:2], x.target, needs_entropy=True, **TRITON).logprob.sum()
    if op == "gradient":
        out.backward()
    assert unguarded == []
