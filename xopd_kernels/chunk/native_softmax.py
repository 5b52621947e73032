"""Sweep one of a chunk as row statistics, and the softmax of a head made of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels import native
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native import Chunk, Model
from xopd_kernels.chunk.native_gemm import Bf16Gemms, Write
from xopd_kernels.chunk.reference import LOG_ZERO, LiveRows
from xopd_kernels.validation import check_target_range


class Stats(NamedTuple):
    """Row statistics of a chunk over all classes (of all ranks)."""

    logprob: Tensor  # [rows] fp32
    lse: Tensor
    entropy: Tensor  # meaningless unless has_entropy
    maximum: Tensor  # finite
    total: Tensor  # [rows] fp64: sum of exp(logit - maximum)
    ids: Tensor  # [rows, 1] local class of the target, -1 on the ranks that do not hold it


class Softmax(NamedTuple):
    """The softmax of the head over one row chunk after the other, and its targets."""

    call: Call
    model: Model
    ids: Tensor  # [live, 1] local class, -1 where it is another rank's

    @classmethod
    def of(cls, call: Call, target: Tensor, live: LiveRows) -> "Softmax":
        """For `target` [N]; raises ValueError if a live one is out of range."""
        shard, target = call.shard, live.take(target)
        check_target_range(target, shard.classes)
        local = target - shard.offset
        is_local = (local >= 0) & (local < len(call.head.weight))
        model = Model.of(call.head, call.panel.tile_classes)
        return cls(call, model, local.where(is_local, -1)[:, None])

    def forward(self, chunk: Chunk) -> Stats:
        """Sweep one: the statistics of a chunk."""
        ids, shard = self.ids[chunk.part], self.call.shard
        # The target stands apart: beside a probability near 1, sums of fp32 would lose the other
        # classes, and they are what its log-prob and its gradient are made of.
        running = sweep(self.model, chunk, ids, self.call.work.needs_entropy)
        is_local = ids[:, 0] >= 0
        at_target = running.at_ids[:, 0].where(is_local, -torch.inf)
        # fmax: as in the sweep, a NaN is left to the sums.
        maximum = shard.maximum_(torch.fmax(running.maximum, at_target))
        # A row of -inf logits: lse -inf and logprob NaN, as in torch; not inf - inf everywhere.
        maximum = maximum.where(maximum != -torch.inf, 0.0)
        shift = (running.maximum - maximum).clamp_(min=LOG_ZERO).double()
        own = at_target.double() - maximum
        share, own_share = shift.exp(), own.exp()
        others = running.total * share
        total = moment = others + own_share
        if running.moment is not None:
            moment = running.moment * share + shift * others
            moment = moment + own_share * own.clamp_(min=LOG_ZERO)
        local, found = at_target.double().where(is_local, 0.0), is_local.double()
        total, moment, local, found = shard.sum_(torch.stack((total, moment, local, found)))
        at_target, log_total = local.where(found > 0, torch.nan), total.log()
        # H = log(total) - sum(p * (z - max)): both terms >= 0, so nothing cancels.
        entropy = log_total - moment / total
        logprob, lse = (at_target - maximum) - log_total, maximum + log_total
        return Stats(logprob.float(), lse.float(), entropy.float(), maximum, total, ids)


def sweep(
    model: Model,
    chunk: Chunk,
    ids: Tensor,
    needs_moment: bool = False,
) -> native.Running:
    """Compute the logits of a chunk and fold them into statistics, without those of the ids.

    `ids` [rows, K] ascending.
    """
    hidden, rows = chunk.hidden, len(chunk.hidden)
    total = hidden.new_zeros(rows, dtype=torch.float64)
    running = native.Running(
        total.new_full((rows,), -torch.inf, dtype=torch.float32),
        total,
        torch.zeros_like(total) if needs_moment else None,
        total.new_zeros(ids.shape, dtype=torch.float32),
    )
    if isinstance(model.gemms, Bf16Gemms):
        model.gemms.score(chunk.factor, model.head, chunk.store, ids, running)
        return running
    for tile in model.tiles():
        logits = chunk.fill(model, tile)
        native.add_statistics(logits, tile.start, ids, running)
    return running


def write_softmax_gradient(
    model: Model, chunk: Chunk, alive: Tensor | None, terms: native.GradientTerms
) -> Write:
    """What `GradientSum.add` needs for d_logit = alpha e + gamma e (z - maximum)."""

    def write(tile: slice, out: Tensor | native.Rounded) -> None:
        logits = chunk.kept(model, tile)
        native.write_gradient(logits, tile.start, alive, terms, out)

    return write
