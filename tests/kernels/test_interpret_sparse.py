"""Sparse gradients by Triton kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest."""

import contextlib
import importlib
import os

import pytest
import torch

from tests.kernels.sparse_cases import Kind, Problem, assert_bound, logit_gradient
from tests.kernels.test_sparse_tail import OPERATORS
from tests.kernels.test_sparse_tail import Problem as SharedRows
from xopd_kernels import (
    Backend,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
)
from xopd_kernels.chunk import call
from xopd_kernels.chunk import sparse as rule
from xopd_kernels.testing import Distribution, make_inputs
from xopd_kernels.workload import Workload

triton_sparse = pytest.importorskip("xopd_kernels.chunk.triton_sparse", reason="needs triton")

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs TRITON_INTERPRET=1, set before triton is imported: a process of its own",
    ),
    # Rows beyond the live ones are computed on zeros and never stored.
    pytest.mark.filterwarnings(
        "ignore:(invalid value|divide by zero|overflow|All-NaN slice):RuntimeWarning"
    ),
    # Triton 3.6 under numpy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
ALL = {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8}  # with a bias
TRITON, REFERENCE = {"backend": Backend.TRITON}, {"backend": Backend.REFERENCE}
SPARSE = {"gradient": "sparse", "max_gradient_error": 0.1}
UNBIASED = {"gradient": "unbiased", "gradient_seed": 5, "max_gradient_error": 0.1}
MODES = pytest.mark.parametrize("mode", [SPARSE, UNBIASED], ids=lambda mode: mode["gradient"])
# Lists of 64 classes hold them all: the rule decides alike on every backend.
SMALL = (30, 60, 20)


def set_chunk_rows(monkeypatch, chunk):
    monkeypatch.setattr(call, "chunk_rows", lambda work, backend, budget: chunk)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs[:3], allow_unused=True)


def signal(rows):
    """Advantages or weights of very different sizes, some 0."""
    rng = torch.Generator().manual_seed(1)
    size = 10.0 ** (-3 * torch.rand(rows, generator=rng))
    return (torch.randn(rows, generator=rng) * size).masked_fill(torch.arange(rows) % 7 == 3, 0.0)


def teacher_of(rows, classes, count=5):
    rng = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(rows, classes, generator=rng)
    logprob, ids = logits.log_softmax(1).topk(min(count, classes))
    return ids, logprob


def assert_dropped(out, has_gradient):
    assert ((out.dropped_mass >= 0) & (out.dropped_mass <= 1 + 1e-5)).all()
    assert (out.dropped_mass[~has_gradient] == 0).all()


@MODES
@pytest.mark.parametrize("max_error", [0.01, 2.0])
@pytest.mark.parametrize("kind", Kind)
def test_policy_bound(kind, max_error, mode, monkeypatch):
    set_chunk_rows(monkeypatch, 10)
    problem = Problem.of(kind, 24, 150, seed=1)
    hidden, weight = problem.head(torch.float32)
    options = {**mode, "max_gradient_error": max_error, **TRITON}
    out = linear_policy_loss(hidden, weight, problem.target, advantage=problem.advantage, **options)
    actual, exact = logit_gradient(out.loss, weight), problem.gradient()
    assert_bound(problem, actual, exact, out.gradient_error, max_error)
    assert_dropped(out, (problem.target != -100) & (problem.advantage != 0))


@pytest.mark.parametrize("max_error", [0.01, 0.3])
@pytest.mark.parametrize("kind", Kind)
def test_logprob_bound(kind, max_error, monkeypatch):
    set_chunk_rows(monkeypatch, 10)
    problem = Problem.of(kind, 24, 150, seed=1)
    hidden, weight = problem.head(torch.float32)
    out = linear_logprob(
        hidden, weight, problem.target, gradient="sparse", max_gradient_error=max_error, **TRITON
    )
    loss = -(out.logprob * problem.advantage).sum()
    actual, exact = logit_gradient(loss, weight), problem.gradient()
    assert_bound(problem, actual, exact, out.gradient_error, max_error)
    assert_dropped(out, problem.target != -100)
    row_error, row_norm = (actual - exact).abs().sum(1), exact.abs().sum(1)
    noise = 5e-7 * problem.advantage.abs()
    assert (row_error <= (out.gradient_error + 4e-6) * row_norm + noise).all()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda x: x.value)
