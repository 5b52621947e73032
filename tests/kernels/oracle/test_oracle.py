"""The oracle itself: its derivatives, its digits, and that the budget can be exceeded."""

import pytest
import torch

from xopd_kernels.testing import (
    Distribution,
    ErrorPool,
    assert_within_budget,
    dense_divergence,
    dense_logprob,
    dense_topk_divergence,
    make_head,
    make_inputs,
)
from xopd_kernels.testing.dense import logprob_of

TRANSFORM = {"temperature": 0.8, "softcap": 3.0, "logit_scale": 1.5}


def test_logprob_has_the_derivatives_it_claims():
    x = make_inputs(4, 6, 3, torch.float64)

    def call(hidden, weight, bias):
        head = make_head(x, True, **TRANSFORM)._replace(weight=weight, bias=bias)
        return tuple(dense_logprob(hidden, head, x.target))

    assert torch.autograd.gradcheck(call, x[:3])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_have_the_derivatives_they_claim(beta):
    x, teacher = make_inputs(4, 6, 3, torch.float64), make_inputs(4, 8, 2, torch.float64, seed=1)
    ids = torch.tensor([[0, 3], [5, 1], [2, 4], [1, 0]])
    logprob = torch.full((4, 2), -1.2, dtype=torch.float64)

    def call(hidden, weight):
        head = make_head(x, **TRANSFORM)._replace(weight=weight)
        whole = dense_divergence(hidden, head, teacher.hidden, make_head(teacher), beta)
        return whole.divergence, dense_topk_divergence(hidden, head, ids, logprob, beta).divergence

    assert torch.autograd.gradcheck(call, x[:2])


def test_the_logprob_of_a_certain_token_keeps_its_digits():
    logits = torch.tensor([[60.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    value = logprob_of(logits, torch.tensor([[0]]))
    others = (
        torch.tensor([0.0, 1.0], dtype=torch.float64).exp() * torch.tensor(-60.0).double().exp()
    )
    torch.testing.assert_close(value[0, 0], -others.sum(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(grad[0, 1:], -others, rtol=1e-12, atol=0)


def test_a_rounded_accumulator_exceeds_the_budget():
    """Logits rounded to bf16 in an fp32 operator: what both checks are there to find."""
    x = make_inputs(31, 40, 16, torch.float32, Distribution.PEAKED)
    exact = x.to(torch.float64)
    truth = dense_logprob(exact.hidden, make_head(exact), x.target).logprob
    plain = dense_logprob(x.hidden, make_head(x), x.target).logprob
    low = x.to(torch.bfloat16)
    rounded = dense_logprob(low.hidden, make_head(low), x.target).logprob
    assert_within_budget("plain", plain, plain, truth)
    with pytest.raises(AssertionError, match=r"error .* against fp64, budget"):
        assert_within_budget("rounded", rounded, plain, truth)
    pool = ErrorPool()
    pool.add("logprob", rounded, plain, truth, 1e-6)
    with pytest.raises(AssertionError, match="pooled error"):
        pool.check()


def test_a_nan_exceeds_the_budget():
    values = torch.ones(3)
    with pytest.raises(AssertionError, match="error nan"):
        assert_within_budget("x", values * torch.nan, values, values)
