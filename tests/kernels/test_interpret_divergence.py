"""The divergence kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

import contextlib
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from xopd_kernels import Backend, linear_divergence, linear_topk_divergence
from xopd_kernels.chunk import call
from xopd_kernels.records import Head
from xopd_kernels.testing import (
    Distribution,
    Inputs,
    assert_within_budget,
    dense_divergence,
    dense_logits,
    make_head,
    make_inputs,
)
from xopd_kernels.testing.dense import divergence_of

tl = pytest.importorskip("triton.language", reason="triton is not installed")
triton = pytest.importorskip("triton")
tile = pytest.importorskip("xopd_kernels.tile.divergence")

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs TRITON_INTERPRET=1, set before triton is imported: a process of its own",
    ),
    # Branches that tl.where does not choose are computed, too.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
    # Triton 3.6 under numpy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BETAS = [0.0, 0.3, 1.0]
TAILS = ["bucket", "ignore"]
PLAIN: dict[str, float] = {}
ALL = {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8}  # with biases and peaked inputs
OF_TEACHER = {"teacher_softcap": 3.0, "teacher_logit_scale": 1.2}
# (N, V, D) of the student, (V, D) of the teacher, transform, rows of a chunk. All ragged; 2100
# classes are several slabs of the GEMMs and two blocks of the row kernels.
CASES = [
    ((1, 1, 1), (1, 1), PLAIN, 1),
    ((14, 300, 33), (317, 20), PLAIN, 6),
    ((6, 2100, 15), (2090, 16), ALL, 3),
]
TRITON = {"backend": Backend.TRITON}
NAMES = ("divergence", "lse", "teacher_lse", "hidden", "weight", "bias")


def set_chunk_rows(monkeypatch, chunk):
    monkeypatch.setattr(call, "chunk_rows", lambda work, backend, budget: chunk)


class Pair(NamedTuple):
    """A student, a frozen teacher and per-token weights of which some are 0."""

    student: Inputs
    teacher: Inputs
    token_weight: Tensor

    def to(self, dtype):
        """The same values in another dtype."""
        return Pair(self.student.to(dtype), self.teacher.to(dtype), self.token_weight)


def make_pair(shape, teacher_shape, dtype, transform):
    kind = Distribution.PEAKED if transform else Distribution.RANDOM
    student = make_inputs(*shape, dtype, kind)
    teacher = make_inputs(shape[0], *teacher_shape, dtype, kind, seed=1)
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) + 0.1
    weight[3::4] = 0.0
    return Pair(student, teacher, weight)


def run_divergence(pair, beta, transform, **options):
    """The result, and the gradients of its sum."""
    x, y = pair.student, pair.teacher
    if transform:
        options |= {"bias": x.bias, "teacher_bias": y.bias} | transform | OF_TEACHER
    rows = linear_divergence(
        *x[:2], *y[:2], beta=beta, token_weight=pair.token_weight, **TRITON, **options
    )
    return [*rows, *gradients(rows.divergence.sum(), x)]


def teacher_head(teacher: Inputs, transform) -> Head:
    if not transform:
        return make_head(teacher)
    return make_head(teacher, True, transform["temperature"], *OF_TEACHER.values())


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs[:3], allow_unused=True)


def assert_budget(actual, baseline, oracle):
    for name, *values in zip(NAMES, actual, baseline, oracle, strict=True):
        if values[2] is not None:
            assert_within_budget(name, *values)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "teacher_shape", "transform", "chunk"), CASES)
def test_divergence(dtype, shape, teacher_shape, transform, chunk, beta, monkeypatch):
    set_chunk_rows(monkeypatch, chunk)
    pair = make_pair(shape, teacher_shape, dtype, transform)
    results = [run_divergence(pair, beta, transform)]
    for each in (pair, pair.to(torch.float64)):
        x, y = each.student, each.teacher
        heads = make_head(x, bool(transform), **transform), teacher_head(y, transform)
        rows = dense_divergence(x.hidden, heads[0], y.hidden, heads[1], beta, each.token_weight)
        results.append([*rows, *gradients(rows.divergence.sum(), x)])
    assert_budget(*results)


def make_top_k(shape, k, seed=3):
    """Ids of a row and the log-probs of a teacher whose mass lies mostly there."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(shape[:2], generator=rng)
    ids = torch.rand(shape[:2], generator=rng).argsort(1)[:, :k]
    ids[:, 0] = logits.argmax(1).where((ids != logits.argmax(1)[:, None]).all(1), ids[:, 0])
    return ids, logits.log_softmax(1).gather(1, ids)


