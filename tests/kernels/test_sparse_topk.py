"""gradient="sparse" of linear_topk_divergence: the bound for every beta and tail."""

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
    error_of,
    logit_gradient,
)
from xopd_kernels import Backend, LinearDivergence, SparseDivergence, linear_topk_divergence
from xopd_kernels.linear_topk_divergence.sparse_op import (
    linear_topk_divergence_sparse_backward_op,
    linear_topk_divergence_sparse_op,
)
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logits,
    make_head,
    make_inputs,
)
from xopd_kernels.testing.dense import topk_rows

ON_ALL = pytest.mark.parametrize("backend", BACKENDS)
BETAS = [0.0, 0.3, 1.0]
FORMS = pytest.mark.parametrize(
    ("beta", "tail"), [(beta, tail) for beta in BETAS for tail in ("bucket", "ignore")]
)
SPARSE = {"gradient": "sparse", "max_gradient_error": 0.05}
SHAPE, TOP_K = (61, 400, 16), 5


def teacher_of(logits, count, seed=0):
    """(ids, log-probs) [N, K] of a teacher near the student, and the weights of the tokens."""
    rng = torch.Generator().manual_seed(seed)
    other = logits.double() + torch.randn(logits.shape, generator=rng)
    logprob, ids = other.log_softmax(1).topk(count, dim=1)
    order = torch.rand(ids.shape, generator=rng).argsort(1)
    weight = torch.rand(len(logits), generator=rng) * 10.0 ** -torch.arange(len(logits)).fmod(4)
    weight[torch.rand(len(logits), generator=rng) < 0.15] = 0.0
    return ids.gather(1, order), logprob.gather(1, order).float(), weight


def check_bound(problem, dtype, backend, form, max_error, count=TOP_K, budget=None):
    ids, logprob, token_weight = teacher_of(problem.logits, count)
    hidden, weight = problem.head(dtype)
    beta, tail = form
    out = linear_topk_divergence(
        *(hidden, weight, ids, logprob),
        beta=beta,
        tail=tail,
        token_weight=token_weight,
        gradient="sparse",
        max_gradient_error=max_error,
        memory_budget_bytes=budget,
        backend=backend,
    )
    actual = logit_gradient(out.divergence.sum(), weight)
    leaf = problem.logits.clone().requires_grad_()
    given = (ids, logprob.double(), beta, tail == "bucket", token_weight.double())
    dense = topk_rows(leaf, *given)
    (exact,) = torch.autograd.grad(dense.divergence.sum(), leaf)
    error, norm = error_of(actual, exact)
    # What one rounding of a log-prob moves: also where the terms of the gradient cancel.
    terms = token_weight.double() * (2 + dense.divergence.abs().clamp(max=100))
    eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    ratio = (logprob.double() - leaf.detach().log_softmax(1).gather(1, ids)).abs().amax(1)
    noise = 32 * eps * float((terms.detach() * (1 + ratio)).sum())
    assert 0.0 <= float(out.gradient_error) <= max_error
    assert error <= (float(out.gradient_error) + SLACK) * norm + noise
    assert (out.dropped_mass[token_weight == 0] == 0).all()
    assert (out.dropped_mass >= 0).all()
    assert (out.dropped_mass <= 1 + 1e-5).all()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([x for x in Kind if x is not Kind.HUGE]),
    form=st.tuples(st.sampled_from(BETAS), st.sampled_from(["bucket", "ignore"])),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 300)),
    count=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    max_error=st.sampled_from([0.0, 1e-30, 1e-3, 0.01, 0.1, 0.5, 2.0, 100.0]),
    budget=st.sampled_from([None, BUDGET_BYTES]),
)
def test_the_bound_holds(backend, kind, form, shape, count, seed, max_error, budget):
    problem = Problem.of(kind, *shape, seed)
    count = min(count, shape[1])
    check_bound(problem, torch.float32, backend, form, max_error, count, budget)


@FORMS
@pytest.mark.parametrize("kind", [Kind.FLAT, Kind.PEAKED, Kind.ZIPF, Kind.TIES])
def test_the_bound_in_fp64(beta, tail, kind):
    problem = Problem.of(kind, 30, 300)
    check_bound(problem, torch.float64, Backend.REFERENCE, (beta, tail), 0.2)


