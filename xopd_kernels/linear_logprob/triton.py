"""Launches of linear_logprob: scoring without logits, and the gradient by recomputed chunks."""

from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowGradients, RowStatistics
from xopd_kernels.chunk.scoring import run_scoring
from xopd_kernels.chunk.triton import ChunkPipeline, GradientSum
from xopd_kernels.linear_logprob.reference import has_upstream
from xopd_kernels.records import GradientSink, HeadGradient, LinearLogprob


def forward(call: Call, hidden: Tensor, target: Tensor, ignore_index: int) -> LinearLogprob:
    """Log-prob, lse and entropy of each row: hidden [N, D], target [N]. 1U, no logits."""
    needs_entropy = call.work.needs_entropy
    live = DeviceRows.of(target != ignore_index, call.step)
    pipeline = ChunkPipeline.of(call, target, live)
    rows = RowStatistics.zeros(pipeline.target_logit, needs_entropy)
    for part, live_count in live.parts():
        chunk = pipeline.gather(hidden, part)
        partial = run_scoring(pipeline, chunk, part, live_count, needs_entropy)
        pipeline.run_statistics(partial, part, live_count, rows)
    entropy = rows.lse.new_empty(0) if rows.entropy is None else live.spread(rows.entropy)
    return LinearLogprob(live.spread(rows.logprob), live.spread(rows.lse), entropy)


def backward(
    call: Call,
    upstream: LinearLogprob,
    entropy: Tensor,
    hidden: Tensor,
    target: Tensor,
    ignore_index: int,
    main_grad: Tensor | None = None,
) -> HeadGradient:
    """Gradients from recomputed logits: U + U for each of d_hidden, d_weight that is wanted.

    `entropy` comes from `forward`: with the logits to store, no registers are left for its
    moment. Rows whose upstream gradients are all 0 are left out before the first GEMM.
    """
    live = DeviceRows.of((target != ignore_index) & has_upstream(upstream), call.step)
    pipeline = ChunkPipeline.of(call, target, live)
    has_entropy = upstream.entropy.numel() > 0
    kept_entropy = live.take(entropy) if has_entropy else None
    d_entropy = live.take(upstream.entropy) if has_entropy else None
    up = RowGradients(live.take(upstream.logprob), live.take(upstream.lse), d_entropy)
    rows = RowStatistics.zeros(pipeline.target_logit, has_entropy=False)
    logits = pipeline.empty_logits()
    gradient = GradientSum.of(pipeline, hidden, GradientSink(main_grad))
    for part, live_count in live.parts():
        chunk, alive = pipeline.gather(hidden, part), Alive(None, live_count)
        partial = pipeline.run_logits(chunk, part, live_count, logits, has_moment=False)
        pipeline.run_statistics(partial, part, live_count, rows)
        statistics = rows._replace(entropy=kept_entropy)
        d_logit = pipeline.run_gradient(logits, part, alive, statistics, up)
        gradient.add(part, chunk, d_logit, alive)
    return gradient.result()
