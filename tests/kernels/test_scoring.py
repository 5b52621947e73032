"""The scoring variants in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

import os

import pytest
import torch

from xopd_kernels.backend import Backend
from xopd_kernels.chunk import device_rows
from xopd_kernels.chunk.call import Call
from xopd_kernels.records import Head, Wanted
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
config = pytest.importorskip("xopd_kernels.chunk.config")

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs TRITON_INTERPRET=1, set before triton is imported: a process of its own",
    ),
    # Rows beyond the live ones are computed and never stored.
    pytest.mark.filterwarnings(
        "ignore:(invalid value|divide by zero|overflow|All-NaN):RuntimeWarning"
    ),
    # Triton 3.6 under numpy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Small, so that 300 classes are several slabs and 40 rows two groups of row blocks.
TILE = config.TileConfig(16, 64, 16, warps=4, stages=2, group=2, slab_tiles=2)
PROGRAMS = 3  # each walks several items
L2_SHAPE = (32, 128)
ALL = {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8}
# (N, V, D), transform, with bias, rows of a chunk (None: all). D is a multiple of 8, as TMA needs,
# and not of the inner block.
CASES = [
    ((1, 1, 8), {}, False, None),
    ((40, 300, 40), {}, False, 24),
    ((40, 300, 40), ALL, True, None),
    ((33, 129, 24), {"temperature": 0.5}, True, 20),
]


def pipeline_of(hidden, head, target, chunk=None):
    nothing = Wanted(hidden=False, weight=False, bias=False)
    work = Workload.of(Operator.LOGPROB, hidden, head.weight, nothing)
    call = Call.of(head, work, Backend.TRITON, None)
    live = device_rows.DeviceRows.of(target != -100, chunk or max(1, len(target)))
    return chunked.ChunkPipeline.of(call, target, live)


@torch.no_grad()
def run(variant, hidden, head, target, chunk=None, has_moment=True):
    """(logprob, lse, entropy) [N]; `chunk` rows at a time."""
    pipeline = pipeline_of(hidden, head, target, chunk)
    rows = device_rows.RowStatistics.zeros(pipeline.target_logit, has_moment)
    for part, count in pipeline.live.parts():
        args = (pipeline, pipeline.gather(hidden.detach(), part), part, count, has_moment)
        pipeline.run_statistics(run_chunk(variant, *args), part, count, rows)
    fields = (rows.logprob, rows.lse, *([rows.entropy] if has_moment else []))
    return [pipeline.live.spread(x) for x in fields]


def run_chunk(variant, *args):
    if variant is config.Scoring.PERSISTENT:
        return scoring.run_persistent(*args, TILE, PROGRAMS)
    if variant is config.Scoring.L2_TILE:
        return scoring.run_l2_tile(*args, L2_SHAPE)
    return scoring.run_variant(variant, *args)


@pytest.fixture(params=config.Scoring, ids=lambda v: v.value)
def variant(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "transform", "has_bias", "chunk"), CASES)
def test_error_budget(variant, dtype, shape, transform, has_bias, chunk):
    inputs = make_inputs(*shape, dtype, Distribution.PEAKED if has_bias else Distribution.RANDOM)
    inputs = inputs._replace(target=inputs.target.clone())
    inputs.target[0] = shape[1] - 1  # the last class, and one live row at least
    head = make_head(inputs, has_bias, **transform)
    actual = run(variant, inputs.hidden, head, inputs.target, chunk)
    dense = (
        dense_logprob(x.hidden, make_head(x, has_bias, **transform), x.target)
        for x in (inputs, inputs.to(torch.float64))
    )
    for name, *values in zip(("logprob", "lse", "entropy"), actual, *dense, strict=True):
        assert_within_budget(name, *values)


def test_repeats_bitwise_and_skips_the_moment(variant):
    inputs = make_inputs(20, 300, 24, torch.bfloat16)
    head = make_head(inputs, True)
    first = run(variant, inputs.hidden, head, inputs.target)
    assert all(map(torch.equal, first, run(variant, inputs.hidden, head, inputs.target)))
    without = run(variant, inputs.hidden, head, inputs.target, has_moment=False)
    assert all(map(torch.equal, first[:2], without))


def test_a_row_depends_on_no_other_row(variant):
    """Alone in its batch, among others, or beside NaN: the same bits (L2_TILE: to rounding)."""
    inputs = make_inputs(40, 300, 24, torch.float32)
    head, target = make_head(inputs), inputs.target.clone()
    target[:3] = torch.tensor([7, 299, -100])
    together = run(variant, inputs.hidden, head, target)
    hidden = inputs.hidden.detach().clone()
    hidden[2:] = torch.nan
    hidden[1] = inputs.hidden[1]
    target[3:] = -100
    few = run(variant, hidden, head, target)
    alone = run(variant, hidden[1:2], head, target[1:2])
    for one, two, three in zip(together, few, alone, strict=True):
        assert (two[2:] == 0).all()
        if variant is config.Scoring.L2_TILE:  # torch.mm may take another kernel for other sizes
            torch.testing.assert_close(one[:2], two[:2])
            torch.testing.assert_close(one[1:2], three)
        else:
            assert torch.equal(one[:2], two[:2])
            assert torch.equal(one[1:2], three)


def test_dead_rows_of_nan_reach_no_later_item(variant):
    """One program walks the block with dead rows, then a block of live ones."""
    inputs = make_inputs(40, 300, 24, torch.float32)
    head, target = make_head(inputs), torch.arange(40)
    expected = run(variant, inputs.hidden[:20], head, target[:20])
    hidden = inputs.hidden.detach().clone()
    hidden[20:] = torch.nan
    target[20:] = -100
    for one, other in zip(run(variant, hidden, head, target), expected, strict=True):
        torch.testing.assert_close(one[:20], other)


def test_logits_of_minus_inf(variant):
    """Whole slabs of -inf, and a target there."""
    inputs = make_inputs(5, 700, 16, torch.float32)
    bias = torch.zeros(700)
    bias[:400] = -torch.inf
    target = torch.tensor([0, 400, 500, 699, -100])
    head = Head(inputs.weight, bias, 1.0, None, 1.0, "")
    actual = run(variant, inputs.hidden, head, target)
    expected = dense_logprob(inputs.hidden, head, target)
    assert actual[0][0] == -torch.inf
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_live_rows(variant, rows):
    inputs = make_inputs(rows, 9, 8, torch.float32)
    out = run(variant, inputs.hidden, make_head(inputs), torch.full((rows,), -100))
    assert all((x == 0).all() and len(x) == rows for x in out)


def test_strided_weight(variant):
    inputs = make_inputs(20, 90, 24, torch.float32)
    wide = torch.randn(90, 40)
    wide[:, :24] = inputs.weight.detach()
    expected = run(variant, inputs.hidden, make_head(inputs), inputs.target)
    head = Head(wide[:, :24], None, 1.0, None, 1.0, "")
    for one, other in zip(run(variant, inputs.hidden, head, inputs.target), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_persistent_refuses_what_tma_cannot_read():
    inputs = make_inputs(4, 9, 7, torch.bfloat16)
    with pytest.raises(ValueError, match=r"multiple of 16 bytes .* got strides \(7, 1\)"):
        run(config.Scoring.PERSISTENT, inputs.hidden, make_head(inputs), inputs.target)


def test_alignment():
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert scoring.is_aligned(x, x[:, 8:])
    assert not scoring.is_aligned(x[:, 1:])  # address
    assert not scoring.is_aligned(torch.zeros(8, 63, dtype=torch.bfloat16))  # row stride
    assert not scoring.is_aligned(x, x.t())  # unit stride


def test_run_scoring_takes_the_variant_of_the_table(monkeypatch):
    seen = []
    monkeypatch.setattr(scoring, "run_variant", lambda variant, *args: seen.append(variant))
    for dim in (16, 20):
        inputs = make_inputs(4, 9, dim, torch.bfloat16)
        pipeline = pipeline_of(inputs.hidden, make_head(inputs), inputs.target)
        for capability in (80, 90):
            args = (inputs.hidden, slice(0, 4), pipeline.live.counts[0], True)
            scoring.run_scoring(pipeline._replace(capability=capability), *args)
    tiled, persistent = config.Scoring.TILED, config.Scoring.PERSISTENT
    assert seen == [tiled, persistent, tiled, tiled]
