"""What a program sets as torch's default dtype or device is no business of the operators."""

from contextlib import contextmanager

import pytest
import torch

from xopd_kernels import (
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    reverse_kl_advantage,
)

N, V, D, K = 6, 40, 8, 5


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = [draw(N, D).requires_grad_(), draw(V, D).requires_grad_(), draw(N, D), draw(V, D)]
    target = torch.tensor([3, -100, 7, 0, 39, 7])
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    return *heads, target, ids, torch.full((N, K), -2.0)


def logprob(hidden, weight, _, __, target, *___):
    out = linear_logprob(hidden, weight, target, needs_entropy=True)
    return out.logprob.sum() + out.entropy.sum()


def policy_loss(hidden, weight, _, __, target, *___):
    return linear_policy_loss(
        hidden, weight, target, teacher_logprob=target.new_zeros(N, dtype=torch.float32)
    ).loss


def divergence(hidden, weight, teacher_hidden, teacher_weight, *_):
    return linear_divergence(hidden, weight, teacher_hidden, teacher_weight).divergence.sum()


def topk_divergence(hidden, weight, _, __, ___, ids, teacher_logprob):
    return linear_topk_divergence(hidden, weight, ids, teacher_logprob).divergence.sum()


def advantage(hidden, weight, teacher_hidden, teacher_weight, target, *_):
    values = reverse_kl_advantage(hidden, weight, teacher_hidden, teacher_weight, target)
    return values.advantage.sum()


SPARSE = {"gradient": "sparse", "max_gradient_error": 0.5}


def sparse_logprob(hidden, weight, _, __, target, *___):
    return linear_logprob(hidden, weight, target, **SPARSE).logprob.sum()


def sparse_policy_loss(hidden, weight, _, __, target, *___):
    teacher = target.new_zeros(N, dtype=torch.float32)
    return linear_policy_loss(hidden, weight, target, teacher_logprob=teacher, **SPARSE).loss


def unbiased_policy_loss(hidden, weight, _, __, target, *___):
    options = SPARSE | {"gradient": "unbiased", "gradient_seed": 1}
    advantage = target.new_ones(N, dtype=torch.float32)
    return linear_policy_loss(
        hidden, weight, target, advantage=advantage, softcap=9.0, **options
    ).loss


def sparse_topk_divergence(hidden, weight, _, __, ___, ids, teacher_logprob):
    out = linear_topk_divergence(hidden, weight, ids, teacher_logprob, **SPARSE)
    return out.divergence.sum()


CALLS = [
    *(logprob, policy_loss, divergence, topk_divergence, advantage),
    *(sparse_logprob, sparse_policy_loss, unbiased_policy_loss, sparse_topk_divergence),
]


def results(call, given):
    value = call(*given)
    gradients = torch.autograd.grad(value, given[:2]) if value.requires_grad else ()
    return value.detach(), *gradients


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "fp64": lambda: default_dtype(torch.float64),
    "bf16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),  # what is made there by mistake has no values
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("default", DEFAULTS)
def test_the_defaults_of_torch_change_nothing(default, call, dtype):
    given = inputs(dtype)
    expected = results(call, given)
    with DEFAULTS[default]():
        found = results(call, given)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)
