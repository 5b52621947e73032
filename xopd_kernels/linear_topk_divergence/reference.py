"""The divergence from a teacher's top-k log-probs in eager torch: Backend.REFERENCE."""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.kl import row_divergence
from xopd_kernels.chunk.reference import ChunkLogits, GradientSum, LiveRows
from xopd_kernels.records import TAIL_FLOOR, GradientSink, HeadGradient, LinearDivergence, TopK
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
    rows = hidden.shape[0]
    weight = hidden.new_ones(rows, dtype=call.dtype) if token_weight is None else token_weight
    live = LiveRows.of(weight != 0)
    weight = live.take(weight).to(call.dtype)
    classes = len(call.head.weight)
    for part in live.parts(call.step):  # a chunk at a time: sorting takes 16 bytes an id
        check_top_k(live.chunk(teacher.ids, part), live.chunk(teacher.logprob, part), classes)
    student = ChunkLogits.of(call, live)
    gradient = GradientSum.of(hidden, student, live, sink)
    out = torch.empty(3, live.live, dtype=call.dtype, device=hidden.device)
    for part in live.parts(call.step):
        chunk_hidden = live.chunk(hidden, part).to(call.dtype)
        log_q = live.chunk(teacher.logprob, part).to(call.dtype)
        z = student.fill(chunk_hidden)
        ids, is_wrong = usable_ids(live.chunk(teacher.ids, part), z.shape[1])
        chunk_weight = weight[part].where(~is_wrong, torch.nan)
        given = TopK(ids, log_q, teacher.has_tail)
        terms, _ = exponentials_(z, given, chunk_weight, beta)
        out[0, part], out[1, part], out[2, part] = terms[:3]
        z.mul_(terms.of_rest[:, None])
        z.scatter_(1, ids, terms.at_ids)
        if call.work.has_gradient:
            gradient.add(part, chunk_hidden, z, None)
    result = LinearDivergence(*(live.spread(x.clone()) for x in out))
    return result, gradient.result()


def usable_ids(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(ids that can be read, [rows] bool of those that are wrong): NaN where nothing may raise."""
    ordered = ids.sort(1).values
    is_wrong = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    is_wrong |= (ordered[:, 0] < 0) | (ordered[:, -1] >= vocab_size)
    return ids.clamp(0, vocab_size - 1), is_wrong


class TopKTerms(NamedTuple):
    """A chunk's results, and d_z: `at_ids` at the ids, `of_rest` * exp(z - top) elsewhere."""

    value: Tensor  # [rows]
    lse: Tensor
    teacher_lse: Tensor
    of_rest: Tensor
    at_ids: Tensor  # [rows, K]
    rest_mass: Tensor  # [rows] probability of all classes but the ids


def exponentials_(
    z: Tensor, teacher: TopK, weight: Tensor, beta: float
) -> tuple[TopKTerms, Tensor]:
    """The terms of a chunk, and the sum [rows] of what replaces its logits z: exp(z - top).

    0 at the ids. The mass of the other classes is summed over them: 1 - sum p would cancel.
    """
    at_ids = z.gather(1, teacher.ids)
    top = z.scatter_(1, teacher.ids, -torch.inf).amax(1)
    rest = z.sub_(top.where(top != -torch.inf, 0.0)[:, None]).exp_().sum(1)
    has_rest = teacher.ids.shape[1] < z.shape[1]
    return top_k_terms(at_ids, top, rest, teacher, weight, beta, has_rest), rest


def top_k_terms(
    at_ids: Tensor,
    top: Tensor,
    rest: Tensor,
    teacher: TopK,
    weight: Tensor,
    beta: float,
    has_rest: bool,
) -> TopKTerms:
    """From the logits of the ids [rows, K] and, of all other classes, maximum and sum [rows].

    The others have a maximum `top` of their own (-inf if there are none), `rest` is their sum of
    exp(z - top): far below the ids, exp(z - maximum) is 0 in all of it. In fp64: beside a p near 1
    the gradient is made of the other classes, of which fp32 would keep a digit or none.
    """
    dtype = at_ids.dtype
    at_ids, top, rest, weight = (x.double() for x in (at_ids, top, rest, weight))
    teacher = teacher._replace(logprob=teacher.logprob.double())
    maximum = torch.maximum(top, at_ids.amax(1))
    maximum = maximum.where(maximum != -torch.inf, 0.0)
    at_ids = at_ids - maximum[:, None]
    top = torch.where(top != -torch.inf, top - maximum, 0.0)
    total = rest * top.exp() + at_ids.exp().sum(1)
    log_total = total.log()
    teacher_lse = teacher.logprob.logsumexp(1)
    log_p, log_q = at_ids - log_total[:, None], teacher.logprob
    if teacher.has_tail:
        log_rest = torch.log((-teacher_lse.expm1()).clamp(min=TAIL_FLOOR))
        if not has_rest:
            log_rest = torch.full_like(log_rest, -torch.inf)
        log_p = torch.cat((log_p, (top + rest.log() - log_total)[:, None]), 1)
        log_q = torch.cat((log_q, log_rest[:, None]), 1)
    value, slope = row_divergence(log_p, log_q, beta, is_normalised=teacher.has_tail)
    # d value / d z_v = slope_v - p_v * sum(slope) for an id; a class of the tail has the share
    # p_v / p_rest of the slope of the tail, and with 1 - p_rest = sum p of the ids nothing cancels.
    k, share = at_ids.shape[1], top.exp() / total
    p, of_ids = log_p[:, :k].exp(), slope[:, :k].sum(1)
    of_tail, of_rest = torch.zeros_like(of_ids), -of_ids * share
    if teacher.has_tail:
        of_tail = slope[:, -1]
        of_rest = of_rest + torch.where(rest > 0, of_tail * p.sum(1) / rest, 0.0)
    d_ids = (slope[:, :k] - p * (of_ids + of_tail)[:, None]) * weight[:, None]
    results = (value * weight, maximum + log_total, teacher_lse)
    terms = (*results, of_rest * weight, d_ids, rest * share)
    return TopKTerms(*(x.to(dtype) for x in terms))
