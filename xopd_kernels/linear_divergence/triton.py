"""The one-pass driver of linear_divergence: 3U of the student and 1U of the teacher.

Per chunk: logits and statistics of both models -> divergence and, over the student's logits in
place, the gradient -> d_hidden, d_weight. Kernels and row order are those of the other operators.
"""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.config import GRADIENT_BLOCK_V, GRADIENT_WARPS
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowStatistics
from xopd_kernels.chunk.triton import ChunkPipeline, GradientSum, narrow_view
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, Teacher
from xopd_kernels.shard import VocabShard
from xopd_kernels.target import device_guard
from xopd_kernels.tile.divergence import divergence_kernel, kind_of


def forward(
    call: Call,
    hidden: Tensor,
    teacher: Teacher,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
) -> tuple[LinearDivergence, HeadGradient]:
    """The divergence of hidden [N, D] and the gradients of its sum that are wanted, in one pass."""
    count = len(hidden)
    weight = hidden.new_ones(count) if token_weight is None else token_weight
    live = DeviceRows.of(weight != 0, call.step)
    no_target = torch.zeros(count, dtype=torch.int64, device=hidden.device)
    head = teacher.head
    other = call._replace(head=head, shard=VocabShard.of(head.weight, ""))
    models = [ChunkPipeline.of(one, no_target, live) for one in (call, other)]
    logits = [model.empty_logits() for model in models]
    rows = [RowStatistics.zeros(model.target_logit, has_entropy=False) for model in models]
    divergence = torch.zeros_like(rows[0].lse)
    weight = live.take(weight).float()
    gradient = GradientSum.of(models[0], hidden, sink)
    d_logit = narrow_view(logits[0], hidden.dtype) if call.work.has_gradient else None
    for part, live_count in live.parts():
        _fill(models[1], teacher.hidden, part, live_count, logits[1], rows[1])
        chunk = _fill(models[0], hidden, part, live_count, logits[0], rows[0])
        student, reference = (row.part(part) for row in rows)
        with device_guard(hidden):
            divergence_kernel[(len(chunk),)](
                *logits,
                d_logit,
                live_count,
                weight[part],
                student.maximum,
                student.total,
                reference.maximum,
                reference.total,
                divergence[part],
                logits[0].shape[1],
                0 if d_logit is None else d_logit.stride(0),
                call.head.slope,
                call.head.scale_and_cap[1],
                head.scale_and_cap[1],
                beta,
                kind_of(beta),
                GRADIENT_BLOCK_V,
                num_warps=GRADIENT_WARPS,
                num_stages=1,
            )
        if d_logit is not None:
            gradient.add(part, chunk, d_logit[: len(chunk)], Alive(None, live_count))
    values = (divergence, rows[0].lse, rows[1].lse)
    return LinearDivergence(*(live.spread(x) for x in values)), gradient.result()


def _fill(
    model: ChunkPipeline,
    hidden: Tensor,
    part: slice,
    live_count: Tensor,
    logits: Tensor,
    rows: RowStatistics,
) -> Tensor:
    """The logits of a chunk and their statistics; returns its hidden states [rows, D]."""
    chunk = model.gather(hidden, part)
    partial = model.run_logits(chunk, part, live_count, logits, has_moment=False)
    model.run_statistics(partial, part, live_count, rows)
    return chunk
