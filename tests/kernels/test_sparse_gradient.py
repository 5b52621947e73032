"""gradient="sparse" and "unbiased" of linear_policy_loss: the bound, the exact limit, the seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.sparse_cases import (
    BACKENDS,
    BUDGET_BYTES,
    MODES,
    SHAPE,
    SPARSE,
    Kind,
    Problem,
    assert_bound,
    error_of,
    make_case,
    policy,
)
from xopd_kernels import Backend, PolicyLoss, SparsePolicyLoss, linear_policy_loss
from xopd_kernels.records import PolicyTerms
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_policy_loss,
    make_head,
)
from xopd_kernels.testing.cases import rounding_of_factors

ON_ALL = pytest.mark.parametrize("backend", BACKENDS)
IN_MODES = pytest.mark.parametrize("mode", MODES, ids=str)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs[:3], allow_unused=True)


def check_bound(problem, dtype, backend, mode, max_error, budget=None):
    call = {"max_gradient_error": max_error, "backend": backend, "memory_budget_bytes": budget}
    out, actual = policy(problem, dtype, **mode, **call)
    exact = problem.gradient()
    rounding = rounding_of_factors(dtype, len(problem.logits), backend)  # hidden is [N, N]
    assert_bound(problem, actual, exact, out.gradient_error, max_error, rounding)
    has_gradient = (problem.target != -100) & (problem.advantage != 0)
    assert (out.dropped_mass[~has_gradient] == 0).all()
    assert (out.dropped_mass >= 0).all()
    assert (out.dropped_mass <= 1 + 1e-5).all()
    value, _ = problem.logprob()
    torch.testing.assert_close(out.logprob.double(), value.detach(), rtol=1e-5, atol=1e-4)
    return out, actual, exact


@pytest.mark.parametrize("backend", BACKENDS)
@IN_MODES
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(Kind),
    rows=st.integers(1, 24),
    classes=st.integers(1, 300),
    seed=st.integers(0, 10_000),
    max_error=st.sampled_from([0.0, 1e-30, 1e-3, 0.01, 0.1, 0.5, 2.0, 100.0]),
    is_cut=st.booleans(),
)
def test_the_bound_holds(backend, mode, kind, rows, classes, seed, max_error, is_cut):
    problem = Problem.of(kind, rows, classes, seed)
    budget = BUDGET_BYTES if is_cut else None
    check_bound(problem, torch.float32, backend, mode, max_error, budget)


@IN_MODES
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(Kind),
    seed=st.integers(0, 10_000),
    max_error=st.sampled_from([0.0, 1e-30, 1e-9, 1e-3, 0.1, 1.0]),
)
def test_the_bound_in_fp64_is_what_is_left_out(mode, kind, seed, max_error):
    problem = Problem.of(kind, 24, 200, seed)
    call = (problem, torch.float64, Backend.REFERENCE, mode, max_error)
    out, actual, exact = check_bound(*call)
    error, norm = error_of(actual, exact)
    if mode["gradient"] == "sparse":
        assert error == pytest.approx(float(out.gradient_error) * norm, rel=1e-6, abs=1e-12)


@ON_ALL
@IN_MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bound_in_every_dtype(backend, mode, dtype):
    problem = Problem.of(Kind.MIXED, 60, 500, dtype=dtype)
    if dtype == torch.float16:
        problem = problem._replace(logits=problem.logits.clamp(-1e3, 1e3).half().double())
    out, *_ = check_bound(problem, dtype, backend, mode, 0.1)
    assert out.gradient_error > 0.01


@ON_ALL
@pytest.mark.parametrize("kind", Kind)
def test_dropped_mass_is_that_of_the_classes_without_an_entry(backend, kind):
    problem = Problem.of(kind, 40, 300)
    call = {"gradient": "sparse", "max_gradient_error": 0.2, "backend": backend}
    out, actual = policy(problem, torch.float32, **call)
    p = problem.logits.softmax(1)
    has_gradient = (problem.target != -100) & (problem.advantage != 0)
    missing = torch.where(actual == 0, p, 0.0)
    target = problem.target.clamp(min=0)[:, None]
    missing = missing.scatter(1, target, 0.0).sum(1) * has_gradient
    # fp32 gives certain rows 1 - p = 0, which is no entry left out.
    torch.testing.assert_close(out.dropped_mass.double(), missing, rtol=1e-4, atol=1e-6)


@ON_ALL
@IN_MODES
@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_error", [0, 1e-30])
def test_no_error_is_the_exact_gradient(backend, mode, distribution, dtype, max_error):
    """1e-30: by the rule, whose rows are dense or lists that lack nothing."""
    inputs, advantage = make_case(dtype, distribution)
    call = {"advantage": advantage, "bias": inputs.bias, "backend": backend, **mode}
    out = linear_policy_loss(*inputs[:2], inputs.target, max_gradient_error=max_error, **call)
    assert out.gradient_error <= max_error
    assert (out.dropped_mass <= max_error).all()
    given = PolicyTerms(None, advantage, None, None, 0.2, 0.2, 10.0)
    results = [[out.logprob, *gradients(out.loss, inputs)]]
    for x in (inputs, inputs.to(torch.float64)):
        dense = dense_policy_loss(x.hidden, make_head(x, True), x.target, given)
        results.append([dense.logprob, *gradients(dense.loss, x)])
    for name, *values in zip(("logprob", "hidden", "weight", "bias"), *results, strict=True):
        assert_within_budget(name, *values)


@ON_ALL
@IN_MODES
def test_an_error_of_0_is_exact_to_the_bit(backend, mode):
    """It takes the path of "exact", without lists."""
    inputs, advantage = make_case(torch.bfloat16)
    call = {"advantage": advantage, "bias": inputs.bias, "backend": backend}
    exact = linear_policy_loss(*inputs[:2], inputs.target, **call)
    out = linear_policy_loss(*inputs[:2], inputs.target, max_gradient_error=0.0, **mode, **call)
    assert type(out) is SparsePolicyLoss
    for one, other in zip(exact, out[:6], strict=True):
        assert one.equal(other)
    for one, other in zip(gradients(exact.loss, inputs), gradients(out.loss, inputs), strict=True):
        assert one.equal(other)
    assert out.gradient_error == 0 and out.dropped_mass.count_nonzero() == 0
    assert not any(value.requires_grad for value in out[1:])


@ON_ALL
@IN_MODES
def test_everything_but_the_gradient_is_that_of_exact(backend, mode):
    inputs, advantage = make_case(torch.float32)
    call = {"advantage": advantage, "softcap": 20.0, "temperature": 0.8, "backend": backend}
    exact = linear_policy_loss(*inputs[:2], inputs.target, **call)
    out = linear_policy_loss(*inputs[:2], inputs.target, max_gradient_error=0.1, **mode, **call)
    assert type(exact) is PolicyLoss
    assert type(out) is SparsePolicyLoss
    for name, value in exact._asdict().items():
        torch.testing.assert_close(getattr(out, name), value, msg=name)
    assert not any(value.requires_grad for value in out[1:])


@ON_ALL
@IN_MODES
@pytest.mark.parametrize(
    "transform",
    [
        {"temperature": 0.7},
        {"softcap": 4.0},
        {"temperature": 1.3, "softcap": 6.0, "logit_scale": 0.8},
    ],
    ids=str,
)
def test_bias_and_transform(backend, mode, transform):
    """The entries that stay are those of the exact gradient, whatever lies before the softmax."""
    inputs, advantage = make_case(torch.float32)
    call = {"advantage": advantage, "bias": inputs.bias, "backend": backend, **transform}
    exact = linear_policy_loss(*inputs[:2], inputs.target, **call)
    out = linear_policy_loss(*inputs[:2], inputs.target, max_gradient_error=1e-4, **mode, **call)
    # The linear output moves by slope * d_logit; hidden and weight are of the order of 1 here.
    for one, other in zip(gradients(out.loss, inputs), gradients(exact.loss, inputs), strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()
    bias_error = gradients_of_bias(inputs, call, mode)
    assert bias_error <= 1.0


def gradients_of_bias(inputs, call, mode):
    """The error of d_bias in units of what the bound allows: sums over rows of slope * d_logit."""
    bias = inputs.bias.detach().requires_grad_()
    call = {**call, "bias": bias}
    exact = linear_policy_loss(*inputs[:2], inputs.target, **call)
    out = linear_policy_loss(*inputs[:2], inputs.target, max_gradient_error=0.05, **mode, **call)
    one, other = (torch.autograd.grad(x.loss, bias)[0] for x in (out, exact))
    slope = abs(call.get("logit_scale", 1.0)) / call.get(
        "temperature", 1.0
    )  # the softcap's is <= 1
    live = inputs.target != -100
    rest = -torch.expm1(exact.logprob)[live].double()
    norm = float((2 * call["advantage"][live].abs() * rest).sum())
    allowed = slope * float(out.gradient_error) * norm
    return (one - other).abs().sum().item() / (allowed + 1e-5 * norm)


@ON_ALL
def test_masked_and_clipped_rows(backend):
    """Rows that are not live are as if they were not there: the same rule over the others."""
    inputs, advantage = make_case(torch.float32)
    old = advantage.new_full((SHAPE[0],), -1.0)
    weight = torch.rand(SHAPE[0], generator=torch.Generator().manual_seed(2))
    weight[::5] = 0.0
    call = {**SPARSE, "backend": backend}
    rows = {"advantage": advantage, "old_logprob": old, "token_weight": weight}
    out = linear_policy_loss(*inputs[:2], inputs.target, **rows, **call)
    is_live = (inputs.target != -100) & (weight != 0)
    assert out.is_clipped.any()
    d_hidden, d_weight, _ = gradients(out.loss, inputs)
    assert (d_hidden[~is_live | out.is_clipped] == 0).all()
    for field in out[1:-1]:
        assert (field[~is_live] == 0).all()
    assert (out.dropped_mass[out.is_clipped] == 0).all()
    few = linear_policy_loss(
        inputs.hidden[is_live],
        inputs.weight,
        inputs.target[is_live],
        **{name: value[is_live] for name, value in rows.items()},
        **call,
    )
    torch.testing.assert_close(few.gradient_error, out.gradient_error)
    torch.testing.assert_close(torch.autograd.grad(few.loss, inputs.weight)[0], d_weight)


@ON_ALL
@IN_MODES
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tensor_changes_nothing_else(backend, mode, frozen):
    inputs, advantage = make_case(torch.float32)
    call = {"advantage": advantage, "max_gradient_error": 0.05, "backend": backend, **mode}
    both = linear_policy_loss(*inputs[:2], inputs.target, **call)
    heads = [x.detach() if i == frozen else x for i, x in enumerate(inputs[:2])]
    one = linear_policy_loss(*heads, inputs.target, **call)
    expected = torch.autograd.grad(both.loss, inputs[1 - frozen])[0]
    (actual,) = torch.autograd.grad(one.loss, heads[1 - frozen])
    torch.testing.assert_close(actual, expected)
    assert one.gradient_error > 0


@ON_ALL
@IN_MODES
@pytest.mark.parametrize("masked", ["all", "none left"])
def test_no_rows(backend, mode, masked):
    inputs, advantage = make_case(torch.float32)
    target, hidden = torch.full_like(inputs.target, -100), inputs.hidden
    if masked == "none left":
        hidden, target, advantage = hidden[:0], target[:0], advantage[:0]
    call = {"advantage": advantage, "max_gradient_error": 0.1, "backend": backend, **mode}
    out = linear_policy_loss(hidden, inputs.weight, target, **call)
    assert out.gradient_error == 0
    assert not torch.autograd.grad(out.loss, inputs.weight)[0].any()


@ON_ALL
def test_without_gradients_nothing_is_left_out(backend):
    inputs, advantage = make_case(torch.float32)
    call = {"advantage": advantage, "backend": backend, **SPARSE}
    with torch.no_grad():
        out = linear_policy_loss(*inputs[:2], inputs.target, **call)
    assert out.gradient_error == 0
    assert not out.dropped_mass.any()
    assert not out.loss.requires_grad


@ON_ALL
@IN_MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_main_grad_takes_the_same_gradient(backend, mode, dtype):
    """Of a sum of chunks, in the backward pass and ahead."""
    advantage = make_case(dtype)[1]
    call = {"advantage": advantage, "max_gradient_error": 0.05, "backend": backend, **mode}
    # bf16: one chunk, as the cut that the rule goes by depends on the dtype of d_weight's memory.
    call["memory_budget_bytes"] = None if dtype == torch.bfloat16 else 100_000
    found = []
    for has_main_grad, is_ahead in ((False, False), (True, False), (True, True)):
        inputs, _ = make_case(dtype)
        if has_main_grad:
            inputs.weight.main_grad = torch.ones(SHAPE[1:])
        out = linear_policy_loss(*inputs[:2], inputs.target, main_grad_ahead=is_ahead, **call)
        out.loss.backward()
        total = inputs.weight.main_grad - 1 if has_main_grad else inputs.weight.grad.float()
        found.append((total, inputs.hidden.grad, out.dropped_mass, out.gradient_error))
    rounding = torch.finfo(dtype).eps
    for values in found[1:]:
        torch.testing.assert_close(values[0], found[0][0], rtol=rounding, atol=1e-6)
        for one, other in zip(values[1:], found[0][1:], strict=True):
            torch.testing.assert_close(one, other)
    assert torch.equal(found[1][1], found[2][1])


@ON_ALL
@IN_MODES
def test_bitwise_repeatable(backend, mode):
    inputs, advantage = make_case(torch.bfloat16)
    call = {"advantage": advantage, "max_gradient_error": 0.05, "backend": backend, **mode}
    call["memory_budget_bytes"] = 100_000
    runs = [linear_policy_loss(*inputs[:2], inputs.target, **call) for _ in range(2)]
    values = [[*out, *gradients(out.loss, inputs)[:2]] for out in runs]
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


@pytest.mark.parametrize("kind", [Kind.ZIPF, Kind.PEAKED, Kind.CLIFF])
@IN_MODES
def test_the_backends_leave_out_the_same(kind, mode):
    """In one chunk and without ties; where fp32 sums decide or draw, single rows may differ."""
    problem = Problem.of(kind, 60, 700)
    found = [
        policy(problem, torch.float32, max_gradient_error=0.1, backend=backend, **mode)
        for backend in BACKENDS
    ]
    (one, expected), (other, actual) = found
    torch.testing.assert_close(one.gradient_error, other.gradient_error, rtol=1e-3, atol=1e-6)
    differs = (expected - actual).abs().sum(1) > 1e-4 * expected.abs().sum(1) + 1e-6
    assert differs.sum() <= 3


@ON_ALL
def test_what_all_rows_of_the_weight_share_changes_nothing(backend):
    """It cancels in the exact d_hidden; entries that are left out must not bring it back."""
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 16, generator=rng)
    weight = torch.randn(3000, 16, generator=rng)
    target = torch.randint(0, 3000, (40,), generator=rng)
    found = []
    for mode in ({}, {"gradient": "sparse", "max_gradient_error": 0.2}):
        for shared in (torch.zeros(16), 3 * torch.randn(16, generator=rng.manual_seed(4))):
            leaf = hidden.clone().requires_grad_()
            call = {"advantage": torch.ones(40), "backend": backend, **mode}
            linear_policy_loss(leaf, weight + shared, target, **call).loss.backward()
            found.append(leaf.grad)
    exact, _, alone, beside = found
    assert (alone - exact).norm() > 1e-3 * exact.norm()  # something is left out
    torch.testing.assert_close(beside, alone, rtol=1e-3, atol=1e-4)


@ON_ALL
def test_what_unlikely_classes_share_is_not_lost(backend):
    """A Zipf tail in one column: the classes left out are far from the mean row of the weight.

    With that mean in place of a row's own (`chunk.sparse.Tail`) the error was 0.034.
    """
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 32, generator=rng)
    weight = torch.randn(4000, 32, generator=rng) / 3
    hidden[:, 0], weight[:, 0] = 1.0, -1.5 * torch.arange(1, 4001).log()
    target = torch.multinomial((hidden @ weight.t()).softmax(1), 1, generator=rng)[:, 0]
    found = []
    for mode in ({}, {"gradient": "sparse", "max_gradient_error": 0.1}):
        leaf = hidden.clone().requires_grad_()
        advantage = torch.linspace(-2.0, 2.0, 64)
        call = {"advantage": advantage, "backend": backend, **mode}
        linear_policy_loss(leaf, weight, target, **call).loss.backward()
        found.append(leaf.grad)
    exact, sparse = found
    assert 1e-3 < (sparse - exact).norm() / exact.norm() < 0.02
