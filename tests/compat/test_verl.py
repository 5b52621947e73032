"""compat.verl against verl's FusedLinearForPPO and the dense formula."""

import pytest
import torch

from xopd_kernels.compat.verl import FusedLinearForPPO, linear_cross_entropy
from xopd_kernels.testing import make_inputs

DTYPES = [torch.float32, torch.bfloat16]
SHAPE = (24, 53, 16)


def make_case(dtype, shape=(24,)):
    """Leaves hidden [*shape, D], weight [V, D], and valid labels: verl has no ignored ones."""
    inputs = make_inputs(*SHAPE, dtype)
    hidden = inputs.hidden.detach().view(*shape, SHAPE[2]).requires_grad_()
    return (hidden, inputs.weight), inputs.target.clamp(min=0).view(shape)


def dense(labels, temperature):
    def rows(hidden, weight):
        logits = hidden @ weight.t() / temperature
        is_wide = logits.dtype == torch.float64
        log_p = (logits if is_wide else logits.float()).log_softmax(-1)
        logprob = log_p.gather(-1, labels[..., None]).squeeze(-1)
        return logprob, -(log_p.exp() * log_p).sum(-1)

    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24,), (4, 6)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("has_peer", [True, False], ids=["verl", "formula"])
def test_fused_linear_for_ppo(verl_module, check_face, dtype, shape, temperature, has_peer):
    leaves, labels = make_case(dtype, shape)
    peer = None
    if has_peer:
        module = verl_module("utils/experimental/torch_functional.py")
        peer = module.FusedLinearForPPO(chunk_size=7)

    def call(module):
        return lambda hidden, weight: module(hidden, weight, labels, temperature)

    check_face(
        call(FusedLinearForPPO(chunk_size=7)),
        None if peer is None else call(peer),
        dense(labels, temperature),
        leaves,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "MEAN"])
def test_linear_cross_entropy(check_face, dtype, reduction):
    """Against the formula alone: verl's kernel runs on CUDA devices only."""
    leaves, labels = make_case(dtype, (4, 6))

    def reduced(hidden, weight):
        logprob, entropy = dense(labels, 0.7)(hidden, weight)
        name = reduction.lower()
        logprob = logprob.flatten() if name == "none" else getattr(logprob, name)()
        return logprob, entropy.flatten()

    check_face(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, 0.7, reduction),
        None,
        reduced,
        leaves,
    )


def test_an_ignored_label_gives_zero_and_no_gradient():
    leaves, labels = make_case(torch.float32)
    labels = labels.index_fill(0, torch.arange(5), -100)
    logprob, entropy = linear_cross_entropy(*leaves, labels)
    assert not logprob[:5].any()
    assert not entropy[:5].any()
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), leaves[:1])
    assert not gradient[:5].any()
    assert gradient[5:].all(dim=0).any()


def test_the_dtype_of_the_entropy_is_that_of_the_backend():
    leaves, labels = make_case(torch.bfloat16)
    for name, dtype in (("torch", torch.bfloat16), ("liger", torch.float32)):
        logprob, entropy = FusedLinearForPPO(impl_backend=name)(*leaves, labels.int())
        assert (logprob.dtype, entropy.dtype) == (torch.float32, dtype)


def test_what_is_not_supported_is_refused_by_name():
    leaves, labels = make_case(torch.float32)
    with pytest.raises(NotImplementedError, match=r"^dist_process_group = .*vocab_group"):
        linear_cross_entropy(*leaves, labels, dist_process_group=object())
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(*leaves, labels, 1.0, "average")
    with pytest.raises(ValueError, match="impl_backend must be"):
        FusedLinearForPPO(impl_backend="triton")
