"""Inputs that are views: every operator gives what it gives for contiguous copies."""

import pytest
import torch

from xopd_kernels import (
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
)

N, V, D, K = 12, 40, 8, 5


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def strided(values):
    """The same values as every second one of a wider tensor, or column-major."""
    if values.ndim == 1:
        return values.repeat_interleave(2)[::2]
    return values.t().contiguous().t()


def logprob(view):
    bias, target = view(draw(V)), view(torch.arange(N))
    out = linear_logprob(draw(N, D), draw(V, D), target, bias=bias, needs_entropy=True)
    return torch.stack([out.logprob, out.lse, out.entropy])


def policy(view):
    rows = [view(draw(N)) for _ in range(3)]
    names = ("advantage", "old_logprob", "token_weight")
    given = dict(zip(names, rows, strict=True))
    head = (draw(N, D), draw(V, D), view(torch.arange(N)))
    return linear_policy_loss(*head, bias=view(draw(V)), **given).loss


def divergence(view):
    heads = (draw(N, D), draw(V, D), view(draw(N, 6)), view(draw(V, 6)))
    biases = {"bias": view(draw(V)), "teacher_bias": view(draw(V) / 2)}
    return linear_divergence(*heads, **biases, token_weight=view(draw(N))).divergence


def topk(view):
    ids = (torch.arange(N)[:, None] * 3 + torch.arange(K) * 7) % V
    heads = (draw(N, D), draw(V, D), view(ids), view(draw(N, K).log_softmax(1) - 0.5))
    options = {"bias": view(draw(V)), "token_weight": view(draw(N))}
    return linear_topk_divergence(*heads, **options).divergence


@pytest.mark.parametrize("call", [logprob, policy, divergence, topk])
def test_views_give_what_copies_give(call):
    assert torch.equal(call(strided), call(torch.clone))


@pytest.mark.parametrize("call", [divergence, topk])
def test_an_expanded_bias_and_weight(call):
    def expanded(values):
        return values[:1].expand(values.shape) if values.is_floating_point() else values

    assert torch.equal(call(expanded), call(lambda x: expanded(x).clone()))


def test_a_strided_upstream_gradient():
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
    rows = linear_divergence(hidden, weight, draw(N, 6), draw(V, 6)).divergence
    upstream = draw(N, 2)
    (torch.stack([rows, torch.zeros(N)], 1) * upstream).sum().backward()
    expected = torch.autograd.grad(
        linear_divergence(
            hidden, weight, draw(N, 6), draw(V, 6), token_weight=upstream[:, 0].contiguous()
        ).divergence.sum(),
        (hidden, weight),
    )
    torch.testing.assert_close((hidden.grad, weight.grad), expected)
