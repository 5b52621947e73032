"""linear_divergence and linear_topk_divergence: closed forms, gradients, cost, torch features."""

import math

import pytest
import torch

from xopd_kernels import (
    linear_divergence,
    linear_topk_divergence,
    reverse_kl_advantage,
)
from xopd_kernels.linear_divergence import reference as divergence_reference
from xopd_kernels.linear_topk_divergence import reference as topk_reference
from xopd_kernels.testing.distillation import (
    D_TEACHER,
    V_TEACHER,
    D,
    N,
    V,
    full,
    make_distillation,
    make_top_k,
    top_k,
)

FP64 = {"dtype": torch.float64}
BETAS = [0.0, 0.3, 1.0]
BOTH = pytest.mark.parametrize("call", [full, top_k])


def dense(log_p, log_q, beta):
    if beta == 0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if beta == 1:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = ((1 - beta) * log_p.exp() + beta * log_q.exp()).log()
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)


def with_tail(log_p):
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).log()
    return torch.cat((log_p, rest), -1)


def assert_same_gradients(actual, expected, leaves):
    rng = torch.Generator().manual_seed(1)
    for upstream in (torch.ones(N, **FP64), torch.randn(N, generator=rng, **FP64)):
        pairs = [
            torch.autograd.grad((x * upstream).sum(), leaves, retain_graph=True)
            for x in (actual, expected)
        ]
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_the_dense_formula_in_fp64(beta, softcap):
    leaves, teacher, weight = make_distillation()
    hidden, matrix, bias = leaves
    options = {"temperature": 0.7, "softcap": softcap, "logit_scale": 0.8}
    out = linear_divergence(
        hidden,
        matrix,
        *teacher,
        beta=beta,
        bias=bias,
        teacher_softcap=5.0,
        teacher_logit_scale=1.2,
        token_weight=weight,
        **options,
    )
    z = (hidden @ matrix.T + bias) * 0.8
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z_teacher = 5.0 * torch.tanh(teacher[0] @ teacher[1][:V].T * 1.2 / 5.0)
    expected = weight * dense((z / 0.7).log_softmax(-1), (z_teacher / 0.7).log_softmax(-1), beta)
    torch.testing.assert_close(out.divergence, expected, rtol=1e-12, atol=1e-12)
    is_live = weight != 0
    torch.testing.assert_close(out.lse, (z / 0.7).logsumexp(-1).detach() * is_live)
    torch.testing.assert_close(out.teacher_lse, (z_teacher / 0.7).logsumexp(-1) * is_live)
    assert_same_gradients(out.divergence, expected, leaves)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", ["bucket", "ignore"])
def test_top_k_equals_the_dense_formula_in_fp64(beta, tail):
    leaves, teacher, weight = make_distillation()
    hidden, matrix, bias = leaves
    ids, logprob = make_top_k(teacher)
    out = linear_topk_divergence(
        hidden, matrix, ids, logprob, beta=beta, tail=tail, bias=bias, token_weight=weight
    )
    z = hidden @ matrix.T + bias
    log_p, log_q = z.log_softmax(-1).gather(1, ids), logprob
    if tail == "bucket":
        log_p, log_q = with_tail(log_p), with_tail(log_q)
    expected = weight * dense(log_p, log_q, beta)
    torch.testing.assert_close(out.divergence, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.lse, z.logsumexp(-1).detach() * (weight != 0))
    assert_same_gradients(out.divergence, expected, leaves)


@BOTH
@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(call, beta):
    leaves, teacher, weight = make_distillation()
    assert torch.autograd.gradcheck(
        lambda *x: call(x, teacher, beta=beta, softcap=3.0, token_weight=weight), leaves
    )


