"""linear_topk_divergence on Backend.NATIVE: 3U."""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import GradientSum, Model, chunks
from xopd_kernels.chunk.native_softmax import sweep, write_softmax_gradient
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.linear_topk_divergence.reference import top_k_terms
from xopd_kernels.native import GradientTerms
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, TopK
from xopd_kernels.validation import check_top_k


def forward(
    call: Call,
    hidden: Tensor,
    teacher: TopK,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
) -> tuple[LinearDivergence, HeadGradient]:
    """The divergence of hidden [N, D] and the gradients of its sum that are wanted, in one pass."""
    weight = hidden.new_ones(len(hidden)) if token_weight is None else token_weight
    live = LiveRows.of(weight != 0)
    weight = live.take(weight).to(call.dtype)
    classes = len(call.head.weight)
    for part in live.parts(call.step):  # a chunk at a time: sorting takes 16 bytes an id
        check_top_k(live.chunk(teacher.ids, part), live.chunk(teacher.logprob, part), classes)
    model = Model.of(call.head, call.panel.tile_classes)
    gradient = GradientSum.of(call, model, hidden, live, sink)
    out = torch.empty(3, live.live, dtype=call.dtype, device=hidden.device)
    for chunk in chunks(call, hidden, live, gradient, call.work.has_gradient):
        ids, order = live.chunk(teacher.ids, chunk.part).contiguous().sort(1)
        log_q = live.chunk(teacher.logprob, chunk.part).gather(1, order).to(call.dtype)
        running = sweep(model, chunk, ids)
        top = running.maximum
        given = TopK(ids, log_q, teacher.has_tail)
        terms = top_k_terms(
            running.at_ids,
            top,
            running.total,
            given,
            weight[chunk.part],
            beta,
            has_rest=ids.shape[1] < classes,
        )
        for row, values in zip(out, terms[:3], strict=True):
            row[chunk.part] = values
        if call.work.has_gradient:
            top = top.where(top != -torch.inf, 0.0)
            of_logit = GradientTerms(top, terms.of_rest, None, ids, terms.at_ids)
            gradient.add(chunk, None, write_softmax_gradient(model, chunk, None, of_logit))
        del chunk
    result = LinearDivergence(*(live.spread(x.clone()) for x in out))
    return result, gradient.result()
