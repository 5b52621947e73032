"""main_grad_ahead: the forward pass adds d_weight to main_grad, and the backward pass holds it to
what was promised: one of them, upstream gradients of 1."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from xopd_kernels import linear_divergence, linear_policy_loss, linear_topk_divergence
from xopd_kernels.testing import make_inputs

SHAPE = (61, 97, 16)
BUDGET_BYTES = 32_768  # several chunks


def options(inputs, is_ahead):
    return {
        "bias": inputs.bias,
        "token_weight": torch.linspace(0.1, 1.0, SHAPE[0]) * (inputs.target >= 0),
        "memory_budget_bytes": BUDGET_BYTES,
        "main_grad_ahead": is_ahead,
    }


def policy(inputs, is_ahead=True):
    given = options(inputs, is_ahead)
    advantage = torch.linspace(-2.0, 2.0, SHAPE[0])
    return linear_policy_loss(*inputs[:2], inputs.target, advantage=advantage, **given).loss


def divergence(inputs, is_ahead=True):
    teacher = make_inputs(*SHAPE, torch.bfloat16, seed=7)
    heads = [x.detach().to(inputs.hidden.dtype) for x in teacher[:2]]
    return linear_divergence(*inputs[:2], *heads, **options(inputs, is_ahead)).divergence


def topk(inputs, is_ahead=True):
    ids = torch.arange(SHAPE[0])[:, None] + torch.arange(3)
    teacher = torch.tensor([-1.0, -2.0, -3.0]).expand(ids.shape)
    given = options(inputs, is_ahead)
    return linear_topk_divergence(*inputs[:2], ids, teacher, **given).divergence


CALLS = pytest.mark.parametrize("call", [policy, divergence, topk])


def make(dtype, value=0.0, seed=0):
    inputs = make_inputs(*SHAPE, dtype, seed=seed)
    inputs.weight.main_grad = torch.full(SHAPE[1:], value)
    return inputs


@CALLS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_gradients_as_in_the_backward_pass(call, dtype):
    ahead, usual = make(dtype), make(dtype)
    losses = [call(ahead), call(usual, is_ahead=False)]
    assert torch.equal(*losses)
    in_forward = ahead.weight.main_grad.clone()
    for loss in losses:
        loss.sum().backward()
    assert in_forward.any()
    assert torch.equal(ahead.weight.main_grad, in_forward)  # nothing was left for later
    torch.testing.assert_close(in_forward, usual.weight.main_grad, rtol=1e-5, atol=1e-6)
    assert ahead.weight.grad is None
    for name in ("hidden", "bias"):
        assert torch.equal(getattr(ahead, name).grad, getattr(usual, name).grad)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_teacher_of_fewer_classes(is_ahead):
    """The classes beyond the teacher's keep what main_grad holds."""
    inputs, teacher = make(torch.float32, value=0.25), make_inputs(SHAPE[0], 71, 8, torch.float32)
    heads = (*inputs[:2], *(x.detach() for x in teacher[:2]))
    out = linear_divergence(*heads, main_grad_ahead=is_ahead).divergence
    exact = [x.detach().double().requires_grad_() for x in heads]
    expected = linear_divergence(*exact).divergence
    expected.sum().backward()
    out.sum().backward()
    added = inputs.weight.main_grad.double() - 0.25
    torch.testing.assert_close(added, exact[1].grad, rtol=1e-4, atol=1e-6)
    assert (added[71:] == 0).all() and added[:71].any()
    assert inputs.weight.grad is None or not inputs.weight.grad.any()


def test_torch_compile_without_fullgraph_runs_it_untraced():
    inputs, usual = make(torch.float32), make(torch.float32)
    torch.compile(policy, backend="aot_eager")(inputs).backward()
    policy(usual).backward()
    assert torch.equal(inputs.weight.main_grad, usual.weight.main_grad)


def test_a_weight_that_is_no_leaf_raises():
    inputs = make_inputs(*SHAPE, torch.float32)
    weight = inputs.weight * 2
    weight.main_grad = torch.zeros(SHAPE[1:])
    with pytest.raises(ValueError, match="is no leaf"):
        policy(inputs._replace(weight=weight))


@CALLS
def test_it_is_added_to_what_is_there(call):
    fresh, used = make(torch.bfloat16), make(torch.bfloat16, value=0.25)
    for inputs in (fresh, used):
        call(inputs).sum().backward()
    added = used.weight.main_grad - 0.25
    torch.testing.assert_close(added, fresh.weight.main_grad, rtol=1e-5, atol=1e-5)


@CALLS
@pytest.mark.parametrize("factor", [0.5, 0.0, torch.nan])
def test_another_upstream_gradient_raises(call, factor):
    with pytest.raises(RuntimeError, match="takes upstream gradients of 1"):
        (call(make(torch.bfloat16)).sum() * factor).backward()


def test_upstream_gradients_of_ignored_tokens_do_not_count():
    inputs = make(torch.bfloat16)
    rows = divergence(inputs)
    rows[inputs.target >= 0].sum().backward()
    assert inputs.hidden.grad.isfinite().all()


@CALLS
def test_a_second_backward_pass_raises(call):
    loss = call(make(torch.bfloat16)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="takes one backward pass, this is the second"):
        loss.backward()


@CALLS
def test_create_graph_raises(call):
    inputs = make(torch.float32)
    with pytest.raises(RuntimeError, match="does not take create_graph=True"):
        torch.autograd.grad(call(inputs).sum(), inputs.hidden, create_graph=True)


@CALLS
def test_checkpointing_raises_before_anything_is_added(call):
    inputs = make(torch.bfloat16)
    with pytest.raises(NotImplementedError, match="would add d_weight to main_grad twice"):
        checkpoint(call, inputs, use_reentrant=False)
    assert not inputs.weight.main_grad.any()


@CALLS
def test_a_reentrant_checkpoint_adds_once(call):
    """Its first forward pass runs without gradients; the second one is the one that counts."""
    usual, inputs = make(torch.bfloat16), make(torch.bfloat16)
    call(usual).sum().backward()

    def run(hidden):
        return call(inputs._replace(hidden=hidden)).sum()

    checkpoint(run, inputs.hidden, use_reentrant=True).backward()
    assert torch.equal(inputs.weight.main_grad, usual.weight.main_grad)


@CALLS
def test_a_weight_without_main_grad_raises(call):
    with pytest.raises(ValueError, match=r"main_grad_ahead=True needs weight\.main_grad"):
        call(make_inputs(*SHAPE, torch.bfloat16))


@CALLS
def test_no_bool_raises(call):
    with pytest.raises(TypeError, match="main_grad_ahead must be a bool, got int"):
        call(make(torch.bfloat16), is_ahead=1)


@CALLS
def test_without_a_gradient_of_the_weight_it_does_nothing(call):
    inputs = make(torch.bfloat16)
    with torch.no_grad():
        call(inputs)
    assert not inputs.weight.main_grad.any()
    inputs.weight.requires_grad_(False)
    call(inputs).sum().backward()
    assert not inputs.weight.main_grad.any()
    assert inputs.hidden.grad.any()


@CALLS
def test_a_frozen_hidden(call):
    inputs = make(torch.bfloat16)
    frozen = inputs._replace(hidden=inputs.hidden.detach(), bias=None)
    call(frozen).sum().backward()
    assert inputs.weight.main_grad.any()
