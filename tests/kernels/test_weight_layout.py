"""Weights whose rows lie in memory in unusual ways."""

import pytest
import torch

from xopd_kernels import linear_policy_loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_of_any_row_stride(dtype):
    """A part of a wider one, with an odd stride; one row for all classes."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 6, generator=rng).to(dtype)
    wide = torch.randn(131, 7, generator=rng).to(dtype)
    for weight in (wide[:, :6], wide[:1, :6].expand(131, 6), wide[:, 1:]):
        found = []
        for head in (weight, weight.contiguous()):
            leaf = hidden.clone().requires_grad_()
            target = torch.arange(5)
            linear_policy_loss(leaf, head, target, advantage=torch.ones(5)).loss.backward()
            found.append(leaf.grad)
        assert torch.equal(*found)
