"""A vocabulary sharded over two gloo ranks gives the values and gradients of the whole one."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xopd_kernels import Backend, BackendUnavailableError, linear_logprob, linear_policy_loss
from xopd_kernels.linear_logprob import reference
from xopd_kernels.testing import make_inputs, make_terms

WORLD_SIZE = 2
SPLIT = 20  # uneven: rank 0 holds classes [0, 20), rank 1 holds [20, 53)
SHAPE = (37, 53, 11)


def compute(inputs, terms, group):
    """Values and gradients of both operators."""
    rows = linear_logprob(
        *inputs[:2],
        inputs.target,
        bias=inputs.bias,
        needs_entropy=True,
        softcap=4.0,
        vocab_group=group,
    )
    loss = rows.logprob.sum() + 0.5 * rows.entropy.sum() - 0.1 * rows.lse.sum()
    policy = linear_policy_loss(
        *inputs[:2], inputs.target, bias=inputs.bias, vocab_group=group, **terms._asdict()
    )
    first = torch.autograd.grad(loss, inputs[:3])
    second = torch.autograd.grad(policy.loss, inputs[:3])
    return [*rows, *policy[:5]], [first, second]


def check_rank(rank: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    # One chunk for the narrow shard alone, two for the wide one: the ranks must still agree.
    reference.CHUNK_BYTES = SHAPE[0] * SPLIT * 8
    inputs = make_inputs(*SHAPE, torch.float64)
    terms = make_terms(linear_logprob(*inputs[:2], inputs.target).logprob)
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    leaves = (inputs.hidden, inputs.weight[mine], inputs.bias[mine])
    shard = inputs._replace(
        **{
            name: leaf.detach().clone().requires_grad_()
            for name, leaf in zip(inputs._fields, leaves, strict=False)
        }
    )
    group = dist.group.WORLD
    values, gradients = compute(shard, terms, group)
    whole_values, whole_gradients = compute(inputs, terms, None)
    torch.testing.assert_close(values, whole_values, rtol=1e-12, atol=1e-12)
    for part, whole in zip(gradients, whole_gradients, strict=True):
        expected = (whole[0], whole[1][mine], whole[2][mine])
        torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 53\)"):
        linear_logprob(*shard[:2], torch.full((37,), 53), vocab_group=group)
    with pytest.raises(BackendUnavailableError):
        linear_logprob(*shard[:2], inputs.target, vocab_group=group, backend=Backend.TRITON)
    dist.destroy_process_group()


def test_two_shards_equal_the_whole():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(check_rank, (port,), nprocs=WORLD_SIZE, start_method="spawn")
