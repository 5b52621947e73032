"""The top-k divergence with a sparse gradient in eager torch: Backend.REFERENCE.

Outside of the ids the gradient of a row is a factor times the probabilities, whatever beta and
tail: the lists of the other operators, with the ids in the place of the target.
"""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.reference import ChunkLogits, GradientSum, LiveRows
from xopd_kernels.chunk.reference_sparse import Lists, leave_out_
from xopd_kernels.chunk.sparse import Choice, Missing, Tail, choose_rows, gradient_error
from xopd_kernels.linear_topk_divergence.reference import TopKTerms, exponentials_, usable_ids
from xopd_kernels.records import GradientSink, HeadGradient, LinearDivergence, Sparsity, TopK
from xopd_kernels.validation import check_top_k


def forward_sparse(
    call: Call,
    hidden: Tensor,
    teacher: TopK,
    token_weight: Tensor | None,
    beta: float,
    sink: GradientSink,
    sparsity: Sparsity,
) -> tuple[LinearDivergence, HeadGradient, Tensor, Tensor]:
    """As `reference.forward`; also the dropped mass [N] fp32 and the error [] fp32 reached.

    A list names at most ``call.work.list_length(chunk rows)`` classes besides the ids.
    """
    rows = hidden.shape[0]
    weight = hidden.new_ones(rows, dtype=call.dtype) if token_weight is None else token_weight
    live = LiveRows.of(weight != 0)
    weight = live.take(weight).to(call.dtype)
    classes = len(call.head.weight)
    for part in live.parts(call.step):  # a chunk at a time: sorting takes 16 bytes an id
        check_top_k(live.chunk(teacher.ids, part), live.chunk(teacher.logprob, part), classes)
    student = ChunkLogits.of(call, live)
    gradient = GradientSum.of(hidden, student, live, sink)
    tail = Tail.of(call.head, call.dtype) if call.wanted.hidden else None
    out = torch.empty(3, live.live, dtype=call.dtype, device=hidden.device)
    dropped = hidden.new_empty(live.live, dtype=torch.float32)
    error, norm = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    for part in live.parts(call.step):
        chunk_hidden = live.chunk(hidden, part).to(call.dtype)
        log_q = live.chunk(teacher.logprob, part).to(call.dtype)
        z = student.fill(chunk_hidden)
        ids, is_wrong = usable_ids(live.chunk(teacher.ids, part), classes)
        chunk_weight = weight[part].where(~is_wrong, torch.nan)
        given = TopK(ids, log_q, teacher.has_tail)
        terms, rest = exponentials_(z, given, chunk_weight, beta)
        out[0, part], out[1, part], out[2, part] = terms[:3]
        choice, dropped[part] = _leave_out_(student, z, ids, terms, rest, sparsity)
        missing = None if tail is None else Missing(tail, choice.missing(terms.of_rest * rest))
        error, norm = error + choice.error, norm + choice.norm
        z.mul_(terms.of_rest[:, None])
        z.scatter_(1, ids, terms.at_ids)
        alive = (~choice.is_whole).nonzero().squeeze(1)
        kept = None if len(alive) == len(z) else alive
        gradient.add(part, chunk_hidden, student.keep(len(z), kept), kept, missing)
    result = LinearDivergence(*(live.spread(x.clone()) for x in out))
    return result, gradient.result(), live.spread(dropped), gradient_error(error, norm, sparsity)


def _leave_out_(
    student: ChunkLogits,
    e: Tensor,
    ids: Tensor,
    terms: TopKTerms,
    rest: Tensor,
    sparsity: Sparsity,
) -> tuple[Choice, Tensor]:
    """Apply the rule to e = exp(z - top), 0 at the ids, of sum `rest`; also the dropped mass.

    Masses are shares of what the ids leave: p_v is as small as that is, the share of a class is
    not.
    """
    work, step = student.call.work, max(1, student.call.blocks.rows // 4)
    total = rest.where(rest > 0, 1.0)
    lists = Lists.of(e, total, ids, work.list_length(student.call.step), step)
    scale = terms.of_rest.abs().double() * total
    mass = lists.mass(scale, terms.at_ids.abs().double().sum(1) + scale * lists.rest)
    choice = choose_rows(mass, sparsity)
    leave_out_(e, ids, lists, mass, choice, step)
    dropped = torch.where(choice.is_sparse, choice.dropped_mass * terms.rest_mass, 0.0)
    return choice, dropped.masked_fill(choice.is_whole & (mass.norm > 0), 1.0).float()
