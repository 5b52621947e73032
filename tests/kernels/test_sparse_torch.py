"""The policy loss with a sparse gradient: draws by seed, autograd, torch.compile, keywords."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.sparse_cases import (
    BACKENDS,
    MODES,
    SPARSE,
    Kind,
    Problem,
    make_case,
    policy,
)
from xopd_kernels import Backend, linear_policy_loss
from xopd_kernels.linear_policy_loss.sparse_op import linear_policy_loss_sparse_op
from xopd_kernels.validation import check_sparsity

ON_ALL = pytest.mark.parametrize("backend", BACKENDS)
IN_MODES = pytest.mark.parametrize("mode", MODES, ids=str)


def unbiased(problem, seed, backend, dtype=torch.float32):
    call = {"gradient": "unbiased", "max_gradient_error": 1.0, "backend": backend}
    return policy(problem, dtype, gradient_seed=seed, **call)[1]


@ON_ALL
def test_another_seed_draws_other_classes(backend):
    problem = Problem.of(Kind.ZIPF, 30, 300)
    first, again, other = (unbiased(problem, seed, backend) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@ON_ALL
def test_the_mean_over_the_seeds_is_the_exact_gradient(backend):
    """The squared distance of the mean from the exact gradient is that of a mean of S draws.

    Its expectation is the variance of one draw / S, which the draws tell; with 30 rows drawn
    independently it keeps within a factor of 2 of that (a Chebyshev bound of 5 standard errors).
    What is missing without the drawn classes is many times as far away.
    """
    problem = Problem.of(Kind.ZIPF, 30, 80)
    exact, draws = problem.gradient(), 400
    every = torch.stack([unbiased(problem, seed, backend) for seed in range(draws)])
    variance = float(every.var(0).sum())
    distance = float((every.mean(0) - exact).square().sum())
    assert distance <= 2 * variance / draws
    call = {"gradient": "sparse", "max_gradient_error": 1.0, "backend": backend}
    biased = policy(problem, torch.float32, **call)[1]
    assert float((biased - exact).square().sum()) >= 10 * variance / draws


def test_upstream_gradient_scales():
    inputs, advantage = make_case(torch.float32)
    out = linear_policy_loss(*inputs[:2], inputs.target, advantage=advantage, **SPARSE)
    one = torch.autograd.grad(out.loss, inputs[:2], retain_graph=True)
    two = torch.autograd.grad(out.loss * -2.5, inputs[:2])
    for small, large in zip(one, two, strict=True):
        torch.testing.assert_close(large, small * -2.5)


def test_opcheck():
    x, advantage = make_case(torch.float32, shape=(6, 90, 5))
    advantage = -advantage.abs()  # a loss > 0: opcheck's upstream gradient is its sign
    for mode in ("sparse", "unbiased"):
        scalars = (0.2, 0.2, 10.0, 0.9, 5.0, 1.0, "", -100, None, "reference", mode, 0.1, 3)
        args = (x.hidden, x.weight, x.bias, x.target, None, advantage, None, None, None)
        torch.library.opcheck(linear_policy_loss_sparse_op, (*args, *scalars, True, True, True))


@IN_MODES
def test_compiles_as_one_graph(mode):
    inputs, advantage = make_case(torch.float32)
    call = {"advantage": advantage, "max_gradient_error": 0.05, **mode}

    def loss(hidden, weight, target):
        out = linear_policy_loss(hidden * 2, weight, target, **call)
        return out.loss, out.gradient_error

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    args = (*inputs[:2], inputs.target)
    expected = torch.autograd.grad(loss(*args)[0], inputs[:2])
    actual = torch.autograd.grad(compiled(*args)[0], inputs[:2])
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_activation_checkpointing():
    inputs, advantage = make_case(torch.float32)

    def loss(hidden):
        call = {"advantage": advantage, **SPARSE}
        return linear_policy_loss(hidden, inputs.weight, inputs.target, **call).loss

    (expected,) = torch.autograd.grad(loss(inputs.hidden), inputs.hidden)
    rerun = checkpoint(loss, inputs.hidden, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(rerun, inputs.hidden)[0], expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "dense"}, ValueError, 'gradient must be "exact" or "sparse" or "unbiased"'),
        ({"gradient": "sparse"}, ValueError, "max_gradient_error must be given"),
        ({"max_gradient_error": 0.1}, ValueError, "max_gradient_error must be None"),
        ({**SPARSE, "max_gradient_error": -1.0}, ValueError, "max_gradient_error must be finite"),
        ({**SPARSE, "max_gradient_error": math.nan}, ValueError, "must be finite and >= 0"),
        ({**SPARSE, "max_gradient_error": math.inf}, ValueError, "must be finite and >= 0"),
        ({**SPARSE, "max_gradient_error": "a lot"}, TypeError, "max_gradient_error must be a num"),
        ({**SPARSE, "gradient_seed": 1}, ValueError, "gradient_seed must be left out with"),
        ({"gradient_seed": 1}, ValueError, "gradient_seed must be left out with"),
        ({**SPARSE, "gradient": "unbiased"}, ValueError, "gradient_seed must be an int with"),
        ({**SPARSE, "gradient": "unbiased", "gradient_seed": 1.5}, TypeError, "must be an int"),
        ({**SPARSE, "gradient": "unbiased", "gradient_seed": 2**63}, ValueError, "fit 64 bits"),
    ],
    ids=str,
)
def test_wrong_keywords(options, error, message):
    inputs, advantage = make_case(torch.float32)
    with pytest.raises(error, match=message):
        linear_policy_loss(*inputs[:2], inputs.target, advantage=advantage, **options)


def test_a_sharded_vocabulary_is_refused():
    with pytest.raises(ValueError, match="takes a whole weight, got one that is sharded"):
        check_sparsity("sparse", 0.1, vocab_group="0")
    assert check_sparsity("exact", None, vocab_group="0") is None


def test_double_backward_raises():
    inputs, advantage = make_case(torch.float32)
    out = linear_policy_loss(*inputs[:2], inputs.target, advantage=advantage, **SPARSE)
    (grad,) = torch.autograd.grad(out.loss, inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not differentiate twice"):
        grad.sum().backward()


def test_leading_dimensions_come_back():
    inputs, advantage = make_case(torch.float32)
    rows = slice(0, 60)
    call = {"advantage": advantage[rows], **SPARSE}
    flat = linear_policy_loss(inputs.hidden[rows], inputs.weight, inputs.target[rows], **call)
    call["advantage"] = advantage[rows].view(3, 20)
    hidden, target = inputs.hidden[rows].view(3, 20, -1), inputs.target[rows].view(3, 20)
    shaped = linear_policy_loss(hidden, inputs.weight, target, **call)
    assert shaped.gradient_error.shape == ()
    for one, other in zip(shaped, flat, strict=True):
        assert torch.equal(one, other.view(3, 20) if other.ndim else other)


def test_a_copy_of_the_call_under_autocast():
    inputs, advantage = make_case(torch.float32)
    call = {"advantage": advantage, **SPARSE}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_policy_loss(*inputs[:2], inputs.target, **call)
    low = inputs.to(torch.bfloat16)
    expected = linear_policy_loss(*low[:2], low.target, **call)
    assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))


@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.REFERENCE])
def test_autocast_changes_no_gradient_of_low_precision_tensors(backend):
    """What the operator multiplies by itself, as for the tail of d_hidden, is cast once only."""
    inputs, advantage = make_case(torch.bfloat16)
    call = {"advantage": advantage, **SPARSE, "backend": backend}
    found = []
    for is_on in (False, True):
        hidden = inputs.hidden.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            out = linear_policy_loss(hidden, inputs.weight, inputs.target, **call)
        out.loss.backward()
        found.append(hidden.grad)
    assert (out.dropped_mass > 0).any()
    assert torch.equal(*found)