def dense_top_k(inputs, head, ids, logprob, beta, tail, token_weight):
    """The rows of linear_topk_divergence in plain torch."""
    z = dense_logits(inputs.hidden, head)
    lse, log_q = z.logsumexp(1), logprob.to(z)
    log_p, mass = z.gather(1, ids) - lse[:, None], log_q.logsumexp(1)
    if tail == "bucket":
        rest = z.scatter(1, ids, -torch.inf).logsumexp(1) - lse
        log_p = torch.cat((log_p, rest[:, None]), 1)
        log_q = torch.cat((log_q, torch.log(-mass.expm1())[:, None]), 1)
    weight = token_weight.to(z)
    rows = (weight * divergence_of(log_p, log_q, beta), lse, mass)
    return [torch.where(weight != 0, x, 0.0) for x in rows]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("dtype", "shape", "k", "transform", "chunk"),
    [
        (torch.float32, (14, 300, 33), 1, PLAIN, 6),
        (torch.bfloat16, (14, 300, 33), 20, PLAIN, 6),
        (torch.float32, (6, 2100, 15), 16, ALL, 3),
        (torch.float16, (6, 2100, 15), 130, ALL, 3),
        (torch.bfloat16, (6, 2100, 15), 15, ALL, 3),
    ],
)
def test_topk_divergence(dtype, shape, k, transform, chunk, tail, beta, monkeypatch):
    set_chunk_rows(monkeypatch, chunk)
    inputs, _, weight = make_pair(shape, shape[1:], dtype, transform)
    ids, logprob = make_top_k(shape, k)
    options = {"bias": inputs.bias if transform else None, **transform}
    rows = linear_topk_divergence(
        *inputs[:2], ids, logprob, beta=beta, tail=tail, token_weight=weight, **options, **TRITON
    )
    results = [[*rows, *gradients(rows.divergence.sum(), inputs)]]
    for x in (inputs, inputs.to(torch.float64)):
        head = make_head(x, bool(transform), **transform)
        rows = dense_top_k(x, head, ids, logprob, beta, tail, weight)
        results.append([*rows, *gradients(rows[0].sum(), x)])
    assert_budget(*results)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gone", ["student", "teacher", "both"])
def test_classes_without_mass(gone, beta):
    """-inf logits: 0 log 0 is 0; mass where the other model has none is inf, but not in a JSD."""
    pair = make_pair((4, 1100, 16), (1100, 12), torch.float32, PLAIN)
    biases = [torch.zeros(1100), torch.zeros(1100)]
    for bias, model in zip(biases, ("student", "teacher"), strict=True):
        bias[:900] = -torch.inf if gone in (model, "both") else 0.0
    x = pair.student._replace(bias=biases[0].requires_grad_())
    options = {"bias": x.bias, "teacher_bias": biases[1], "beta": beta}
    out = linear_divergence(*x[:2], *pair.teacher[:2], **options, **TRITON)
    if (gone, beta) in (("student", 0.0), ("teacher", 1.0)):
        assert (out.divergence == torch.inf).all()
        return
    # exp(-1000) is 0 in fp64, and its logarithm is finite.
    exact = x.to(torch.float64), pair.teacher.to(torch.float64)
    finite = [exact[i]._replace(bias=biases[i].double().clamp(min=-1e3)) for i in range(2)]
    heads = [make_head(y, True) for y in finite]
    rows = dense_divergence(finite[0].hidden, heads[0], finite[1].hidden, heads[1], beta)
    torch.testing.assert_close(out.divergence.double(), rows.divergence, rtol=1e-5, atol=0.0)
    expected = torch.autograd.grad(rows.divergence.sum(), finite[0][:2])
    actual = torch.autograd.grad(out.divergence.sum(), x[:2])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_close_models(beta):
    """No term is negative, and the digits that the sum of p log(p / q) cancels are there."""
    x = make_inputs(6, 700, 16, torch.float32)
    noise = torch.randn(x.weight.shape, generator=torch.Generator().manual_seed(4))
    for scale in (0.0, 1e-3):
        teacher = x.weight.detach() * (1 + scale * noise)
        rows = linear_divergence(*x[:2], x.hidden.detach(), teacher, beta=beta, **TRITON)
        exact = x.to(torch.float64)
        heads = make_head(exact), Head(teacher.double(), None, 1.0, None, 1.0, "")
        truth = dense_divergence(exact.hidden, heads[0], exact.hidden, heads[1], beta).divergence
        assert (rows.divergence >= 0).all()
        torch.testing.assert_close(rows.divergence.double(), truth, rtol=1e-3, atol=1e-14)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("offset", [-1024.0, 8192.0])
