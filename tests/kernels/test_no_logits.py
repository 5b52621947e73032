"""No tensor of N * V elements is ever allocated, and the memory beyond the gradients is bounded.

Measured with the profiler, which sees every allocation, also those inside operators.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from xopd_kernels import linear_logprob, linear_policy_loss
from xopd_kernels.linear_logprob import reference

ROWS, VOCAB_SIZE, DIM = 2048, 30_000, 8
EXTRA_BYTES = 64 * 2**20  # the promise for the CPU: memory beyond inputs and gradients


def run_logprob(hidden, weight, target):
    linear_logprob(hidden, weight, target).logprob.sum().backward()


def run_logprob_and_entropy(hidden, weight, target):
    out = linear_logprob(hidden, weight, target, needs_entropy=True)
    (out.logprob.sum() + out.entropy.sum()).backward()


def run_policy_loss(hidden, weight, target):
    teacher = torch.zeros(target.shape)
    linear_policy_loss(hidden, weight, target, teacher_logprob=teacher, softcap=8.0).loss.backward()


def allocations(call) -> list[int]:
    """Bytes of every allocation (> 0) and release (< 0) of the call, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # The public list hides allocations that belong to an operator; this one has them all.
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def peak(sizes: list[int]) -> int:
    level = highest = 0
    for size in sizes:
        level += size
        highest = max(highest, level)
    return highest


def test_the_measurement_sees_the_dense_version():
    sizes = allocations(lambda: (torch.randn(64, 8) @ torch.randn(8, 1000)).softmax(-1))
    assert max(sizes) == 64 * 1000 * 4


@pytest.mark.parametrize("run", [run_logprob, run_logprob_and_entropy, run_policy_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits(run, dtype):
    hidden = torch.randn(ROWS, DIM, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, DIM, dtype=dtype, requires_grad=True)
    target = torch.randint(VOCAB_SIZE, (ROWS,))
    sizes = allocations(lambda: run(hidden, weight, target))
    assert max(sizes) <= reference.CHUNK_BYTES < ROWS * VOCAB_SIZE * dtype.itemsize
    # The fp32 accumulator and up to three copies of the small gradients exist at once.
    gradient_bytes = 4 * (hidden.numel() + weight.numel()) * 4
    assert peak(sizes) <= EXTRA_BYTES + gradient_bytes
