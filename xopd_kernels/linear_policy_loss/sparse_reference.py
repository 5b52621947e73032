"""The policy loss with a sparse gradient in eager torch: the oracle and Backend.REFERENCE."""

import operator

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.reference import ChunkSoftmax, ChunkStats, GradientSum, LiveRows
from xopd_kernels.chunk.reference_sparse import Lists, draw, leave_out_
from xopd_kernels.chunk.sparse import Choice, Missing, Tail, choose_rows, gradient_error
from xopd_kernels.linear_policy_loss.reference import Rows, token_loss
from xopd_kernels.records import GradientSink, HeadGradient, PolicyLoss, PolicyTerms, Sparsity


def forward_sparse(
    call: Call,
    hidden: Tensor,
    target: Tensor,
    terms: PolicyTerms,
    ignore_index: int,
    sink: GradientSink,
    sparsity: Sparsity,
) -> tuple[PolicyLoss, HeadGradient, Tensor, Tensor]:
    """As `reference.forward`; also the dropped mass [N] fp32 and the error [] fp32 reached."""
    is_live = target != ignore_index
    if terms.token_weight is not None:
        is_live &= terms.token_weight != 0
    live = LiveRows.of(is_live)
    softmax = ChunkSoftmax.of(call, target, live)
    gradient = GradientSum.of(hidden, softmax.logits, live, sink)
    terms = terms.map(lambda values: live.take(values).to(call.dtype))
    rows = Rows.empty(live.live, softmax.logits.buffer)
    dropped = hidden.new_empty(live.live, dtype=torch.float32)
    error, norm = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    numbers = torch.arange(live.total, device=hidden.device)
    has_tail = call.wanted.hidden and not sparsity.is_unbiased
    tail = Tail.of(call.head, call.dtype) if has_tail else None
    for part in live.parts(call.step):
        chunk_hidden = live.chunk(hidden, part).to(call.dtype)
        stats = softmax.forward(chunk_hidden, part)
        token = token_loss(stats.logprob, terms.map(operator.itemgetter(part)))
        rows.put(part, stats.logprob, stats.lse, token)
        draws = (sparsity.seed, live.chunk(numbers, part))
        choice = _leave_out_(softmax, stats, token.coefficient, sparsity, draws)
        dropped[part] = choice.dropped_mass.float()
        error, norm = error + choice.error, norm + choice.norm
        alive = (~choice.is_whole).nonzero().squeeze(1)
        kept = None if len(alive) == len(choice.is_whole) else alive
        d_logit = _logit_gradient_(softmax, stats, token.coefficient, kept)
        missing = None if tail is None else Missing(tail, choice.missing(-token.coefficient))
        gradient.add(part, chunk_hidden, d_logit, kept, missing)
    result = PolicyLoss(rows.loss.sum(), *(live.spread(x) for x in rows[1:]))
    return result, gradient.result(), live.spread(dropped), gradient_error(error, norm, sparsity)


def _leave_out_(
    softmax: ChunkSoftmax,
    stats: ChunkStats,
    coefficient: Tensor,
    sparsity: Sparsity,
    draws: tuple[int, Tensor],
) -> Choice:
    """Apply the rule to the exponentials of a chunk; `draws`: the seed, the rows' numbers."""
    call, e = softmax.logits.call, softmax.logits.buffer[: len(coefficient)]
    kept, step = stats.target[:, None], max(1, call.blocks.rows // 4)
    length = call.work.list_length(call.step) - 1  # the target is one of the K classes
    lists = Lists.of(e, stats.total, kept, length, step)
    scale = coefficient.abs()
    mass = lists.mass(scale, 2 * scale.double() * lists.rest)
    choice = choose_rows(mass, sparsity)
    if not sparsity.is_unbiased:
        leave_out_(e, kept, lists, mass, choice, step)
        return choice
    drawn = draw(e, kept, lists, mass, choice, draws, step)
    leave_out_(e, kept, lists, mass, choice, step)
    e[drawn.rows, drawn.ids] = drawn.value
    return choice


def _logit_gradient_(
    softmax: ChunkSoftmax, stats: ChunkStats, coefficient: Tensor, alive: Tensor | None
) -> Tensor:
    """d_logit = c * (1[y] - p) of the rows alive, where the exponentials are not 0 by now."""
    d_logit = softmax.logits.keep(len(coefficient), alive)
    stats = stats.take(alive)
    c = coefficient if alive is None else coefficient[alive]
    d_logit.mul_((-c / stats.total)[:, None])
    stats.set_target_(d_logit, -c * stats.logprob.expm1())
    return d_logit
