"""memory_plan holds what a wide head or many ids need beside the logits, in small budgets too."""

import pytest
import torch

from tests.kernels.test_memory_plan import BACKENDS, MIB, Case, measure, peak
from xopd_kernels import Backend, Operator, memory_plan
from xopd_kernels.needs import Needs


@BACKENDS
@pytest.mark.parametrize("top_k", [512, 4000])
@pytest.mark.parametrize("budget", [None, 4 * MIB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_ids(backend, top_k, budget, dtype):
    """What is made of the logits of the ids is fp64, and counts as much as a row of logits."""
    case = Case(Operator.TOPK_DIVERGENCE)
    work = case.workload(256, 4000, 64, dtype)._replace(top_k=top_k)
    sizes = measure(case, work, backend, live=256, budget=budget)
    assert peak(sizes) <= memory_plan(work, backend, budget).peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_are_filled_up(dtype, rows):
    """A few rows of a wide head, in the least budget of REFERENCE."""
    case = Case(Operator.LOGPROB)
    work = case.workload(rows, 600, 2048, dtype)
    least = Needs.of(work, Backend.REFERENCE, None).smallest(1)
    for budget in (least, None):
        sizes = measure(case, work, Backend.REFERENCE, live=rows, budget=budget)
        assert peak(sizes) <= memory_plan(work, Backend.REFERENCE, budget).peak_bytes
