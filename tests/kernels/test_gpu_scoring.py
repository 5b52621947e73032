"""The scoring variants on a CUDA device: error budget, repeats, other rows, no synchronisation."""

import pytest
import torch

from xopd_kernels.backend import Backend
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.config import Scoring, select_scoring
from xopd_kernels.chunk.device_rows import DeviceRows, RowStatistics
from xopd_kernels.records import Wanted
from xopd_kernels.target import cuda_capability
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logprob,
    make_head,
    make_inputs,
)
from xopd_kernels.workload import Operator, Workload

pytest.importorskip("triton", reason="triton is not installed")
scoring = pytest.importorskip("xopd_kernels.chunk.scoring")
chunked = pytest.importorskip("xopd_kernels.chunk.triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = (1031, 32_003, 520)  # ragged; D is a multiple of 8, as TMA needs
ALL = {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8}


@pytest.fixture(params=Scoring, ids=lambda v: v.value)
def variant(request):
    if request.param is Scoring.PERSISTENT and cuda_capability(torch.device("cuda")) < 90:
        pytest.skip("TMA needs compute capability 9.0")
    return request.param


@torch.no_grad()
def run(variant, hidden, head, target, chunk=None, has_moment=True):
    """(logprob, lse, entropy) [N]; `chunk` rows at a time."""
    nothing = Wanted(hidden=False, weight=False, bias=False)
    work = Workload.of(Operator.LOGPROB, hidden, head.weight, nothing)
    call = Call.of(head, work, Backend.TRITON, None)
    live = DeviceRows.of(target != -100, chunk or max(1, len(target)))
    pipeline = chunked.ChunkPipeline.of(call, target, live)
    rows = RowStatistics.zeros(pipeline.target_logit, has_moment)
    for part, count in live.parts():
        hidden_part = pipeline.gather(hidden.detach(), part)
        args = (pipeline, hidden_part, part, count, has_moment)
        pipeline.run_statistics(scoring.run_variant(variant, *args), part, count, rows)
    fields = (rows.logprob, rows.lse, *([rows.entropy] if has_moment else []))
    return [live.spread(x) for x in fields]


def skip_without_tile(variant, dtype):
    if variant is Scoring.PERSISTENT and dtype == torch.float32:
        pytest.skip("the table has no persistent tile for fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize(("transform", "chunk"), [({}, None), (ALL, 384)])
def test_error_budget(variant, dtype, distribution, transform, chunk):
    skip_without_tile(variant, dtype)
    inputs = make_inputs(*SHAPE, dtype, distribution, device="cuda")
    has_bias = bool(transform)
    head = make_head(inputs, has_bias, **transform)
    actual = run(variant, inputs.hidden, head, inputs.target, chunk)
    dense = (
        dense_logprob(x.hidden, make_head(x, has_bias, **transform), x.target)
        for x in (inputs, inputs.to(torch.float64))
    )
    for name, *values in zip(("logprob", "lse", "entropy"), actual, *dense, strict=True):
        assert_within_budget(name, *values)


def test_repeats_bitwise(variant):
    inputs = make_inputs(*SHAPE, torch.bfloat16, device="cuda")
    head = make_head(inputs, True)
    expected = run(variant, inputs.hidden, head, inputs.target)
    for _ in range(20):
        assert all(map(torch.equal, run(variant, inputs.hidden, head, inputs.target), expected))


def test_a_row_depends_on_no_other_row(variant):
    """The first 100 rows alone, and beside dead rows of NaN."""
    inputs = make_inputs(*SHAPE, torch.bfloat16, device="cuda")
    head, target = make_head(inputs), inputs.target.clone()
    together = run(variant, inputs.hidden, head, target)
    few = run(variant, inputs.hidden[:100], head, target[:100])
    hidden = inputs.hidden.detach().clone()
    hidden[100:] = torch.nan
    target[100:] = -100
    beside_nan = run(variant, hidden, head, target)
    for one, two, three in zip(together, few, beside_nan, strict=True):
        assert (three[100:] == 0).all()
        if variant is Scoring.L2_TILE:  # cuBLAS may take another kernel for other sizes
            torch.testing.assert_close(one[:100], two, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one[:100], two)
        assert torch.equal(one[:100], three[:100])


def test_no_host_synchronisation(variant):
    inputs = make_inputs(*SHAPE, torch.bfloat16, device="cuda")
    head = make_head(inputs)
    run(variant, inputs.hidden, head, inputs.target)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(variant, inputs.hidden, head, inputs.target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_logits_in_device_memory(variant):
    rows, vocab_size, dim = 4096, 151_936, 256
    inputs = make_inputs(rows, vocab_size, dim, torch.bfloat16, device="cuda")
    head = make_head(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(variant, inputs.hidden, head, inputs.target, has_moment=False)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < rows * vocab_size * 4 // 16


def test_the_table_is_followed():
    capability = cuda_capability(torch.device("cuda"))
    expected = Scoring.PERSISTENT if capability >= 90 else Scoring.TILED
    assert select_scoring(torch.bfloat16, capability, is_aligned=True) is expected