def test_what_unlikely_classes_share_is_not_lost(operator):
    problem = SharedRows("by each eighth", rows=16)
    exact = problem.d_hidden(operator, softcap=30.0, **REFERENCE)
    sparse = problem.d_hidden(operator, softcap=30.0, **SPARSE, **TRITON)
    assert 1e-3 < (sparse - exact).norm() / exact.norm() < 0.04


@pytest.mark.parametrize("height", [14.0, 18.0, 22.0, 30.0])
def test_the_target_of_a_sure_token(height):
    """Its log-prob is 0 in fp32; its entry is the sum of the others all the same."""
    rest = 63 / torch.tensor(height, dtype=torch.float64).exp()
    rest = rest / (1 + rest)
    expected = (rest / 63).float().repeat(64, 4)
    expected[5] = -rest.float()
    weight, target = torch.zeros(64, 4), torch.full((4,), 5)
    weight[5] = height
    weight.requires_grad_()
    options = {"gradient": "sparse", "max_gradient_error": 0.01, **TRITON}
    out = linear_policy_loss(torch.eye(4), weight, target, advantage=torch.ones(4), **options)
    rows = linear_logprob(torch.eye(4), weight, target, **options)
    for loss in (out.loss, -rows.logprob.sum()):
        (actual,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("beta", "tail"), [(0.0, "ignore"), (1.0, "bucket"), (0.4, "bucket")])
@pytest.mark.parametrize("kind", Kind)
def test_topk_bound(kind, beta, tail, monkeypatch):
    set_chunk_rows(monkeypatch, 10)
    problem = Problem.of(kind, 24, 150, seed=1)
    hidden, weight = problem.head(torch.float32)
    teacher = teacher_of(24, 150)
    options = {"beta": beta, "tail": tail, "token_weight": problem.advantage}
    out = linear_topk_divergence(hidden, weight, *teacher, **options, **SPARSE, **TRITON)
    wide = [x.detach().double() for x in (hidden, weight, teacher[1])]
    wide[1].requires_grad_()
    expected = linear_topk_divergence(*wide[:2], teacher[0], wide[2], **options, **REFERENCE)
    expected.divergence.sum().backward()
    actual = logit_gradient(out.divergence.sum(), weight)
    assert_bound(problem, actual, wide[1].grad.t(), out.gradient_error, 0.1)
    assert_dropped(out, problem.advantage != 0)


def small_case(dtype, has_all, backend, operator, **options):
    """(the result, the gradients) of a case whose lists hold every class."""
    x = make_inputs(*SMALL, dtype, Distribution.PEAKED)
    call = {**backend, **options} | ({"bias": x.bias, **ALL} if has_all else {})
    if operator is linear_topk_divergence:
        given = {"token_weight": signal(SMALL[0]), "beta": 0.4, **call}
        out = operator(*x[:2], *teacher_of(*SMALL[:2]), **given)
        return out, gradients(out.divergence.sum(), x)
    if operator is linear_logprob:
        out = operator(*x[:2], x.target, needs_entropy=True, **call)
        return out, gradients((out.logprob * signal(SMALL[0])).sum(), x)
    out = operator(*x[:2], x.target, advantage=signal(SMALL[0]), **call)
    return out, gradients(out.loss, x)


