"""compat.torch_nn against torch.nn.functional.linear_cross_entropy and the dense formula."""

import pytest
import torch
from torch.nn import functional

from xopd_kernels.compat import scalar_loss
from xopd_kernels.compat.torch_nn import linear_cross_entropy
from xopd_kernels.testing import Distribution, make_inputs

DTYPES = [torch.float32, torch.bfloat16]
REDUCTIONS = ["none", "mean", "sum"]
SHAPE = (37, 53, 16)


def dense(target, reduction, ignore_index=-100):
    def loss(hidden, weight, bias=None):
        logits = functional.linear(hidden, weight, bias)
        return functional.cross_entropy(
            logits, target, reduction=reduction, ignore_index=ignore_index
        )

    return loss


def face(function, target, **options):
    def loss(hidden, weight, bias=None):
        return function(hidden, weight, target, linear_bias=bias, **options)

    return loss


@pytest.fixture(params=["torch", "chunked", "formula"])
def peer(request):
    """torch's function on one of its two ways; None: the plain formula alone."""
    if request.param == "formula":
        return None
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy came with torch 2.13")
    if request.param == "torch":
        return functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16, chunking_method=None)

    def chunked(*args, **kwargs):
        return functional.linear_cross_entropy(*args, **kwargs, options=options)

    return chunked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("distribution", Distribution)
def test_equals_torch(check_face, peer, dtype, reduction, has_bias, distribution):
    inputs = make_inputs(*SHAPE, dtype, distribution)
    target = inputs.target
    assert (target == -100).any()
    leaves = inputs[: 2 + has_bias]
    check_face(
        face(linear_cross_entropy, target, reduction=reduction),
        None if peer is None else face(peer, target, reduction=reduction),
        dense(target, reduction),
        leaves,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row_without_batch_and_another_ignore_index(check_face, peer, reduction):
    inputs = make_inputs(*SHAPE, torch.float32)
    row, weight = inputs.hidden[0].detach().requires_grad_(), inputs.weight
    options = {"reduction": reduction, "ignore_index": 5}
    for target in (torch.tensor(3), torch.full((37,), 3).index_fill_(0, torch.arange(9), 5)):
        check_face(
            face(linear_cross_entropy, target, **options),
            None if peer is None else face(peer, target, **options),
            dense(target, **options),
            (row if target.ndim == 0 else inputs.hidden, weight),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_tokens_give_what_torch_gives(dtype, reduction):
    """The mean is NaN, its gradient 0: cross_entropy divides 0 by 0 and propagates nothing."""
    inputs = make_inputs(*SHAPE, dtype)
    target = torch.full((37,), -100)
    expected = dense(target, reduction)(*inputs[:2])
    actual = linear_cross_entropy(*inputs[:2], target, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    for gradient in torch.autograd.grad(actual.sum(), inputs[:2]):
        assert not gradient.any()


def test_autocast_gives_the_dtype_of_torch():
    inputs = make_inputs(*SHAPE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_cross_entropy(*inputs[:2], inputs.target)
        expected = dense(inputs.target, "mean")(*inputs[:2])
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"weight": torch.ones(53)}, "weight"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"target": torch.ones(37, 53)}, "target"),
        ({"linear_weight": torch.ones(53, 2, 16)}, "linear_weight"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, name):
    inputs = make_inputs(*SHAPE, torch.float32)
    arguments = {"input": inputs.hidden, "linear_weight": inputs.weight, "target": inputs.target}
    with pytest.raises(NotImplementedError, match=rf"^{name} = .* is not supported; "):
        linear_cross_entropy(**(arguments | options))


def test_options_change_nothing_but_fp64_sums_are_refused():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("LinearCrossEntropyOptions came with torch 2.13")
    inputs = make_inputs(*SHAPE, torch.float32)
    options = torch.nn.LinearCrossEntropyOptions()
    plain = linear_cross_entropy(*inputs[:2], inputs.target)
    assert torch.equal(linear_cross_entropy(*inputs[:2], inputs.target, options=options), plain)
    options = torch.nn.LinearCrossEntropyOptions(acc_dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"^options\.acc_dtype = torch\.float64"):
        linear_cross_entropy(*inputs[:2], inputs.target, options=options)
    wide = make_inputs(*SHAPE, torch.float64)
    linear_cross_entropy(*wide[:2], wide.target, options=options)


def test_wrong_values_name_the_argument():
    inputs = make_inputs(*SHAPE, torch.float32)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(*inputs[:2], inputs.target, reduction="average")
    with pytest.raises(ValueError, match="input must be"):
        linear_cross_entropy(inputs.hidden[None], inputs.weight, inputs.target[None])


@pytest.mark.parametrize(
    ("reduction", "operator"),
    [("mean", "linear_policy_loss"), ("sum", "linear_policy_loss"), ("none", "linear_logprob")],
)
def test_scalar_reductions_run_the_operator_of_three_products(monkeypatch, reduction, operator):
    """They never recompute the logits: one call of linear_policy_loss and no other."""
    called = []
    for name in ("linear_policy_loss", "linear_logprob"):
        function = getattr(scalar_loss, name)

        def spy(*args, name=name, function=function, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(scalar_loss, name, spy)
    inputs = make_inputs(*SHAPE, torch.float32)
    linear_cross_entropy(*inputs[:2], inputs.target, reduction=reduction)
    assert called == [operator]
