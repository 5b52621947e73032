"""The policy loss with a sparse gradient on a device: about one GEMM where the softmax is peaked.

Per chunk: logits, statistics and token loss as in the exact pass -> lists of the likeliest classes
-> the rule -> sparse rows from their entries, dense rows as in the exact pass.
"""

import torch
from torch import Tensor

from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.device_rows import Alive, DeviceRows, RowGradients, RowStatistics
from xopd_kernels.chunk.sparse import Choice, choose_rows, gradient_error, row_uniform
from xopd_kernels.chunk.triton import ChunkPipeline
from xopd_kernels.chunk.triton_sparse import (
    EntryLists,
    EntryTerms,
    ListOptions,
    SparseSum,
    list_length,
    run_draw,
    run_keep,
    run_lists,
)
from xopd_kernels.linear_policy_loss.triton import TokenRows, run_policy
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
    """As `triton.forward`; also the dropped mass [N] fp32 and the error [] fp32 reached."""
    is_live = target != ignore_index
    if terms.token_weight is not None:
        is_live &= terms.token_weight != 0
    live = DeviceRows.of(is_live, call.step)
    pipeline = ChunkPipeline.of(call, target, live)
    terms = terms.map(lambda values: live.take(values).float())
    out = hidden.new_zeros(len(TokenRows._fields), len(target), dtype=torch.float32)
    rows, logits = TokenRows(*out), pipeline.empty_logits()
    gradient = SparseSum.of(pipeline, hidden, sink, has_tail=not sparsity.is_unbiased)
    statistics = RowStatistics(rows.logprob, rows.lse, rows.maximum, rows.total, None)
    upstream = RowGradients(rows.coefficient, None, None)
    dropped = torch.zeros_like(rows.loss)
    error, norm = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    for part, live_count in live.parts():
        chunk = pipeline.gather(hidden, part)
        partial = pipeline.run_logits(chunk, part, live_count, logits, has_moment=False)
        run_policy(partial, pipeline.target_logit[part], live_count, terms, out, part)
        coefficient = rows.coefficient[part]
        choice, lists = _choose(
            pipeline, logits, part, live_count, statistics, coefficient, sparsity
        )
        gradient.add_entries(chunk, live.order[part], lists, choice.missing(-coefficient))
        dropped[part] = choice.dropped_mass.float()
        error, norm = error + choice.error, norm + choice.norm
        dense = Alive.of(coefficient.masked_fill(choice.is_sparse | choice.is_whole, 0.0))
        d_logit = pipeline.run_gradient(logits, part, dense, statistics, upstream)
        gradient.add(part, chunk, d_logit, dense)
    logprob, lse, advantage, ratio, is_clipped = (live.spread(x) for x in rows[1:6])
    result = PolicyLoss(rows.loss.sum(), logprob, lse, advantage, ratio, is_clipped != 0)
    reached = gradient_error(error, norm, sparsity)
    return result, gradient.result(), live.spread(dropped), reached


def _choose(
    pipeline: ChunkPipeline,
    logits: Tensor,
    part: slice,
    live_count: Tensor,
    rows: RowStatistics,
    coefficient: Tensor,
    sparsity: Sparsity,
) -> tuple[Choice, EntryLists]:
    """What is left out of a chunk, and the entries of its sparse rows.

    `coefficient` [part rows] is d loss / d logprob.
    """
    call, target = pipeline.call, pipeline.target[part]
    # One more slot for the class that is drawn.
    options = ListOptions(list_length(call.work, call.step), extra=int(sparsity.is_unbiased))
    # Half of the row's share of the allowance.
    enough = rows.logprob[part].expm1() * (-sparsity.max_error / 2)
    lists = run_lists(pipeline, logits, part, live_count, rows, enough, options)
    mass = lists.row_mass(coefficient.abs(), target, logits.shape[1])
    # Not by the log-prob: that of a sure token has no digits.
    terms = EntryTerms(target, mass.scale, -coefficient, coefficient * mass.rest)
    choice = choose_rows(mass, sparsity)
    lists = run_keep(lists, choice, terms, call.head.slope)
    if sparsity.is_unbiased:
        uniform = row_uniform(sparsity.seed, pipeline.live.order[part])
        run_draw(pipeline, lists, logits, part, rows, terms, uniform)
    return choice, lists