@pytest.mark.parametrize("has_all", [False, True])
@pytest.mark.parametrize(
    ("operator", "mode"),
    [
        (linear_policy_loss, SPARSE),
        (linear_policy_loss, UNBIASED),
        (linear_logprob, SPARSE),
        (linear_topk_divergence, SPARSE),
    ],
)
def test_full_lists_equal_the_reference(operator, mode, has_all, monkeypatch):
    """Every field, what is left out, and the class that is drawn."""
    set_chunk_rows(monkeypatch, SMALL[0])
    climb = rule._climb

    def same_ladder(values, limit, base):
        # It begins by the size of the lists, which have a column more here, and rows not live.
        return climb(values, limit, limit / (60 if limit.ndim else 1000))

    def whole_lists(*arguments):
        enough = torch.zeros_like(arguments[5])
        return triton_sparse.run_lists(*arguments[:5], enough, *arguments[6:])

    monkeypatch.setattr(rule, "_climb", same_ladder)
    package = operator.__module__.rpartition(".")[0]
    module = importlib.import_module(f"{package}.sparse_triton")
    monkeypatch.setattr(module, "run_lists", whole_lists)
    actual, expected = (
        small_case(torch.float32, has_all, backend, operator, **mode)
        for backend in (TRITON, REFERENCE)
    )
    assert (expected[0].dropped_mass > 0).any()
    for name, one, other in zip(actual[0]._fields, actual[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(actual[1], expected[1], strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("operator", [linear_policy_loss, linear_logprob, linear_topk_divergence])
def test_no_error_allowed_is_the_exact_gradient(operator, dtype, monkeypatch):
    set_chunk_rows(monkeypatch, 12)
    call = {"gradient": "sparse", "max_gradient_error": 1e-30}  # 0 takes the exact path
    sparse, found = small_case(dtype, True, TRITON, operator, **call)
    exact, expected = small_case(dtype, True, TRITON, operator)
    assert sparse.gradient_error <= 1e-30
    assert (sparse.dropped_mass < 1e-6).all()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for one, other in zip(sparse, exact, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


@MODES
def test_repeats_bitwise_and_narrow_dtypes_keep_the_bound(mode, monkeypatch):
    set_chunk_rows(monkeypatch, 16)
    runs = [small_case(torch.bfloat16, True, TRITON, linear_policy_loss, **mode) for _ in range(2)]
    for one, other in zip((*runs[0][0], *runs[0][1]), (*runs[1][0], *runs[1][1]), strict=True):
        assert torch.equal(one, other)
    assert 0 < runs[0][0].gradient_error <= 0.1
    assert runs[0][1][0].dtype == torch.bfloat16


@pytest.mark.parametrize("operator", [linear_policy_loss, linear_logprob, linear_topk_divergence])
def test_main_grad_takes_the_entries_of_every_chunk(operator, monkeypatch):
    """With other rows in the lists than in one chunk, but within the same bound."""
    set_chunk_rows(monkeypatch, 12)
    x = make_inputs(*SMALL, torch.float32, Distribution.PEAKED)
    options = {**SPARSE, **TRITON}
    weight = signal(SMALL[0])

    def loss(is_ahead):
        ahead = {"main_grad_ahead": is_ahead} if operator is not linear_logprob else {}
        if operator is linear_topk_divergence:
            given = teacher_of(*SMALL[:2])
            out = operator(*x[:2], *given, token_weight=weight, **options, **ahead)
            return out.divergence.sum()
        if operator is linear_policy_loss:
            return operator(*x[:2], x.target, advantage=weight, **options, **ahead).loss
        return (operator(*x[:2], x.target, **options).logprob * weight).sum()

    (expected,) = torch.autograd.grad(loss(False), x.weight)
    for is_ahead in (False, True):
        x.weight.main_grad = torch.full(SMALL[1:], 3.0)
        loss(is_ahead).backward()
        torch.testing.assert_close(x.weight.main_grad - 3.0, expected, rtol=1e-4, atol=1e-5)
    assert x.weight.grad is None


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("operator", [linear_policy_loss, linear_logprob, linear_topk_divergence])
def test_frozen_inputs_change_nothing_for_the_other(operator, frozen, monkeypatch):
    set_chunk_rows(monkeypatch, 12)
    results = []
    for is_frozen in (False, True):
        x = make_inputs(*SMALL, torch.float32, Distribution.PEAKED)
        if is_frozen:
            getattr(x, frozen).requires_grad_(False)
        monkeypatch.setitem(globals(), "make_inputs", lambda *_, x=x: x)
        monkeypatch.setitem(globals(), "gradients", backward)
        small_case(torch.float32, False, TRITON, operator, **SPARSE)
        results.append(x.weight.grad if frozen == "hidden" else x.hidden.grad)
        monkeypatch.undo()
        set_chunk_rows(monkeypatch, 12)
    assert torch.equal(*results)


def backward(loss, inputs):
    loss.backward()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_live_rows(rows):
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.full((rows,), -100)
    out = linear_policy_loss(hidden, weight, target, advantage=torch.ones(rows), **SPARSE, **TRITON)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    assert all((x == 0).all() for x in (*out, *grads))


def test_a_nan_row_is_dense_and_shows():
    x = make_inputs(10, 90, 16, torch.float32, Distribution.PEAKED)
    hidden = x.hidden.detach().clone()
    hidden[4] = torch.nan
    hidden.requires_grad_()
    target = torch.arange(10)
    out = linear_policy_loss(hidden, x.weight, target, advantage=torch.ones(10), **SPARSE, **TRITON)
    (d_hidden,) = torch.autograd.grad(out.loss, hidden)
    assert d_hidden[4].isnan().all()
    others = torch.arange(10) != 4
    assert d_hidden[others].isfinite().all()
    assert out.dropped_mass[4] == 0


@pytest.mark.parametrize("length", [1, 5, 40])
def test_lists_are_as_long_as_they_may_be(length, monkeypatch):
    """A short list forces the sweep that counts; the bound holds with lists of any length."""
    monkeypatch.setattr(Workload, "list_length", lambda work, rows: length)
    seen = []
    made = triton_sparse.run_lists

    def watched(*arguments):
        seen.append(made(*arguments))
        ids, counts = seen[-1].ids.clone(), seen[-1].counts.clone()
        assert (counts <= length).all()
        for row, count in zip(ids, counts, strict=True):
            assert (row[:count].diff() > 0).all()
        return seen[-1]

    from xopd_kernels.linear_policy_loss import sparse_triton

    monkeypatch.setattr(sparse_triton, "run_lists", watched)
    problem = Problem.of(Kind.MIXED, 20, 1300, seed=3)
    hidden, weight = problem.head(torch.float32)
    out = linear_policy_loss(
        hidden, weight, problem.target, advantage=problem.advantage, **SPARSE, **TRITON
    )
    actual = logit_gradient(out.loss, weight)
    assert len(seen) == 1
    assert_bound(problem, actual, problem.gradient(), out.gradient_error, 0.1)


def test_strided_inputs(monkeypatch):
    set_chunk_rows(monkeypatch, 12)
    x = make_inputs(*SMALL, torch.float32, Distribution.PEAKED)
    results = []
    for is_strided in (False, True):
        hidden, weight = (y.detach().clone() for y in x[:2])
        if is_strided:
            hidden, weight = (y.t().contiguous().t() for y in (hidden, weight))
        hidden.requires_grad_()
        weight.requires_grad_()
        out = linear_logprob(hidden, weight, x.target, **SPARSE, **TRITON)
        results.append(
            torch.autograd.grad((out.logprob * signal(SMALL[0])).sum(), (hidden, weight))
        )
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("operator", [linear_policy_loss, linear_logprob, linear_topk_divergence])
def test_every_launch_is_on_the_device_of_its_tensors(operator, monkeypatch):
    guards: list[int] = []  # those that are open
    launches: list[tuple[str, bool]] = []  # name, whether it is guarded

    @contextlib.contextmanager
    def guard(tensor):
        guards.append(tensor.get_device())
        yield
        guards.pop()

    class Watched:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches.append((self.name, bool(guards)))
            return self.kernel[grid]

    monkeypatch.setattr(triton_sparse, "device_guard", guard)
    for name in [name for name in vars(triton_sparse) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_sparse, name, Watched(name, getattr(triton_sparse, name)))
    small_case(torch.float32, True, TRITON, operator, **SPARSE)
    assert {"list_kernel", "keep_kernel", "entry_hidden_kernel"} <= {name for name, _ in launches}
    assert all(is_guarded for _, is_guarded in launches)


def test_a_logit_that_is_nan_is_not_taken_for_a_mark():
    """The ids are marked by NaN in the logits; a class whose own logit is NaN is none of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 16, generator=generator)
    hidden = weight[:6] * 0.5
    weight[40, 0] = torch.nan
    ids, teacher = torch.arange(5).repeat(6, 1), torch.full((6, 5), -2.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_topk_divergence(hidden, weight, ids, teacher, **TRITON, **SPARSE)
    gradients = torch.autograd.grad(out.divergence.sum(), (hidden, weight))
    assert out.divergence.isnan().all()
    assert out.lse.isnan().all()
    assert all(gradient.isnan().all() for gradient in gradients)
    assert not out.dropped_mass.isnan().any()
