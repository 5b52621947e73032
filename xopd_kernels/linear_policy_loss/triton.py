"""The one-pass driver of the policy loss: each row chunk's logits are computed once (3U).

Per chunk: logits and partial statistics -> token loss and its coefficient -> gradient over the
logits, in place -> d_hidden, d_weight. Kernels and row order are those of linear_logprob.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.config import ROWS_PER_PROGRAM
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowGradients, RowStatistics
from xopd_kernels.chunk.scoring import run_scoring
from xopd_kernels.chunk.triton import ChunkPipeline, GradientSum
from xopd_kernels.records import GradientSink, HeadGradient, PolicyLoss, PolicyTerms
from xopd_kernels.target import device_guard
from xopd_kernels.tile.token_loss import policy_kernel


class TokenRows(NamedTuple):
    """Per-token results [N] fp32 in live order; dead rows are 0. The planes of policy_kernel."""

    loss: Tensor
    logprob: Tensor
    lse: Tensor
    advantage: Tensor
    ratio: Tensor
    is_clipped: Tensor  # 0 or 1
    coefficient: Tensor  # d loss / d logprob
    maximum: Tensor
    total: Tensor  # sum of exp(logit - maximum)


def forward(
    call: Call,
    hidden: Tensor,
    target: Tensor,
    terms: PolicyTerms,
    ignore_index: int,
    sink: GradientSink,
) -> tuple[PolicyLoss, HeadGradient]:
    """The loss of hidden [N, D], target [N] and the gradients that are wanted, in one pass."""
    is_live = target != ignore_index
    if terms.token_weight is not None:
        is_live &= terms.token_weight != 0
    live = DeviceRows.of(is_live, call.step)
    pipeline = ChunkPipeline.of(call, target, live)
    terms = terms.map(lambda values: live.take(values).float())
    out = hidden.new_zeros(len(TokenRows._fields), len(target), dtype=torch.float32)
    rows = TokenRows(*out)
    logits = pipeline.empty_logits() if call.work.has_gradient else None
    gradient = GradientSum.of(pipeline, hidden, sink)
    statistics = RowStatistics(rows.logprob, rows.lse, rows.maximum, rows.total, None)
    upstream = RowGradients(rows.coefficient, None, None)
    for part, live_count in live.parts():
        chunk = pipeline.gather(hidden, part)
        if logits is None:
            partial = run_scoring(pipeline, chunk, part, live_count, has_moment=False)
        else:
            partial = pipeline.run_logits(chunk, part, live_count, logits, has_moment=False)
        run_policy(partial, pipeline.target_logit[part], live_count, terms, out, part)
        if logits is not None:
            alive = Alive.of(rows.coefficient[part])
            d_logit = pipeline.run_gradient(logits, part, alive, statistics, upstream)
            gradient.add(part, chunk, d_logit, alive)
    logprob, lse, advantage, ratio, is_clipped = (live.spread(x) for x in rows[1:6])
    loss = rows.loss.sum()
    result = PolicyLoss(loss, logprob, lse, advantage, ratio, is_clipped != 0)
    return result, gradient.result()


def run_policy(
    partial: Tensor,
    target_logit: Tensor,
    live_count: Tensor,
    terms: PolicyTerms,
    out: Tensor,
    part: slice,
) -> None:
    """Row statistics and token loss of a chunk, into out [9, N]."""
    terms = terms.map(lambda values: values[part])
    _, slabs, rows = partial.shape
    with device_guard(out):
        policy_kernel[(triton.cdiv(rows, ROWS_PER_PROGRAM),)](
            partial,
            target_logit,
            live_count,
            terms.teacher_logprob,
            terms.advantage,
            terms.old_logprob,
            terms.token_weight,
            out[:, part],
            out.stride(0),
            rows,
            slabs,
            1.0 - terms.clip_low,
            1.0 + terms.clip_high,
            terms.advantage_clamp,
            ROWS_PER_PROGRAM,
        )
