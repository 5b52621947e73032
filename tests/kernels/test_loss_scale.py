"""Gradients computed ahead survive the loss scale: it multiplies them before they are rounded."""

import pytest
import torch

from xopd_kernels import linear_divergence, linear_policy_loss
from xopd_kernels.compat.torch_nn import linear_cross_entropy
from xopd_kernels.testing import Distribution, assert_within_budget, make_inputs

ROWS, SCALE = 2048, 16_384.0  # gradients of a mean: most of them underflow in fp16


def cross_entropy(x):
    return linear_cross_entropy(*x[:2], x.target)


def policy_loss(x):
    weight = (x.target >= 0).float() / ROWS
    advantage = torch.ones(ROWS)
    return linear_policy_loss(*x[:2], x.target, advantage=advantage, token_weight=weight).loss


def divergence(x):
    teacher = make_inputs(ROWS, 300, 24, torch.float16, Distribution.PEAKED, seed=1)
    heads = [t.detach().to(x.hidden.dtype) for t in teacher[:2]]
    return linear_divergence(*x[:2], *heads).divergence.sum() / ROWS


@pytest.mark.parametrize("loss", [cross_entropy, policy_loss, divergence])
@pytest.mark.parametrize("trained", [2, 1], ids=["both", "hidden only"])
@pytest.mark.parametrize("keeps_graph", [False, True])
def test_fp16_gradients_do_not_underflow_before_the_loss_scale(loss, trained, keeps_graph):
    inputs = make_inputs(ROWS, 300, 24, torch.float16, Distribution.PEAKED)
    wide = [inputs.to(torch.float32), inputs.to(torch.float64)]
    results = []
    for x in (inputs, *wide):
        x = x if trained == 2 else x._replace(weight=x.weight.detach())
        scaled = loss(x).float() * SCALE if x is not wide[1] else loss(x) * SCALE
        results.append(torch.autograd.grad(scaled, x[:trained], retain_graph=keeps_graph))
    for actual, baseline, oracle in zip(*results, strict=True):
        assert actual.dtype == torch.float16
        # The baseline is fp32 arithmetic: what is left is one rounding to fp16, and subnormals.
        assert_within_budget("gradient", actual, baseline, oracle)
