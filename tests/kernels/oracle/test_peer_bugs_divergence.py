"""Bugs of other projects' distillation losses, one regression test each."""

import math

import pytest
import torch

from xopd_kernels import linear_divergence, linear_topk_divergence, reverse_kl_advantage
from xopd_kernels.testing import make_head, make_inputs
from xopd_kernels.testing.dense import dense_divergence

BETAS = [0.0, 0.3, 1.0]


def pair(rows=6, classes=(7, 7), dims=(5, 3), dtype=torch.float64):
    """Student and teacher with weights of their own."""
    student = make_inputs(rows, classes[0], dims[0], dtype, seed=1)
    return student, make_inputs(rows, classes[1], dims[1], dtype, seed=2)


def by_bias(*rows):
    """Arguments of `linear_divergence` whose log-probs are the given rows."""
    student, teacher = (torch.as_tensor(x, dtype=torch.float64).log() for x in rows)
    hidden = torch.zeros(1, 1, dtype=torch.float64)
    weight = torch.zeros(len(student), 1, dtype=torch.float64)
    other = torch.zeros(len(teacher), 1, dtype=torch.float64)
    bias = student.requires_grad_()
    return (hidden, weight, hidden, other), {"bias": bias, "teacher_bias": teacher}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("classes", [(7, 12), (12, 7)])
def test_padding_of_either_vocabulary_holds_no_mass(beta, classes):
    """LMOps PR331, torchtune #2119, TRL #2215; Liger pads with zeros: phantom mass at logit 0."""
    s, t = pair(classes=classes)
    args = (s.hidden, s.weight, t.hidden, t.weight)
    out = linear_divergence(*args, beta=beta, bias=s.bias, teacher_bias=t.bias)
    few = linear_divergence(
        s.hidden,
        s.weight[:7],
        t.hidden,
        t.weight[:7],
        beta=beta,
        bias=s.bias[:7],
        teacher_bias=t.bias[:7],
    )
    for one, other in zip(out, few, strict=True):
        torch.testing.assert_close(one, other)
    grads, expected = (
        torch.autograd.grad(x.divergence.sum(), (s.hidden, s.weight, s.bias)) for x in (out, few)
    )
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert (grads[1][7:] == 0).all()


def test_an_advantage_of_padded_vocabularies():
    """Model-Optimizer #2489: 151,936 against 152,064 classes; a teacher of another D: TRL #6526."""
    s, t = pair(classes=(7, 12))
    target = torch.tensor([0, 6, 3, 1, -100, 2])
    out = reverse_kl_advantage(s.hidden, s.weight, t.hidden, t.weight, target)
    few = reverse_kl_advantage(s.hidden, s.weight, t.hidden, t.weight[:7], target)
    assert all(torch.equal(a, b) for a, b in zip(out, few, strict=True))
    assert out.advantage[4] == 0
    assert not out.advantage.requires_grad


def test_the_direction_of_beta():
    """TRL PR3043: beta was swapped, and its ends were not the two KL divergences."""
    p, q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    mix = [0.75 * x + 0.25 * y for x, y in zip(p, q, strict=True)]
    expected = {0.0: kl(q, p), 1.0: kl(p, q), 0.25: 0.25 * kl(q, mix) + 0.75 * kl(p, mix)}
    args, bias = by_bias(p, q)
    for beta, value in expected.items():
        actual = linear_divergence(*args, beta=beta, **bias).divergence.item()
        assert actual == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_classes_that_both_exclude(beta):
    """TRL PR5594: -inf padding of the teacher: the loss finite, the gradient NaN."""
    args, bias = by_bias([0.5, 0.5, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0])
    value = linear_divergence(*args, beta=beta, **bias).divergence
    small_args, small_bias = by_bias([0.5, 0.5], [0.25, 0.75])
    expected = linear_divergence(*small_args, beta=beta, **small_bias).divergence
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value.sum(), bias["bias"])
    (few,) = torch.autograd.grad(expected.sum(), small_bias["bias"])
    torch.testing.assert_close(grad[:2], few)
    assert (grad[2:] == 0).all()