@ON_ALL
@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_something_is_left_out(backend, beta, tail, dtype):
    problem = Problem.of(Kind.ZIPF, 60, 500, dtype=dtype)
    out = check_bound(problem, dtype, backend, (beta, tail), 0.2)
    assert out.gradient_error > 1e-3
    assert (out.dropped_mass > 0).any()


def make_case(dtype, distribution=Distribution.PEAKED):
    inputs = make_inputs(*SHAPE, dtype, distribution)
    logits = dense_logits(inputs.hidden, make_head(inputs, True)).detach()
    return inputs, *teacher_of(logits, TOP_K)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs[:3], allow_unused=True)


@ON_ALL
@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_error", [0.0, 1e-30])
def test_no_error_is_the_exact_gradient(backend, beta, tail, dtype, max_error):
    inputs, ids, logprob, token_weight = make_case(dtype)
    call = {"beta": beta, "tail": tail, "bias": inputs.bias, "token_weight": token_weight}
    error = {"gradient": "sparse", "max_gradient_error": max_error, "backend": backend}
    given = (ids, logprob)
    out = linear_topk_divergence(*inputs[:2], *given, **call, **error)
    assert out.gradient_error <= max_error
    exact = linear_topk_divergence(*inputs[:2], *given, **call, backend=backend)
    x = inputs.to(torch.float64)
    call["bias"] = x.bias
    oracle = linear_topk_divergence(*x[:2], *given, **call, backend=Backend.REFERENCE)
    pairs = ((out, inputs), (exact, inputs), (oracle, x))
    results = (gradients(y.divergence.sum(), leaves) for y, leaves in pairs)
    for name, *values in zip(("hidden", "weight", "bias"), *results, strict=True):
        assert_within_budget(name, *values)


@ON_ALL
@FORMS
def test_everything_but_the_gradient_is_that_of_exact(backend, beta, tail):
    inputs, ids, logprob, token_weight = make_case(torch.float32)
    call = {"beta": beta, "tail": tail, "softcap": 20.0, "token_weight": token_weight}
    given = (*inputs[:2], ids, logprob)
    exact = linear_topk_divergence(*given, backend=backend, **call)
    out = linear_topk_divergence(*given, backend=backend, **call, **SPARSE)
    assert type(exact) is LinearDivergence
    assert type(out) is SparseDivergence
    for name, value in exact._asdict().items():
        torch.testing.assert_close(getattr(out, name), value, msg=name)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]


