"""The one-pass driver of linear_topk_divergence: 3U.

Per chunk: logits and statistics -> divergence from the teacher's ids and, over the logits in
place, the gradient -> d_hidden, d_weight. Kernels and row order are those of the other operators.
"""

import torch
import triton
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.config import GRADIENT_BLOCK_V, GRADIENT_WARPS
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowStatistics
from xopd_kernels.chunk.triton import ChunkPipeline, GradientSum, narrow_view
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, TopK
from xopd_kernels.target import device_guard
from xopd_kernels.tile.divergence import kind_of, topk_divergence_kernel
from xopd_kernels.validation import check_top_k

MAX_TOP_K = 256  # a row's ids and their tail lie in the registers of one program


def forward(
    call: Call,
    hidden: Tensor,
    teacher: TopK,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
) -> tuple[LinearDivergence, HeadGradient]:
    """The divergence of hidden [N, D] and the gradients of its sum that are wanted, in one pass.

    ValueError if there
    are more than MAX_TOP_K ids a row, or if a live row on the CPU holds a wrong one.
    """
    count, top_k = teacher.ids.shape
    weight = hidden.new_ones(count) if token_weight is None else token_weight
    check_teacher(teacher, weight, len(call.head.weight))
    live = DeviceRows.of(weight != 0, call.step)
    no_target = torch.zeros(count, dtype=torch.int64, device=hidden.device)
    model = ChunkPipeline.of(call, no_target, live)
    logits = model.empty_logits()
    rows = RowStatistics.zeros(model.target_logit, has_entropy=False)
    divergence, teacher_lse = torch.zeros_like(rows.lse), torch.zeros_like(rows.lse)
    weight = live.take(weight).float()
    gradient = GradientSum.of(model, hidden, sink)
    d_logit = narrow_view(logits, hidden.dtype) if call.work.has_gradient else None
    for part, live_count in live.parts():
        chunk = model.gather(hidden, part)
        partial = model.run_logits(chunk, part, live_count, logits, has_moment=False)
        model.run_statistics(partial, part, live_count, rows)
        with device_guard(hidden):
            topk_divergence_kernel[(len(chunk),)](
                logits,
                d_logit,
                model.gather(teacher.ids, part),
                model.gather(teacher.logprob, part).float(),
                live_count,
                weight[part],
                rows.maximum[part],
                rows.total[part],
                divergence[part],
                teacher_lse[part],
                logits.shape[1],
                top_k,
                0 if d_logit is None else d_logit.stride(0),
                call.head.slope,
                call.head.scale_and_cap[1],
                beta,
                kind_of(beta),
                teacher.has_tail,
                triton.next_power_of_2(max(top_k + teacher.has_tail, 16)),
                GRADIENT_BLOCK_V,
                num_warps=GRADIENT_WARPS,
                num_stages=1,
            )
        if d_logit is not None:
            gradient.add(part, chunk, d_logit[: len(chunk)], Alive(None, live_count))
    values = (divergence, rows.lse, teacher_lse)
    return LinearDivergence(*(live.spread(x) for x in values)), gradient.result()


def check_teacher(teacher: TopK, weight: Tensor, vocab_size: int) -> None:
    """ValueError if there are too many ids a row, or if a live row on the CPU holds a wrong one."""
    top_k = teacher.ids.shape[1]
    if top_k > MAX_TOP_K:
        raise ValueError(
            f"teacher_ids holds K={top_k} ids a token; TRITON takes at most {MAX_TOP_K}: "
            "pass fewer, or use Backend.REFERENCE"
        )
    if not weight.is_cuda:
        check_top_k(teacher.ids[weight != 0], teacher.logprob[weight != 0], vocab_size)