def test_disjoint_distributions():
    """Liger #769, PR862: NaN of the fused JSD. It is log 2 at most, with a finite gradient."""
    args, bias = by_bias([1.0, 0.0], [0.0, 1.0])
    value = linear_divergence(*args, beta=0.5, **bias).divergence
    torch.testing.assert_close(value.item(), math.log(2))
    assert torch.autograd.grad(value.sum(), bias["bias"])[0].isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_weight_zero_is_not_read(beta, dtype):
    """Liger PR974: ignore_index accepted and not used; NaN of padding spreads."""
    s, t = pair(dtype=dtype)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5, 1.0])
    dead = weight == 0
    hidden = s.hidden.detach().masked_fill(dead[:, None], torch.nan).requires_grad_()
    teacher = t.hidden.detach().masked_fill(dead[:, None], torch.inf)
    out = linear_divergence(
        hidden, s.weight, teacher, t.weight, beta=beta, token_weight=weight, bias=s.bias
    )
    grads = torch.autograd.grad(out.divergence.sum(), (hidden, s.weight, s.bias))
    assert all((field[dead] == 0).all() for field in (*out, grads[0]))
    assert all(x.isfinite().all() for x in (*out, *grads))


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("step", [1e-2, 1e-3])
def test_close_distributions_keep_the_sign_and_the_digits(beta, step):
    """Dense fp32 KL near 5e-7 is 130 % off and negative at V = 151,936."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=rng)
    moved = logits + step * torch.randn(20_000, generator=rng)
    zeros = torch.zeros(1, 1), torch.zeros(20_000, 1)
    out = linear_divergence(*zeros, *zeros, beta=beta, bias=moved, teacher_bias=logits)
    x, y = moved.double().log_softmax(0), logits.double().log_softmax(0)
    p, difference = (x.exp(), x - y) if beta == 1.0 else (y.exp(), y - x)
    truth = (p * (torch.expm1(-difference) + difference)).sum()
    assert out.divergence.item() == pytest.approx(truth.item(), rel=1e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence_and_no_gradient(beta):
    """TRL, Liger: rounding of p - q leaves a gradient where student and teacher agree."""
    s, _ = pair(dtype=torch.float32)
    args = (s.hidden, s.weight, s.hidden.detach(), s.weight.detach())
    value = linear_divergence(*args, beta=beta).divergence
    grads = torch.autograd.grad(value.sum(), (s.hidden, s.weight))
    assert value.abs().max() <= 1e-7
    assert all(grad.abs().max() <= 1e-6 for grad in grads)


@pytest.mark.parametrize("beta", BETAS)
def test_per_token_upstream_gradients(beta):
    """Liger #968, NeMo Automodel #3803: one upstream gradient taken for all tokens."""
    s, t = pair()
    upstream = torch.linspace(-2, 3, 6, dtype=torch.float64)
    args = (s.hidden, s.weight, t.hidden, t.weight)
    ours = linear_divergence(*args, beta=beta).divergence
    dense = dense_divergence(s.hidden, make_head(s), t.hidden, make_head(t), beta).divergence
    actual, expected = (
        torch.autograd.grad(x, (s.hidden, s.weight), upstream) for x in (ours, dense)
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_teacher_is_a_constant():
    """A teacher that trains along: its tensors must get no gradient, and need none."""
    s, t = pair()
    out = linear_divergence(s.hidden, s.weight, t.hidden, t.weight, teacher_bias=t.bias)
    grads = torch.autograd.grad(out.divergence.sum(), t[:3], allow_unused=True)
    assert grads == (None, None, None)


def topk(student, teacher, ids, **options):
    """The top-k divergence of two rows of probabilities."""
    args, bias = by_bias(student, teacher)
    ids = torch.tensor([ids])
    logprob = torch.tensor(teacher, dtype=torch.float64).log()[ids]
    return linear_topk_divergence(*args[:2], ids, logprob, bias=bias["bias"], **options).divergence


@pytest.mark.parametrize("beta", BETAS)
def test_mass_outside_the_top_k_counts(beta):
    """verl #7856, PR5041: without a tail, reverse KL over K ids rewards leaving the ids."""
    teacher = [0.5, 0.4, 0.05, 0.05]
    inside, outside = [0.5, 0.4, 0.02, 0.08], [0.05, 0.04, 0.4, 0.51]
    assert topk(inside, teacher, [0, 1], beta=beta).item() == pytest.approx(0, abs=1e-12)
    assert topk(outside, teacher, [0, 1], beta=beta).item() > 0.3
    assert topk(outside, teacher, [0, 1], beta=1.0, tail="ignore").item() < 0  # the peers' sum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tail_whose_exponentials_underflow(dtype):
    """verl #7856: log of a sum of underflowed exponentials: loss inf, the tail's gradient lost."""
    bias = torch.tensor([800.0, 0.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(1, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)
    logprob = torch.tensor([[0.6]], dtype=dtype).log()
    out = linear_topk_divergence(*zeros, torch.tensor([[0]]), logprob, beta=0.0, bias=bias)
    tail = torch.tensor([0.0, 0.0, 1.0], dtype=dtype)
    expected = 0.6 * math.log(0.6) + 0.4 * (math.log(0.4) + 800 - tail.logsumexp(0).item())
    assert out.divergence.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(out.divergence.sum(), bias)
    torch.testing.assert_close(
        grad, torch.cat((torch.tensor([0.4]), -0.4 * tail.softmax(0))).to(dtype)
    )


@pytest.mark.parametrize("beta", BETAS)
def test_all_classes_as_top_k_are_the_whole_divergence(beta):
    """VeOmni #771: the tail of K = V holds nothing and must add nothing, not NaN."""
    student, teacher = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    args, bias = by_bias(student, teacher)
    expected = linear_divergence(*args, beta=beta, **bias).divergence
    torch.testing.assert_close(topk(student, teacher, [2, 0, 1], beta=beta), expected)


def test_temperature_scales_both_and_adds_no_factor():
    """TRL PR4105: a factor 1 / (T V), or T^2, that the formula does not have."""
    s, t = pair()
    args = (s.hidden, s.weight, t.hidden, t.weight)
    hot = linear_divergence(*args, temperature=2.0).divergence
    halved = linear_divergence(s.hidden / 2, s.weight, t.hidden / 2, t.weight).divergence
    torch.testing.assert_close(hot, halved)


def test_each_model_has_its_own_softcap_and_scale():
    """TRL #6629: the student's softcap was applied to the teacher."""
    s, t = pair()
    transform = {"softcap": 2.0, "teacher_softcap": 0.7, "logit_scale": 1.5}
    out = linear_divergence(
        s.hidden, s.weight, t.hidden, t.weight, teacher_logit_scale=0.4, **transform
    )
    heads = make_head(s, softcap=2.0, logit_scale=1.5), make_head(t, softcap=0.7, logit_scale=0.4)
    expected = dense_divergence(s.hidden, heads[0], t.hidden, heads[1], 1.0)
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other)
