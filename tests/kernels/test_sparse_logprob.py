"""gradient="sparse" of linear_logprob: the bound of every row, for any upstream gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.sparse_cases import (
    BACKENDS,
    BUDGET_BYTES,
    SLACK,
    Kind,
    Problem,
    logit_gradient,
)
from xopd_kernels import Backend, LinearLogprob, SparseLinearLogprob, linear_logprob
from xopd_kernels.linear_logprob.sparse_op import linear_logprob_sparse_op
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logprob,
    make_head,
    make_inputs,
)

ON_ALL = pytest.mark.parametrize("backend", BACKENDS)
SPARSE = {"gradient": "sparse", "max_gradient_error": 0.05}
SHAPE = (61, 400, 16)


def scored(problem, dtype, **options):
    """(the result, the gradient by the logits of -sum advantage * logprob)."""
    hidden, weight = problem.head(dtype)
    out = linear_logprob(hidden, weight, problem.target, gradient="sparse", **options)
    upstream = -problem.advantage.to(out.logprob)
    return out, logit_gradient((out.logprob * upstream).sum(), weight)


def make_case(dtype, distribution=Distribution.PEAKED):
    inputs = make_inputs(*SHAPE, dtype, distribution)
    upstream = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(1))
    upstream[::6] = 0.0
    return inputs, upstream


def gradients(out, upstream, inputs):
    loss = (out.logprob * upstream).sum()
    return torch.autograd.grad(loss, inputs[:3], allow_unused=True)


def check_rows(problem, dtype, backend, max_error, budget=None):
    call = {"max_gradient_error": max_error, "memory_budget_bytes": budget, "backend": backend}
    out, actual = scored(problem, dtype, **call)
    exact = problem.gradient()
    error, norm = ((x).abs().sum(1) for x in (actual - exact, exact))
    assert 0.0 <= float(out.gradient_error) <= max_error
    eps = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    noise = 16 * eps * problem.advantage.abs().double()
    assert (error <= (float(out.gradient_error) + SLACK) * norm + noise).all()
    bound = problem.advantage.abs().double() * out.dropped_mass.double()
    assert (error <= bound * (1 + SLACK) + SLACK * norm + noise).all()
    assert (out.dropped_mass[problem.target == -100] == 0).all()
    assert not out.dropped_mass.requires_grad
    value, _ = problem.logprob()
    torch.testing.assert_close(out.logprob.double(), value, rtol=1e-5, atol=1e-4)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(Kind),
    rows=st.integers(1, 24),
    classes=st.integers(1, 300),
    seed=st.integers(0, 10_000),
    max_error=st.sampled_from([0.0, 1e-30, 1e-3, 0.01, 0.1, 0.5, 2.0, 100.0]),
    is_cut=st.booleans(),
)
def test_the_bound_holds_for_every_row(backend, kind, rows, classes, seed, max_error, is_cut):
    problem = Problem.of(kind, rows, classes, seed)
    budget = BUDGET_BYTES if is_cut else None
    check_rows(problem, torch.float32, backend, max_error, budget)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("max_error", [0.0, 1e-30, 1e-9, 1e-3, 0.1, 1.0])
def test_the_bound_in_fp64(kind, max_error):
    out = check_rows(Problem.of(kind, 24, 200), torch.float64, Backend.REFERENCE, max_error)
    assert out.logprob.dtype == torch.float64
    assert out.dropped_mass.dtype == out.gradient_error.dtype == torch.float32


@ON_ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_something_is_left_out(backend, dtype):
    out = check_rows(Problem.of(Kind.ZIPF, 60, 500, dtype=dtype), dtype, backend, 0.2)
    assert out.gradient_error > 0.01
    assert (out.dropped_mass > 0).any()


@ON_ALL
@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_error", [0.0, 1e-30, 1e-7])
def test_no_error_is_the_exact_gradient(backend, distribution, dtype, max_error):
    """1e-7: most rows of few classes are lists, none of which lacks what fp32 would know."""
    inputs, upstream = make_case(dtype, distribution)
    call = {"gradient": "sparse", "max_gradient_error": max_error, "backend": backend}
    out = linear_logprob(*inputs[:2], inputs.target, bias=inputs.bias, **call)
    assert out.gradient_error <= max_error
    results = [[out.logprob.detach(), *gradients(out, upstream, inputs)]]
    for x in (inputs, inputs.to(torch.float64)):
        dense = dense_logprob(x.hidden, make_head(x, True), x.target)
        results.append([dense.logprob.detach(), *gradients(dense, upstream, x)])
    for name, *values in zip(("logprob", "hidden", "weight", "bias"), *results, strict=True):
        assert_within_budget(name, *values)


@ON_ALL
def test_an_error_of_0_has_the_fields_of_the_others(backend):
    """The path of "exact", but entropy and lse are detached here, too."""
    inputs, _ = make_case(torch.float32)
    call = {"needs_entropy": True, "backend": backend}
    exact = linear_logprob(*inputs[:2], inputs.target, **call)
    sparse = {"gradient": "sparse", "max_gradient_error": 0.0}
    out = linear_logprob(*inputs[:2], inputs.target, **call, **sparse)
    assert [value.requires_grad for value in out] == [True, False, False, False, False]
    assert all(one.equal(other) for one, other in zip(exact, out[:3], strict=True))


@ON_ALL
@pytest.mark.parametrize(
    "transform",
    [
        {"temperature": 0.7},
        {"softcap": 4.0},
        {"temperature": 1.3, "softcap": 6.0, "logit_scale": 0.8},
        {"logit_scale": 0.0},
    ],
    ids=str,
)
def test_bias_and_transform(backend, transform):
    """All classes fit into the lists: their entries are the exact gradient."""
    inputs = make_inputs(40, 60, 16, torch.float32, Distribution.PEAKED)
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(1))
    call = {"bias": inputs.bias, "backend": backend, **transform}
    exact = linear_logprob(*inputs[:2], inputs.target, **call)
    out = linear_logprob(*inputs[:2], inputs.target, **call, **SPARSE)
    assert (out.dropped_mass < 0.05).all()
    listed = linear_logprob(
        *inputs[:2], inputs.target, gradient="sparse", max_gradient_error=1e-9, **call
    )
    expected = gradients(exact, upstream, inputs)
    for one, other in zip(gradients(listed, upstream, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@ON_ALL
def test_everything_but_the_gradient_is_that_of_exact(backend):
    inputs, _ = make_case(torch.float32)
    call = {"softcap": 20.0, "temperature": 0.8, "needs_entropy": True, "backend": backend}
    exact = linear_logprob(*inputs[:2], inputs.target, **call)
    out = linear_logprob(*inputs[:2], inputs.target, **call, **SPARSE)
    assert type(exact) is LinearLogprob
    assert type(out) is SparseLinearLogprob
    for name, value in exact._asdict().items():
        torch.testing.assert_close(getattr(out, name), value, msg=name)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]
    assert linear_logprob(*inputs[:2], inputs.target, **SPARSE).entropy.shape == (0,)


@ON_ALL
def test_without_gradients_nothing_is_left_out(backend):
    inputs, _ = make_case(torch.float32)
    with torch.no_grad():
        out = linear_logprob(*inputs[:2], inputs.target, backend=backend, **SPARSE)
    assert type(out) is SparseLinearLogprob
    assert out.gradient_error == 0
    assert not out.dropped_mass.any()
    assert out.entropy.shape == (0,)


@ON_ALL
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tensor_changes_nothing_else(backend, frozen):
    inputs, upstream = make_case(torch.float32)
    call = {"backend": backend, **SPARSE}
    both = linear_logprob(*inputs[:2], inputs.target, **call)
    heads = [x.detach() if i == frozen else x for i, x in enumerate(inputs[:2])]
    one = linear_logprob(*heads, inputs.target, **call)
    assert torch.equal(one.dropped_mass, both.dropped_mass)
    values = [(x.logprob * upstream).sum() for x in (both, one)]
    expected = torch.autograd.grad(values[0], inputs[1 - frozen])[0]
    (actual,) = torch.autograd.grad(values[1], heads[1 - frozen])
    torch.testing.assert_close(actual, expected)


@ON_ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_main_grad_takes_the_same_gradient(backend, dtype):
    found = []
    for has_main_grad in (False, True):
        inputs, upstream = make_case(dtype)
        if has_main_grad:
            inputs.weight.main_grad = torch.ones(SHAPE[1:])
        call = {"memory_budget_bytes": 100_000, "backend": backend, **SPARSE}
        out = linear_logprob(*inputs[:2], inputs.target, **call)
        (out.logprob * upstream).sum().backward()
        total = inputs.weight.main_grad - 1 if has_main_grad else inputs.weight.grad.float()
        found.append((total, inputs.hidden.grad))
    torch.testing.assert_close(*(x[0] for x in found), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(*(x[1] for x in found))


@ON_ALL
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_the_budget_does_not_change_the_result(backend, softcap):
    """The rule is one of each row by itself; the last chunk is smaller than a block of rows."""
    inputs = make_inputs(301, 400, 16, torch.float32, Distribution.PEAKED)
    upstream = torch.randn(301, generator=torch.Generator().manual_seed(1))
    target = inputs.target.clamp(min=0)
    call = {"bias": inputs.bias, "softcap": softcap, "backend": backend, **SPARSE}
    results = []
    for budget in (520_000, None):
        out = linear_logprob(*inputs[:2], target, memory_budget_bytes=budget, **call)
        results.append([*out, *gradients(out, upstream, inputs)])
    assert (results[0][3] > 0).any()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@ON_ALL
def test_masked_rows_and_leading_dimensions(backend):
    inputs, upstream = make_case(torch.float32)
    shape, rows = (3, 20), 60
    hidden, target = inputs.hidden[:rows], inputs.target[:rows]
    call = {"backend": backend, **SPARSE}
    out = linear_logprob(hidden.view(*shape, -1), inputs.weight, target.view(shape), **call)
    assert out.logprob.shape == out.lse.shape == out.dropped_mass.shape == shape
    is_live = target != -100
    few = linear_logprob(hidden[is_live], inputs.weight, target[is_live], **call)
    assert (out.dropped_mass.view(-1)[~is_live] == 0).all()
    torch.testing.assert_close(out.dropped_mass.view(-1)[is_live], few.dropped_mass)
    weight = upstream[:rows]
    losses = [(out.logprob.view(-1) * weight).sum(), (few.logprob * weight[is_live]).sum()]
    one, other = (torch.autograd.grad(x, inputs.weight)[0] for x in losses)
    torch.testing.assert_close(one, other)


@ON_ALL
def test_no_rows(backend):
    inputs, _ = make_case(torch.float32)
    for target in (torch.full_like(inputs.target, -100), inputs.target[:0]):
        call = {"backend": backend, **SPARSE}
        out = linear_logprob(inputs.hidden[: len(target)], inputs.weight, target, **call)
        assert out.gradient_error == 0
        (grad,) = torch.autograd.grad(out.logprob.sum(), inputs.weight)
        assert not grad.any()


@ON_ALL
def test_bitwise_repeatable(backend):
    inputs, upstream = make_case(torch.bfloat16)
    call = {"memory_budget_bytes": 100_000, "backend": backend, **SPARSE}
    runs = [linear_logprob(*inputs[:2], inputs.target, **call) for _ in range(2)]
    values = [[*out, *gradients(out, upstream, inputs)[:2]] for out in runs]
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


def test_opcheck():
    x = make_inputs(6, 90, 5, torch.float32)
    scalars = (0.9, 5.0, 1.0, -100, True, 0.1, None, "reference")
    args = (x.hidden, x.weight, x.bias, x.target, None, *scalars)
    torch.library.opcheck(linear_logprob_sparse_op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    inputs, upstream = make_case(torch.float32)

    def loss(hidden, weight, target, upstream):
        out = linear_logprob(hidden * 2, weight, target, **SPARSE)
        return (out.logprob * upstream).sum(), out.gradient_error

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (61, 40) if dynamic else (61,):
        args = (inputs.hidden[:rows], inputs.weight, inputs.target[:rows], upstream[:rows])
        expected = torch.autograd.grad(loss(*args)[0], inputs[:2])
        actual = torch.autograd.grad(compiled(*args)[0], inputs[:2])
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_double_backward_raises():
    inputs, _ = make_case(torch.float32)
    out = linear_logprob(*inputs[:2], inputs.target, **SPARSE)
    (grad,) = torch.autograd.grad(out.logprob.sum(), inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "unbiased"}, ValueError, 'gradient must be "exact" or "sparse"'),
        ({"gradient": "sparse"}, ValueError, "max_gradient_error must be given"),
        ({"max_gradient_error": 0.1}, ValueError, "max_gradient_error must be None"),
        ({**SPARSE, "max_gradient_error": -1.0}, ValueError, "max_gradient_error must be finite"),
        ({**SPARSE, "max_gradient_error": True}, TypeError, "max_gradient_error must be a num"),
    ],
    ids=str,
)
def test_wrong_keywords(options, error, message):
    inputs, _ = make_case(torch.float32)
    with pytest.raises(error, match=message):
        linear_logprob(*inputs[:2], inputs.target, **options)


def test_a_token_that_is_nearly_certain_keeps_its_own_entry():
    """1 - p is summed over the other classes: the rounded log p has none of its digits."""
    logits = torch.zeros(3, 64)
    logits[:, 5] = torch.tensor([20.0, 40.0, 60.0])
    weight = logits.t().contiguous().requires_grad_()
    hidden, target = torch.eye(3), torch.full((3,), 5)
    out = linear_logprob(
        hidden, weight, target, gradient="sparse", max_gradient_error=0.1, backend=Backend.NATIVE
    )
    out.logprob.sum().backward()
    rest = 63 * (-logits[:, 5].double()).exp()
    torch.testing.assert_close(weight.grad[5].double(), rest / (1 + rest), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_handed_out_may_be_changed(backend):
    """Metrics are masked and reduced in place; the backward pass keeps its own."""
    inputs = make_inputs(*SHAPE, torch.float32)
    found = []
    for factor in (1.0, 0.0):
        call = {"backend": backend, "needs_entropy": True, **SPARSE}
        out = linear_logprob(*inputs[:2], inputs.target, **call)
        for values in out[1:]:
            values.mul_(factor)
        found.append(torch.autograd.grad(out.logprob.sum(), inputs[:2]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