@pytest.mark.parametrize("beta", [3e-8, 1.0 - 3e-8])
def test_a_beta_that_fp32_cannot_tell_from_an_end_is_refused(beta):
    heads = (torch.zeros(1, 2), torch.zeros(3, 2)) * 2
    with pytest.raises(ValueError, match=r"beta must be 0, 1 or at least 1e-06 from both"):
        linear_divergence(*heads, beta=beta)
    assert torch.isfinite(linear_divergence(*heads, beta=1e-6).divergence).all()


@pytest.mark.parametrize("beta", BETAS)
def test_bernoulli_by_hand(beta):
    """Two classes: p = sigmoid(2), q = sigmoid(-1)."""
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    m = (1 - beta) * p + beta * q

    def kl(a, b):
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    expected = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta)
    if expected is None:
        expected = beta * kl(q, m) + (1 - beta) * kl(p, m)
    one, matrix = torch.ones(1, 1, **FP64), torch.tensor([[2.0], [0.0]], **FP64)
    teacher = torch.tensor([[-1.0], [0.0]], **FP64)
    out = linear_divergence(one, matrix, one, teacher, beta=beta)
    assert out.divergence.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_heads_give_exactly_zero(beta, dtype):
    (hidden, matrix, bias), _, _ = make_distillation(dtype)
    leaves = (hidden, matrix, bias)
    frozen = [x.detach() for x in leaves]
    out = linear_divergence(*leaves[:2], *frozen[:2], bias=bias, teacher_bias=frozen[2], beta=beta)
    assert (out.divergence.abs() < 1e-12).all()
    for grad in torch.autograd.grad(out.divergence.sum(), leaves):
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_small_divergences_keep_their_digits(beta):
    """sum p (log p - log q) of near-equal heads cancels to noise in fp32."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 16, generator=rng), torch.randn(500, 16, generator=rng)
    close = weight + 1e-4 * torch.randn(500, 16, generator=rng)
    out = linear_divergence(hidden, close, hidden, weight, beta=beta).divergence
    exact = linear_divergence(
        hidden.double(), close.double(), hidden.double(), weight.double(), beta=beta
    ).divergence
    assert (out >= 0).all()
    # The logits carry errors of 1e-6, relative to differences of 1e-4.
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=0.0)


@BOTH
@pytest.mark.parametrize("beta", BETAS)
def test_divergences_are_never_negative(call, beta):
    leaves, teacher, _ = make_distillation(torch.float32)
    assert (call(leaves, teacher, beta=beta) >= 0).all()


def test_padding_rows_of_the_larger_vocabulary_hold_no_mass():
    """Zero-padded students would give p > 0 to classes that do not exist."""
    (hidden, matrix, bias), teacher, _ = make_distillation()
    cut = [teacher[0], teacher[1][:V]]
    padded = [teacher[0], torch.cat((teacher[1][:V], torch.full((9, D_TEACHER), 50.0, **FP64)))]
    expected = full((hidden, matrix, bias), cut)
    torch.testing.assert_close(full((hidden, matrix, bias), padded), expected)
    wide = torch.cat((matrix, torch.full((6, D), 50.0, **FP64))).detach().requires_grad_()
    out = linear_divergence(hidden, wide, *cut, bias=torch.cat((bias, torch.ones(6, **FP64))))
    torch.testing.assert_close(out.divergence, expected)
    (grad,) = torch.autograd.grad(out.divergence.sum(), wide)
    assert (grad[V:] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_classes_of_probability_zero(beta):
    """-inf on both sides counts nothing; on the side that is averaged over, neither."""
    (hidden, matrix, _), teacher, _ = make_distillation()
    bias, teacher_bias = torch.zeros(V, **FP64), torch.zeros(V_TEACHER, **FP64)
    bias[:5], teacher_bias[:5] = -torch.inf, -torch.inf
    out = linear_divergence(
        hidden, matrix, *teacher, bias=bias, teacher_bias=teacher_bias, beta=beta
    ).divergence
    small = linear_divergence(hidden, matrix[5:], teacher[0], teacher[1][5:V], beta=beta).divergence
    torch.testing.assert_close(out, small)
    for one, other in zip(
        torch.autograd.grad(out.sum(), (hidden, matrix)),
        torch.autograd.grad(small.sum(), (hidden, matrix)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    one_sided = {"bias": bias} if beta == 1 else {"teacher_bias": teacher_bias}
    out = linear_divergence(hidden, matrix, *teacher, beta=beta, **one_sided).divergence
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), hidden)[0].isfinite().all()


def test_all_ids_leave_an_empty_bucket():
    (hidden, matrix, bias), teacher, _ = make_distillation()
    log_q = (teacher[0] @ teacher[1][:V].T).log_softmax(-1)
    ids = torch.arange(V).expand(N, V)
    out = linear_topk_divergence(hidden, matrix, ids, log_q, bias=bias).divergence
    expected = linear_divergence(hidden, matrix, teacher[0], teacher[1][:V], bias=bias).divergence
    torch.testing.assert_close(out, expected)
    pair = [torch.autograd.grad(x.sum(), (hidden, matrix)) for x in (out, expected)]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_whose_ids_hold_all_mass_in_fp32_keeps_a_tail(beta):
    """1 - sum q rounds to 0: the reverse KL of any student would be inf."""
    (hidden, matrix, bias), _, _ = make_distillation(torch.float32)
    ids, logprob = torch.tensor([[3, 5]]).expand(N, 2), torch.tensor([[-1e-9, -30.0]]).expand(N, 2)
    out = linear_topk_divergence(hidden, matrix, ids, logprob, beta=beta, bias=bias).divergence
    grads = torch.autograd.grad(out.sum(), (hidden, matrix, bias))
    assert all(x.isfinite().all() for x in (out, *grads))


def test_a_tail_far_below_the_ids_keeps_its_mass():
    """exp(z - maximum) of the tail is 0 in fp32: p_rest by way of it would be 0, too."""
    bias = torch.tensor([800.0, 0.0, 0.0, 1.0], requires_grad=True)
    zeros = torch.zeros(1, 2), torch.zeros(4, 2)
    logprob = torch.tensor([[0.6]]).log()
    out = linear_topk_divergence(*zeros, torch.tensor([[0]]), logprob, beta=0.0, bias=bias)
    log_rest = math.log(2 + math.e) - 800
    expected = 0.6 * math.log(0.6) + 0.4 * (math.log(0.4) - log_rest)
    assert out.divergence.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(out.divergence.sum(), bias)
    share = 0.4 / (2 + math.e)
    torch.testing.assert_close(grad, torch.tensor([0.4, -share, -share, -share * math.e]))


def test_the_order_of_the_ids_does_not_matter():
    (hidden, matrix, _), teacher, _ = make_distillation()
    ids, logprob = make_top_k(teacher)
    out = linear_topk_divergence(hidden, matrix, ids, logprob).divergence
    turned = linear_topk_divergence(hidden, matrix, ids.flip(1), logprob.flip(1)).divergence
    torch.testing.assert_close(turned, out)


def count_passes(monkeypatch, call):
    """Calls of the reference, which runs all of fp64."""
    module = divergence_reference if call is full else topk_reference
    passes = []
    original = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: passes.append(args) or original(*args))
    return passes


@BOTH
def test_a_common_upstream_gradient_needs_no_second_pass(call, monkeypatch):
    leaves, teacher, weight = make_distillation()
    passes = count_passes(monkeypatch, call)
    for reduce in (torch.sum, torch.mean, lambda x: (x * (weight != 0)).sum() / 3):
        out = call(leaves, teacher, token_weight=weight)
        passes.clear()
        torch.autograd.grad(reduce(out), leaves)
        assert not passes
    out = call(leaves, teacher, token_weight=weight)
    passes.clear()
    torch.autograd.grad((out * torch.arange(N)).sum(), leaves)
    assert len(passes) == 1


@BOTH
def test_a_frozen_weight_takes_any_upstream_in_one_pass(call, monkeypatch):
    (hidden, matrix, bias), teacher, _ = make_distillation()
    upstream = torch.arange(N, **FP64)
    expected = torch.autograd.grad((call((hidden, matrix, bias), teacher) * upstream).sum(), hidden)
    frozen = (hidden, matrix.detach(), bias.detach())
    out = call(frozen, teacher)
    passes = count_passes(monkeypatch, call)
    actual = torch.autograd.grad((out * upstream).sum(), hidden)
    assert not passes
    torch.testing.assert_close(actual, expected)


@BOTH
def test_a_frozen_hidden_and_no_gradient_at_all(call):
    (hidden, matrix, bias), teacher, _ = make_distillation()
    whole = call((hidden, matrix, bias), teacher)
    expected = torch.autograd.grad(whole.sum(), (matrix, bias))
    out = call((hidden.detach(), matrix, bias), teacher)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (matrix, bias)), expected)
    with torch.no_grad():
        scored = call((hidden, matrix, bias), teacher)
    assert not scored.requires_grad
    torch.testing.assert_close(scored, whole.detach())


@BOTH
def test_ignored_rows_are_not_read(call):
    (hidden, matrix, bias), teacher, weight = make_distillation(torch.float32)
    dead = weight == 0
    hidden = hidden.detach().masked_fill(dead[:, None], torch.nan).requires_grad_()
    out = call((hidden, matrix, bias), teacher, token_weight=weight)
    grads = torch.autograd.grad(out.sum(), (hidden, matrix, bias))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert (out[dead] == 0).all()
    assert (grads[0][dead] == 0).all()


@BOTH
@pytest.mark.parametrize("rows", [0, 3])
def test_no_live_rows(call, rows):
    (hidden, matrix, bias), teacher, _ = make_distillation()
    hidden = hidden.detach()[:rows].requires_grad_()
    weight = torch.zeros(rows, **FP64)
    out = call((hidden, matrix, bias), [teacher[0][:rows], teacher[1]], token_weight=weight)
    grads = torch.autograd.grad(out.sum(), (hidden, matrix, bias))
    assert all((x == 0).all() for x in (out, *grads))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_budget_does_not_change_the_result(call, dtype):
    leaves, teacher, weight = make_distillation(dtype)

    def run(budget):
        out = call(leaves, teacher, token_weight=weight, softcap=4.0, memory_budget_bytes=budget)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    for one, other in zip(run(9000), run(None), strict=True):
        rtol = 1e-12 if one.dtype == torch.float64 else 2 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


def test_only_the_divergence_has_a_gradient():
    (hidden, matrix, _), teacher, _ = make_distillation()
    trained = [x.requires_grad_() for x in teacher]
    out = linear_divergence(hidden, matrix, *trained)
    assert out.divergence.requires_grad
    assert not out.lse.requires_grad
    assert not out.teacher_lse.requires_grad
    assert torch.autograd.grad(out.divergence.sum(), trained, allow_unused=True) == (None, None)


def test_advantage_is_the_clamped_difference_of_the_log_probs():
    (hidden, matrix, bias), teacher, _ = make_distillation()
    target = torch.arange(N) % V
    target[3] = -100
    out = reverse_kl_advantage(
        hidden, matrix, *teacher, target, temperature=0.7, bias=bias, advantage_clamp=2.0
    )
    column = target.clamp(min=0)[:, None]
    log_p = ((hidden @ matrix.T + bias) / 0.7).log_softmax(-1).gather(1, column).squeeze(1)
    log_q = (teacher[0] @ teacher[1][:V].T / 0.7).log_softmax(-1).gather(1, column).squeeze(1)
    is_live = target != -100
    expected = ((log_q - log_p).clamp(-2.0, 2.0) * is_live, log_p * is_live, log_q * is_live)
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other.detach())
        assert not one.requires_grad
    assert (out.advantage.abs() == 2.0).any()
