"""A weight with an fp32 main_grad: its gradient is added there, unrounded, and not to weight.grad.

Training frameworks keep such an accumulator beside a bf16 weight, because gradients that are
rounded before they are added lose what several micro-batches have in common.
"""

import pytest
import torch

from xopd_kernels import (
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
)
from xopd_kernels.testing import make_inputs, make_terms
from xopd_kernels.testing.cases import rounding_of_factors

SHAPE = (61, 97, 16)
BUDGET_BYTES = 16_384  # several chunks


def logprob_loss(inputs):
    out = linear_logprob(
        *inputs[:2],
        inputs.target,
        bias=inputs.bias,
        needs_entropy=True,
        memory_budget_bytes=BUDGET_BYTES,
    )
    return (out.logprob + 0.3 * out.entropy).sum()


def policy_loss(inputs):
    """Upstream gradients other than 1 are part of it: they scale in the backward pass."""
    terms = make_terms(torch.full((SHAPE[0],), -4.0))
    out = linear_policy_loss(
        *inputs[:2],
        inputs.target,
        advantage=terms.teacher_logprob,
        token_weight=terms.token_weight,
        bias=inputs.bias,
        memory_budget_bytes=BUDGET_BYTES,
    )
    return 0.7 * out.loss


def divergence_options(inputs):
    """Factors of the tokens in the forward pass; ignored tokens have none."""
    weight = torch.linspace(0.1, 1.0, SHAPE[0]) * (inputs.target >= 0)
    return {
        "bias": inputs.bias,
        "token_weight": weight,
        "memory_budget_bytes": 2 * BUDGET_BYTES,
    }


def teacher_head(inputs):
    """Hidden states and weight with the same values in every dtype."""
    teacher = make_inputs(*SHAPE, torch.bfloat16, seed=7)
    return [x.detach().to(inputs.hidden.dtype) for x in teacher[:2]]


def divergence_loss(inputs):
    heads = (*inputs[:2], *teacher_head(inputs))
    return 0.7 * linear_divergence(*heads, **divergence_options(inputs)).divergence.sum()


def recomputed_divergence_loss(inputs):
    """Upstream gradients that differ from token to token: computed again in the backward pass."""
    heads = (*inputs[:2], *teacher_head(inputs))
    rows = linear_divergence(*heads, **divergence_options(inputs)).divergence
    return (rows * torch.linspace(-1.0, 1.0, SHAPE[0])).sum()


def topk_loss(inputs):
    ids = torch.arange(SHAPE[0])[:, None] + torch.arange(3)
    teacher = torch.tensor([-1.0, -2.0, -3.0]).expand(ids.shape)
    heads = (*inputs[:2], ids, teacher)
    return 0.7 * linear_topk_divergence(*heads, **divergence_options(inputs)).divergence.sum()


LOSSES = pytest.mark.parametrize(
    "loss_of",
    [logprob_loss, policy_loss, divergence_loss, recomputed_divergence_loss, topk_loss],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def with_main_grad(inputs, value=0.0):
    inputs.weight.main_grad = torch.full(SHAPE[1:], value)
    return inputs


def oracle(loss_of, inputs):
    exact = inputs.to(torch.float64)
    loss_of(exact).backward()
    return exact


@LOSSES
@DTYPES
def test_the_gradient_is_added_there_unrounded(loss_of, dtype):
    inputs = with_main_grad(make_inputs(*SHAPE, dtype), value=0.25)
    usual = inputs.to(dtype)
    for x in (inputs, usual):
        loss_of(x).backward()
    truth = oracle(loss_of, inputs)
    assert inputs.weight.grad is None
    added = (inputs.weight.main_grad - 0.25).double()
    error = (added - truth.weight.grad).norm() / truth.weight.grad.norm()
    factors = 2 * rounding_of_factors(dtype, SHAPE[2])  # sums of them cancel
    assert error <= 1e-6 + factors  # fp32, also beside what was there before
    if dtype != torch.float32:
        rounded = (usual.weight.grad.double() - truth.weight.grad).norm()
        assert error < 1e-2 * rounded / truth.weight.grad.norm() + factors
        # What is added is the gradient that is handed out without it, before its rounding.
        step = (usual.weight.grad.double() - added).norm() / added.norm()
        assert step <= torch.finfo(dtype).eps
    for name in ("hidden", "bias"):  # as without it, but for how the rows are cut into chunks
        one, other = (getattr(x, name).grad.double() for x in (inputs, usual))
        step = 2**-8 if dtype == torch.bfloat16 else 2**-11 if dtype == torch.float16 else 1e-6
        assert (one - other).norm() <= step * other.norm()


def main_grad_of(loss_of, inputs, weight):
    """What one call adds to a main_grad of zeros."""
    alone = with_main_grad(inputs._replace(weight=weight.detach().clone().requires_grad_()))
    loss_of(alone).backward()
    return alone.weight.main_grad


def assert_is_the_sum(loss_of, main_grad, calls):
    """To fp32 the sum of what each call adds; close to the exact gradients."""
    weight = calls[0].weight
    parts = [main_grad_of(loss_of, x, weight) for x in calls]
    torch.testing.assert_close(main_grad, sum(parts), rtol=1e-4, atol=1e-5)
    expected = sum(oracle(loss_of, x).weight.grad for x in calls)
    error = (main_grad.double() - expected).norm() / expected.norm()
    assert error <= 1e-6 + 2 * rounding_of_factors(torch.bfloat16, SHAPE[2])


@LOSSES
def test_two_calls_add_up(loss_of):
    first = with_main_grad(make_inputs(*SHAPE, torch.bfloat16))
    second = make_inputs(*SHAPE, torch.bfloat16, seed=1)._replace(weight=first.weight)
    losses = [loss_of(x) for x in (first, second)]  # both graphs exist before either is run
    for loss in losses:
        loss.backward()
    assert first.weight.grad is None
    assert_is_the_sum(loss_of, first.weight.main_grad, (first, second))


@LOSSES
def test_a_weight_that_two_calls_of_one_graph_share(loss_of):
    first = with_main_grad(make_inputs(*SHAPE, torch.bfloat16))
    second = make_inputs(*SHAPE, torch.bfloat16, seed=1)._replace(weight=first.weight)
    (loss_of(first) + loss_of(second)).backward()
    assert_is_the_sum(loss_of, first.weight.main_grad, (first, second))


@LOSSES
def test_a_kept_graph_gives_the_same_gradient_again(loss_of):
    inputs = with_main_grad(make_inputs(*SHAPE, torch.bfloat16))
    loss = loss_of(inputs)
    loss.backward(retain_graph=True)
    once, d_hidden = inputs.weight.main_grad.clone(), inputs.hidden.grad.clone()
    inputs.weight.main_grad.zero_()
    inputs.hidden.grad = None
    loss.backward()
    assert torch.equal(inputs.weight.main_grad, once)
    assert torch.equal(inputs.hidden.grad, d_hidden)
    assert inputs.weight.grad is None


@LOSSES
def test_without_main_grad_a_kept_graph_repeats_too(loss_of):
    inputs = make_inputs(*SHAPE, torch.bfloat16)
    loss = loss_of(inputs)
    first = torch.autograd.grad(loss, inputs[:3], retain_graph=True)
    second = torch.autograd.grad(loss, inputs[:3], retain_graph=True)
    third = torch.autograd.grad(loss, inputs[:3])  # scales in place
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=2**-7, atol=0.0)