@ON_ALL
@pytest.mark.parametrize(
    "transform",
    [{"temperature": 0.7}, {"softcap": 4.0}, {"temperature": 1.3, "logit_scale": 0.8}],
    ids=str,
)
def test_bias_and_transform(backend, transform):
    """Few classes: lists hold them all, and their entries are the exact gradient."""
    inputs = make_inputs(40, 60, 16, torch.float32, Distribution.PEAKED)
    ids, logprob, _ = teacher_of(dense_logits(inputs.hidden, make_head(inputs)).detach(), TOP_K)
    call = {"bias": inputs.bias, "backend": backend, **transform}
    exact = linear_topk_divergence(*inputs[:2], ids, logprob, **call)
    error = {"gradient": "sparse", "max_gradient_error": 1e-6}
    out = linear_topk_divergence(*inputs[:2], ids, logprob, **call, **error)
    expected = gradients(exact.divergence.sum(), inputs)
    for one, other in zip(gradients(out.divergence.sum(), inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@ON_ALL
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_upstream_gradients_of_every_kind(backend, frozen):
    """One that differs from token to token: the rule sees the weights that count."""
    inputs, ids, logprob, token_weight = make_case(torch.float32)
    heads = [x.detach() if i == frozen else x for i, x in enumerate(inputs[:2])]
    wanted = [x for x in heads if x.requires_grad]
    upstream = 10.0 ** -torch.arange(SHAPE[0]).fmod(5)

    def run(weight, factor):
        given = {"token_weight": weight, "backend": backend, **SPARSE}
        out = linear_topk_divergence(*heads, ids, logprob, **given)
        return torch.autograd.grad((out.divergence * factor).sum(), wanted)

    weighted = (run(token_weight, upstream), run(token_weight * upstream, 1.0))
    for one, other in zip(*weighted, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(run(token_weight, -2.5), run(token_weight, 1.0), strict=True):
        torch.testing.assert_close(one, other * -2.5)


@ON_ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_main_grad_takes_the_same_gradient(backend, dtype):
    found = []
    for has_main_grad, is_ahead in ((False, False), (True, False), (True, True)):
        inputs, ids, logprob, token_weight = make_case(dtype)
        if has_main_grad:
            inputs.weight.main_grad = torch.ones(SHAPE[1:])
        # bf16: one chunk, as the cut that the rule goes by depends on d_weight's memory.
        budget = None if dtype == torch.bfloat16 else 100_000
        call = {"token_weight": token_weight, "memory_budget_bytes": budget, "backend": backend}
        call = {**call, **SPARSE, "main_grad_ahead": is_ahead}
        out = linear_topk_divergence(*inputs[:2], ids, logprob, **call)
        out.divergence.sum().backward()
        total = inputs.weight.main_grad - 1 if has_main_grad else inputs.weight.grad.float()
        found.append((total, inputs.hidden.grad, out.dropped_mass))
    for values in found[1:]:
        torch.testing.assert_close(values[0], found[0][0], rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(values[1], found[0][1])
        torch.testing.assert_close(values[2], found[0][2])


@ON_ALL
def test_without_gradients_nothing_is_left_out(backend):
    inputs, ids, logprob, _ = make_case(torch.float32)
    with torch.no_grad():
        out = linear_topk_divergence(*inputs[:2], ids, logprob, backend=backend, **SPARSE)
    assert type(out) is SparseDivergence
    assert out.gradient_error == 0
    assert not out.dropped_mass.any()


@ON_ALL
def test_all_classes_are_ids(backend):
    inputs = make_inputs(20, 9, 6, torch.float32)
    ids, logprob, _ = teacher_of(dense_logits(inputs.hidden, make_head(inputs)).detach(), 9)
    call = {"max_gradient_error": 1e-3, "gradient": "sparse", "backend": backend}
    out = linear_topk_divergence(*inputs[:2], ids, logprob, **call)
    exact = linear_topk_divergence(*inputs[:2], ids, logprob, backend=backend)
    one, other = (gradients(x.divergence.sum(), inputs)[1] for x in (out, exact))
    assert (one - other).norm() <= 1e-2 * other.norm()


@ON_ALL
def test_bitwise_repeatable(backend):
    inputs, ids, logprob, token_weight = make_case(torch.bfloat16)
    call = {"token_weight": token_weight, "memory_budget_bytes": 100_000, "backend": backend}
    runs = [linear_topk_divergence(*inputs[:2], ids, logprob, **call, **SPARSE) for _ in range(2)]
    values = [[*out, *gradients(out.divergence.sum(), inputs)[:2]] for out in runs]
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


def test_opcheck():
    x = make_inputs(6, 90, 5, torch.float32)
    ids, logprob, weight = teacher_of(dense_logits(x.hidden, make_head(x)).detach(), 3)
    scalars = (0.3, True, 0.9, 5.0, 1.0, None, "reference", 0.1, True, True, True)
    given = (x.hidden, x.weight, x.bias, ids, logprob, weight)
    torch.library.opcheck(linear_topk_divergence_sparse_op, (*given, None, *scalars))
    with torch.no_grad():
        out = linear_topk_divergence_sparse_op(*given, None, *scalars)
    frozen = [value.detach() for value in given]
    backward = linear_topk_divergence_sparse_backward_op
    for upstream in (torch.ones(6), torch.rand(6)):
        torch.library.opcheck(backward, (upstream, *out[5:], *frozen, *scalars))


def test_compiles_as_one_graph():
    inputs, ids, logprob, _ = make_case(torch.float32)

    def loss(hidden, weight, factor):
        out = linear_topk_divergence(hidden * 2, weight, ids, logprob, **SPARSE)
        return (out.divergence * factor).sum(), out.gradient_error

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for factor in (torch.ones(SHAPE[0]), torch.rand(SHAPE[0])):
        args = (*inputs[:2], factor)
        expected = torch.autograd.grad(loss(*args)[0], inputs[:2])
        actual = torch.autograd.grad(compiled(*args)[0], inputs[:2])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "unbiased"}, 'gradient must be "exact" or "sparse"'),
        ({"gradient": "sparse"}, "max_gradient_error must be given"),
        ({"max_gradient_error": 0.1}, "max_gradient_error must be None"),
    ],
    ids=str,
)
def test_wrong_keywords(options, message):
    inputs, ids, logprob, _ = make_case(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_topk_divergence(*inputs[:2], ids, logprob, **options)
