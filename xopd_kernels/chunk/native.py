"""Two sweeps over the vocabulary: what every Backend.NATIVE implementation is made of.

For a chunk of rows, sweep one computes the logits tile by tile of classes (a GEMM) and
folds them into row statistics (native code, while the tile is in the cache); sweep two turns each
tile into its gradient and multiplies it with the weight and the hidden states. Between the two the
logits lie in the memory of d_weight, whose rows are not written yet: a tile of d_weight replaces
the tile of logits that it is made from. So a chunk has up to D rows at no cost, and the GEMMs are
large. Where there is no such memory (a frozen weight, main_grad, later chunks in fp32) they lie in
the workspace. Logits and sums are fp32; `chunk.native_gemm` knows the factors of the GEMMs.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels import native
from xopd_kernels.chunk.call import Call
from xopd_kernels.chunk.native_gemm import (
    Bf16Gemms,
    Bf16Gradient,
    Fp32Gemms,
    Fp32Gradient,
    RoundedTiles,
    Write,
    as_factors,
)
from xopd_kernels.chunk.native_kept import KeptGradient, KeptRows
from xopd_kernels.chunk.reference import LiveRows
from xopd_kernels.native_matmul import Packed, multiplies
from xopd_kernels.native_scores import Outputs
from xopd_kernels.records import GradientSink, Head, HeadGradient

AddTo = Callable[[slice, Tensor], None]  # (tile, fp32 sum [T, D] before it is rounded)


class Model(NamedTuple):
    """A head, cut into tiles of classes."""

    head: Head
    step: int  # classes of a tile
    gemms: Fp32Gemms | Bf16Gemms

    @classmethod
    def of(cls, head: Head, step: int, spare: Tensor | None = None) -> "Model":
        """Take the buffer that weights are upcast into from `spare`, flat; None: allocate it."""
        weight = head.weight
        if multiplies(weight.dtype, weight.shape[1]):
            return cls(head, step, Bf16Gemms(weight, step))
        if weight.dtype == torch.float32:
            return cls(head, step, Fp32Gemms(weight, None))
        return cls(head, step, Fp32Gemms(weight, _tile(step, weight, spare)))

    def tiles(self) -> Iterator[slice]:
        """The classes, tile by tile."""
        classes = len(self.head.weight)
        for begin in range(0, classes, self.step):
            yield slice(begin, min(begin + self.step, classes))

    def logits(self, x: Tensor, tile: slice) -> native.Logits:
        """The logits of the linear outputs `x` [rows, T]."""
        bias = self.head.bias
        return native.Logits(
            x, None if bias is None else bias[tile].float().contiguous(), *self.head.scale_and_cap
        )


class Chunk(NamedTuple):
    """Some live rows of a model, and where their logits lie."""

    part: slice  # of the live rows
    hidden: Tensor  # [rows, D], a factor of the gradient's GEMMs
    factor: Tensor | Packed  # the same, of the logits' GEMMs
    store: Outputs

    @classmethod
    def of(cls, part: slice, hidden: Tensor, weight: Tensor, store: Outputs) -> "Chunk":
        """The chunk of `hidden` [rows, D] that is multiplied with `weight` [V, D]."""
        return cls(part, *as_factors(hidden, weight), store)

    def fill(self, model: Model, tile: slice) -> native.Logits:
        """The logits of a tile, computed."""
        x = self.store.block(tile, len(self.hidden))
        return model.logits(model.gemms.logits(self.factor, tile, x), tile)

    def kept(self, model: Model, tile: slice) -> native.Logits:
        """The logits of a tile that was filled before."""
        return model.logits(self.store.block(tile, len(self.hidden)), tile)


class GradientSum(NamedTuple):
    """d_hidden, d_weight and d_bias, summed tile by tile over the chunks."""

    call: Call
    model: Model
    live: LiveRows
    hidden: Tensor | None  # [N, D] as it is handed out; each row is written once
    weight: Tensor | None  # [V, D] as it is handed out, or main_grad
    total: Tensor | None  # [V, D] fp32 sum of the chunks; None: rounded tile by tile
    kept: KeptGradient | None  # of several chunks without `total`
    bias: Tensor | None  # [V] fp32
    d_tile: Tensor  # [step, D] fp32: a tile of d_weight before it is rounded; else [0, D]
    sink: GradientSink

    @classmethod
    def of(
        cls,
        call: Call,
        model: Model,
        hidden: Tensor,
        live: LiveRows,
        sink: GradientSink,
        spare: Tensor | None = None,
    ) -> "GradientSum":
        """Buffers for what is wanted of `hidden` [N, D]; `spare`: memory that `add` may use."""
        weight, wanted, fp32 = call.head.weight, call.wanted, torch.float32
        out_dtype = call.held_dtype
        out = total = kept = None
        is_one_chunk = call.panel.is_narrow(live.live)
        is_one_chunk |= call.panel.first_rows == 0 and live.live <= call.step
        is_one_chunk |= live.live == 0
        if wanted.weight:
            dtype = fp32 if sink.keeps_fp32 else out_dtype
            out = sink.main_grad
            # new_empty, not empty_like: contiguous, as the fakes promise, whatever the strides.
            out = weight.new_empty(weight.shape, dtype=dtype) if out is None else out
            if out.dtype == fp32:
                total = out
            elif call.panel.is_kept(live.live):
                assert isinstance(model.gemms, Bf16Gemms)
                kept = KeptGradient(out, model.gemms, call.work.models, call.panel)
            elif not is_one_chunk:
                total = weight.new_empty(weight.shape, dtype=fp32)
        is_rounded = total is None and out is not None
        is_rounded &= isinstance(model.gemms, Fp32Gemms) or call.work.is_sparse
        return cls(
            call,
            model,
            live,
            hidden.new_zeros(hidden.shape, dtype=out_dtype) if wanted.hidden else None,
            out,
            total,
            kept,
            weight.new_zeros(len(weight), dtype=fp32) if wanted.bias else None,
            _tile(model.step if is_rounded else 0, weight, spare),
            sink,
        )

    def overlay(self, begin: int) -> tuple[Outputs, int] | None:
        """Memory of d_weight for the logits of the chunk that begins there, and for how many rows.

        The fp32 one, if it is not written yet, or the one that is rounded to in the last chunk.
        """
        if self.kept is not None:
            return self.kept.place(self.live.live - begin)
        panel, words, rows = self.call.panel, self.total, self.call.panel.first_rows
        if begin > 0 or self.total is None:
            is_free = self.weight is not None and self.weight.dtype != torch.float32
            words, rows = self.weight if is_free else None, panel.later_rows
        if words is None or rows == 0:
            return None
        words = words.view(torch.float32)
        return Outputs(words.view(-1), words.shape[1]), rows

    def add(
        self, chunk: Chunk, alive: Tensor | None, write: Write, add_to: AddTo | None = None
    ) -> None:
        """Add a chunk; `write` fills d(loss)/d(linear output) of a tile.

        `alive` [rows] int64: the rows that `write` fills; None: all of the chunk. `add_to` adds to
        each tile of d_weight what does not come from these rows.
        """
        hidden = chunk.hidden if alive is None else chunk.hidden[alive]
        if self.kept is not None:
            self._keep(KeptRows(chunk.part, alive, hidden), write)
            return
        d_hidden, is_direct = None, False
        if self.hidden is not None:
            # The rows of d_hidden themselves, zeros as yet, where all of them are fp32 and alive.
            is_direct = alive is None and self.live.kept is None
            is_direct &= self.hidden.dtype == torch.float32
            d_hidden = self.hidden[chunk.part] if is_direct else _zeros(hidden)
        model, wanted = self.model, self.call.wanted
        gradient = model.gemms.gradient(hidden, self.d_tile, model.step, wanted)
        for tile in model.tiles():
            gradient.fill(tile, write)
            if self.bias is not None:
                self.bias[tile] += gradient.sums(tile)
            self._add_tile(gradient, tile, d_hidden, chunk.part, add_to)
        if self.hidden is not None and d_hidden is not None:
            self.call.shard.sum_(d_hidden)
            if not is_direct:
                self.hidden[self.live.rows(chunk.part, alive)] = d_hidden.to(self.hidden.dtype)

    def _keep(self, rows: KeptRows, write: Write) -> None:
        """Add a chunk whose d_logit waits for the last one."""
        kept = self.kept
        assert kept is not None
        wanted = self.call.wanted._replace(hidden=True, weight=False)
        d_logit = RoundedTiles.of(rows.hidden, self.model.step, wanted)
        for tile in self.model.tiles():
            out = d_logit.of_tile(tile)
            write(tile, out)
            if self.bias is not None:
                self.bias[tile] += d_logit.sums(tile)
            assert out.straight is not None
            kept.keep(tile, out.straight[:, : tile.stop - tile.start])
        del d_logit, out
        kept.chunks.append(rows)
        if rows.part.stop < self.live.live:
            return
        sizes = [len(chunk.hidden) for chunk in kept.chunks]
        d_hidden = None if self.hidden is None else _zeros(rows.hidden, sum(sizes))
        kept.write(self.model.tiles(), d_hidden)
        if self.hidden is None or d_hidden is None:
            return
        self.call.shard.sum_(d_hidden)
        for chunk, part in zip(kept.chunks, d_hidden.split(sizes), strict=True):
            self.hidden[self.live.rows(chunk.part, chunk.alive)] = part.to(self.hidden.dtype)

    def _add_tile(
        self,
        gradient: Fp32Gradient | Bf16Gradient,
        tile: slice,
        d_hidden: Tensor | None,
        part: slice,
        add_to: AddTo | None,
    ) -> None:
        """Add a tile of the rows `part` to d_hidden and to its tile of d_weight."""
        to, is_added = self._weight_of(tile, part.start == 0)
        # What else is added to a tile of d_weight comes before its one rounding.
        is_unrounded = add_to is not None and self.total is None and to is not None
        out = self.d_tile[: tile.stop - tile.start] if is_unrounded else to
        gradient.add(tile, d_hidden, out, is_added)
        if out is not None and to is not None and add_to is not None:
            add_to(tile, out)
            if out is not to:
                to.copy_(out)
        is_rounded = self.total is not None and self.total is not self.weight
        if part.stop == self.live.live and to is not None and is_rounded:
            assert self.weight is not None
            self.weight[tile] = to

    def _weight_of(self, tile: slice, is_first: bool) -> tuple[Tensor | None, bool]:
        """Where a tile of d_weight goes, and whether it is added to what is there."""
        if self.total is None:
            return None if self.weight is None else self.weight[tile], False
        return self.total[tile], not is_first or self.sink.main_grad is not None

    def result(self) -> HeadGradient:
        """The gradients, [0] where not wanted or in main_grad."""
        held = self.call.held_dtype
        nothing = self.call.head.weight.new_empty
        weight_dtype = torch.float32 if self.sink.keeps_fp32 else held
        weight = None if self.sink.main_grad is not None else self.weight
        if weight is not None and self.live.live == 0:
            weight.zero_()  # no chunk has written it
        return HeadGradient(
            nothing(0, dtype=held) if self.hidden is None else self.hidden,
            nothing(0, dtype=weight_dtype) if weight is None else weight,
            nothing(0, dtype=held) if self.bias is None else self.bias.to(held),
        )


def _zeros(like: Tensor, rows: int | None = None) -> Tensor:
    """[rows, D] fp32; None: as many as `like` [rows, D] has."""
    shape = (len(like) if rows is None else rows, like.shape[1])
    return like.new_zeros(shape, dtype=torch.float32)


def _tile(rows: int, weight: Tensor, spare: Tensor | None) -> Tensor:
    """Memory [rows, D] fp32 for classes of `weight`, at the start of `spare` if there is one."""
    size = rows, weight.shape[1]
    if spare is None:
        return weight.new_empty(size, dtype=torch.float32)
    return spare[: math.prod(size)].view(size)


def _workspace(call: Call, rows: int, keeps_logits: bool) -> Outputs:
    """Workspace for the logits of chunks of `rows`."""
    width = rows * call.work.models
    classes = call.panel.tile_classes * call.work.stores_logits
    if keeps_logits:
        classes = len(call.head.weight)
    words = call.head.weight.new_empty(width * classes, dtype=torch.float32)
    return Outputs(words, width if keeps_logits else 0)


def chunks(
    call: Call, hidden: Tensor, live: LiveRows, gradient: GradientSum | None, keeps_logits: bool
) -> Iterator[Chunk]:
    """The live rows of `hidden` [N, D], cut within the memory budget.

    Without `keeps_logits` the tiles share one place. Whoever goes through them lets go of a chunk
    before asking for the next one: else the hidden states of two are there at a time.
    """
    workspace: Outputs | None = None
    begin = 0
    while begin < live.live:
        place = None if gradient is None else gradient.overlay(begin)
        if place is None:
            rows = min(call.step, live.live - begin)
            workspace = workspace or _workspace(call, rows, keeps_logits)
            place = workspace, call.step
        store, step = place
        part = slice(begin, min(begin + step, live.live))
        yield Chunk.of(part, live.chunk(hidden, part), call.head.weight, store)
        begin = part.stop