def test_gradients_of_a_common_offset(beta, offset):
    """lse rounds to ulp(offset): log-probs by way of z - lse would be off by as much."""
    x = make_inputs(8, 300, 20, torch.float32, offset=offset)
    y = make_inputs(8, 300, 12, torch.float32, seed=1, offset=offset)
    out = linear_divergence(*x[:2], *y[:2], beta=beta, bias=x.bias, teacher_bias=y.bias, **TRITON)
    results = [[*out, *gradients(out.divergence.sum(), x)]]
    for dtype in (torch.float32, torch.float64):
        a, b = x.to(dtype), y.to(dtype)
        rows = dense_divergence(a.hidden, make_head(a, True), b.hidden, make_head(b, True), beta)
        results.append([*rows, *gradients(rows.divergence.sum(), a)])
    assert_budget(*results)


@pytest.mark.parametrize("beta", BETAS)
def test_tail_of_no_mass(beta):
    """Nearly all mass lies on the ids: 1 - sum p would be 0, and its logarithm -inf."""
    hidden, weight = torch.eye(2, 3).requires_grad_(), torch.zeros(600, 3)
    weight[:4, 0], weight[:4, 1] = 40.0, 90.0  # e^-40 and e^-90 of the mass are elsewhere
    weight.requires_grad_()
    ids, logprob = torch.arange(4).repeat(2, 1), torch.full((2, 4), 0.2).log()
    out = linear_topk_divergence(hidden, weight, ids, logprob, beta=beta, **TRITON)
    x = Inputs(hidden, weight, weight[:, 0], ids[:, 0]).to(torch.float64)
    rows = dense_top_k(x, make_head(x), ids, logprob, beta, "bucket", torch.ones(2))
    torch.testing.assert_close(out.divergence.double(), rows[0], rtol=1e-5, atol=0.0)
    actual = torch.autograd.grad(out.divergence.sum(), (hidden, weight))
    for one, other in zip(actual, torch.autograd.grad(rows[0].sum(), x[:2]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_all_classes_as_ids_leave_no_tail(beta):
    inputs = make_inputs(5, 37, 8, torch.float32)
    ids, logprob = make_top_k((5, 37), 37)
    rows = [
        linear_topk_divergence(*inputs[:2], ids, logprob, beta=beta, tail=tail, **TRITON)
        for tail in TAILS
    ]
    torch.testing.assert_close(rows[0].divergence, rows[1].divergence)
    grads = [torch.autograd.grad(x.divergence.sum(), inputs[:2]) for x in rows]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("wrong", [(0, 4), (-1, 3), (37, 3)])
def test_wrong_ids(wrong, tail, monkeypatch):
    """On a CUDA device nobody reads the ids: the row is NaN and no other."""
    from xopd_kernels.linear_topk_divergence import triton as topk

    hidden, weight = make_inputs(3, 37, 8, torch.float32)[:2]
    ids = torch.tensor([[0, 1, 2, 3, 4], [5, 1, 36, 8, 0], [4, 3, 2, 1, 0]])
    ids[1, wrong[1]] = ids[1, 0] if wrong[0] == 0 else wrong[0]
    args = (hidden, weight, ids, torch.full((3, 5), 0.1).log())
    with pytest.raises(ValueError, match="teacher_ids must"):
        linear_topk_divergence(*args, tail=tail, **TRITON)
    monkeypatch.setattr(topk, "check_top_k", lambda *args: None)
    out = linear_topk_divergence(*args, tail=tail, **TRITON)
    assert out.divergence.isnan().tolist() == [False, True, False]
    (d_hidden,) = torch.autograd.grad(out.divergence.sum(), hidden)
    assert d_hidden.isnan().any(1).tolist() == [False, True, False]


def test_too_many_ids():
    ids = torch.arange(257).repeat(2, 1)
    with pytest.raises(ValueError, match="K=257 ids a token; TRITON takes at most 256"):
        linear_topk_divergence(
            torch.zeros(2, 4), torch.zeros(600, 4), ids, torch.zeros(2, 257), **TRITON
        )


def both(inputs, teacher, weight, beta, tail="bucket"):
    """Both operators on the same inputs: results and gradients of their sums."""
    ids, logprob = make_top_k((len(inputs.hidden), len(inputs.weight)), 5)
    calls = (
        (linear_divergence, (*inputs[:2], *teacher[:2]), {}),
        (linear_topk_divergence, (*inputs[:2], ids, logprob), {"tail": tail}),
    )
    for op, args, options in calls:
        rows = op(*args, beta=beta, token_weight=weight, **options, **TRITON)
        yield rows, torch.autograd.grad(rows.divergence.sum(), inputs[:2])


@pytest.mark.parametrize("beta", BETAS)
def test_ignored_rows_are_not_read_and_keep_zero(beta, monkeypatch):
    set_chunk_rows(monkeypatch, 5)
    x, y, weight = make_pair((12, 90, 20), (90, 12), torch.float32, PLAIN)
    dead = weight == 0
    hidden, other = (
        z.hidden.detach().masked_fill(dead[:, None], torch.nan).requires_grad_() for z in (x, y)
    )
    x, y = x._replace(hidden=hidden), y._replace(hidden=other)
    for rows, grads in both(x, y, weight, beta):
        assert all(z.isfinite().all() for z in (*rows, *grads))
        assert all((z[dead] == 0).all() for z in (*rows, grads[0]))
        assert (rows.divergence[~dead] > 0).all()


@pytest.mark.parametrize("count", [0, 3])
def test_no_live_rows(count):
    x, y = (make_inputs(count, 9, 4, torch.float32, seed=seed) for seed in range(2))
    for rows, grads in both(x, y, torch.zeros(count), 0.3):
        assert all((z == 0).all() for z in (*rows, *grads))


@pytest.mark.parametrize("beta", BETAS)
def test_strided_weights_and_repeat_bitwise(beta):
    x, y, weight = make_pair((8, 90, 20), (90, 12), torch.bfloat16, PLAIN)

    def wide(z):
        out = torch.randn(97, z.shape[1] + 5).bfloat16()[:90, : z.shape[1]]
        return out.copy_(z.detach()).requires_grad_()

    def run(change):
        a, b = (z._replace(weight=change(z.weight)) for z in (x, y))
        return [z for rows, grads in both(a, b, weight, beta) for z in (*rows, *grads)]

    expected = run(lambda z: z)
    column_major = run(lambda z: z.detach().t().contiguous().t().requires_grad_())
    for other in (run(lambda z: z), run(wide), column_major):
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize("beta", BETAS)
def test_values_without_a_gradient_are_the_same(beta):
    x, y, weight = make_pair((8, 90, 20), (90, 12), torch.float32, PLAIN)
    expected = [rows for rows, _ in both(x, y, weight, beta)]
    ids, logprob = make_top_k((8, 90), 5)
    with torch.no_grad():
        options = {"beta": beta, "token_weight": weight, **TRITON}
        full = linear_divergence(*x[:2], *y[:2], **options)
        top_k = linear_topk_divergence(*x[:2], ids, logprob, **options)
    for rows, others in zip((full, top_k), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))


@triton.jit
def mixture_kernel(log_p_ptr, log_q_ptr, out_ptr, beta, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    log_p, log_q = tl.load(log_p_ptr + at), tl.load(log_q_ptr + at)
    over_p, over_q, _ = tile.mixture(tl.exp(log_p), tl.exp(log_q), log_p, log_q, beta, tile.MIXED)
    tl.store(out_ptr + at, over_p)
    tl.store(out_ptr + SIZE + at, over_q)


@pytest.mark.parametrize("beta", [2**-30, 0.25, 0.5, 1 - 2**-10])  # no rounding in fp32
def test_log_ratios_of_the_mixture_keep_their_digits(beta):
    """To some roundings, relative to the log-ratio of p and q: log m - log p has none left."""
    size = 1024
    rng = torch.Generator().manual_seed(5)
    ratio = torch.randn(size, generator=rng) * torch.logspace(-6, 1.5, size)
    log_p = torch.zeros(size)
    out = torch.empty(2, size)
    mixture_kernel[(1,)](log_p, log_p + ratio, out, beta, size)
    exact = ratio.double()
    over_p = torch.log1p(beta * torch.expm1(exact))
    error = (out.double() - torch.stack((over_p, over_p - exact))).abs() / exact.abs()
    assert error.max() < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("is_full", [False, True])
def test_every_launch_is_on_the_device_of_its_tensors(is_full, monkeypatch):
    from xopd_kernels.linear_divergence import triton as full
    from xopd_kernels.linear_topk_divergence import triton as topk

    module, name = (full, "divergence_kernel") if is_full else (topk, "topk_divergence_kernel")
    kernel, open_guards = getattr(module, name), []

    @contextlib.contextmanager
    def guard(tensor):
        open_guards.append(tensor)
        yield
        open_guards.pop()

    class Watched:
        def __getitem__(self, grid):
            assert open_guards
            return kernel[grid]

    monkeypatch.setattr(module, "device_guard", guard)
    monkeypatch.setattr(module, name, Watched())
    x, y, weight = make_pair((4, 9, 5), (9, 5), torch.float32, PLAIN)
    assert len(list(both(x, y, weight, 0.0))) == 2