@LOSSES
def test_a_frozen_weight_leaves_it_alone(loss_of):
    inputs = with_main_grad(make_inputs(*SHAPE, torch.bfloat16))
    inputs.weight.requires_grad_(False)
    inputs.weight.main_grad = "not even looked at"
    loss_of(inputs).backward()
    assert inputs.weight.main_grad == "not even looked at"
    assert inputs.hidden.grad.any()


@LOSSES
def test_without_gradients_it_is_not_looked_at(loss_of):
    inputs = with_main_grad(make_inputs(*SHAPE, torch.bfloat16))
    with torch.no_grad():
        loss_of(inputs)
    assert not inputs.weight.main_grad.any()


@LOSSES
def test_a_step_without_live_rows_adds_nothing(loss_of):
    inputs = with_main_grad(make_inputs(*SHAPE, torch.bfloat16), value=3.0)
    inputs.target.fill_(-100)
    loss_of(inputs).backward()
    assert (inputs.weight.main_grad == 3.0).all()
    assert inputs.weight.grad is None


@LOSSES
@pytest.mark.parametrize(
    ("main_grad", "found"),
    [
        (torch.zeros(SHAPE[1:], dtype=torch.bfloat16), r"got torch\.bfloat16 \[97, 16\] on cpu"),
        (torch.zeros(SHAPE[1:], dtype=torch.float64), r"got torch\.float64"),
        (torch.zeros(SHAPE[2:]), r"got torch\.float32 \[16\] on cpu"),
        (torch.zeros(SHAPE[1:], device="meta"), r"got torch\.float32 \[97, 16\] on meta"),
        (torch.zeros(97, 32)[:, ::2], r"got torch\.float32 \[97, 16\] on cpu, strides \(32, 2\)"),
        ([0.0], "got list"),
    ],
)
def test_what_cannot_take_the_gradient_raises(loss_of, main_grad, found):
    inputs = make_inputs(*SHAPE, torch.bfloat16)
    inputs.weight.main_grad = main_grad
    beside = "beside a weight that is not fp64"
    message = rf"weight\.main_grad must be contiguous float32 \[97, 16\] on cpu, {beside}, {found}"
    with pytest.raises(ValueError, match=message):
        loss_of(inputs)


@LOSSES
def test_a_weight_with_hooks_raises(loss_of):
    """A hook would be called with no gradient, after main_grad has it."""
    inputs = with_main_grad(make_inputs(*SHAPE, torch.bfloat16))
    handle = inputs.weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(ValueError, match="main_grad and gradient hooks"):
        loss_of(inputs)
    handle.remove()
    loss_of(inputs).backward()
    assert inputs.weight.main_grad.any()


@LOSSES
def test_create_graph_raises_and_adds_nothing(loss_of):
    inputs = with_main_grad(make_inputs(*SHAPE, torch.float32))
    with pytest.raises(RuntimeError, match=r"main_grad does not take create_graph=True"):
        torch.autograd.grad(loss_of(inputs), inputs[:3], create_graph=True)
    assert not inputs.weight.main_grad.any()
