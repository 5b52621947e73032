"""Autograd of operators whose result is a loss for each token, with gradients computed ahead."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.autograd import (
    Run,
    Tensors,
    Triple,
    empty_held_gradients,
    raise_double_backward,
    read_gradients,
)
from xopd_kernels.records import GradientSink, Wanted

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Recompute = Callable[[Tensor], Triple]  # token_weight [N] -> gradients of the weighted sum


_SCALED_ELEMENTS = 2**18  # of d_hidden at a time


def _scale_rows_(d_hidden: Tensor, factor: Tensor) -> Tensor:
    """``d_hidden[i] *= factor[i]``, [N, D] and [N], rounded once.

    On a CPU torch makes fp32 copies of a narrower d_hidden for it: of some rows at a time.
    """
    rows = max(1, len(d_hidden))
    if d_hidden.is_cpu:
        rows = min(rows, max(1, _SCALED_ELEMENTS // d_hidden.shape[1]))
    for part, of_part in zip(d_hidden.split(rows), factor.split(rows), strict=True):
        part.mul_(of_part[:, None])
    return d_hidden


class AheadOfTime(NamedTuple):
    """Gradients of the sum over the tokens, and how to get those of any other weighting."""

    gradients: Triple  # of hidden, weight, bias; [0] where not wanted
    token_weight: Tensor | None  # [N]; rows of weight 0 have no gradient
    wanted: Wanted
    recompute: Recompute
    # Whether d_hidden may be scaled row by row. What a sparse gradient leaves out of a row is small
    # beside all rows, not beside others than those that the rule has seen.
    is_by_rows: bool = True

    def scaled(self, upstream: Tensor) -> Triple:
        """The gradients for `upstream` [N], as copies.

        One factor for all tokens (a sum or a mean over them) scales what was computed ahead; so
        does any `upstream` if d_hidden alone is wanted, row by row. Else d_weight mixes the rows,
        and the logits are computed again.
        """
        d_hidden, d_weight, d_bias = self.gradients
        if self._has_rows_alone:
            scaled = _scale_rows_(d_hidden.clone(), self._live(upstream))
            return scaled, d_weight.clone(), d_bias.clone()
        factor = self._common_factor(upstream)
        if factor is None:
            live = self._live(upstream)
            return self.recompute(live if self.token_weight is None else live * self.token_weight)
        return d_hidden * factor, d_weight * factor, d_bias * factor

    def scaled_in_place(self, upstream: Tensor) -> Triple:
        """As `scaled`, over the gradients themselves: a copy of d_weight is gigabytes."""
        if self._has_rows_alone:
            _scale_rows_(self.gradients[0], self._live(upstream))
            return self.gradients
        factor = self._common_factor(upstream)
        if factor is None:
            return self.scaled(upstream)
        if factor.device.type != "cpu" or factor.item() != 1.0:
            for gradient in self.gradients:
                gradient.mul_(factor)
        return self.gradients

    @property
    def _has_rows_alone(self) -> bool:
        return self.is_by_rows and not (self.wanted.weight or self.wanted.bias)

    def _live(self, upstream: Tensor) -> Tensor:
        """`upstream` [N], 0 for ignored tokens: theirs may be NaN, and NaN * 0 is not 0."""
        if self.token_weight is None:
            return upstream
        return torch.where(self.token_weight != 0, upstream, 0.0)

    def _common_factor(self, upstream: Tensor) -> Tensor | None:
        """The one value [] of `upstream` [N]; None if it has several, or if only a device knows.

        A sum hands out an expanded scalar, whose strides are 0: no value is read. Values are
        compared on a CPU alone; elsewhere that would stall the host.
        """
        if upstream.numel() == 0:
            return upstream.new_zeros(())
        if upstream.numel() == 1 or upstream.stride(0) == 0:
            return upstream[0]
        if upstream.device.type != "cpu":
            return None
        live = upstream if self.token_weight is None else upstream[self.token_weight != 0]
        if len(live) == 0:
            return upstream.new_zeros(())
        return live[0] if bool((live == live[0]).all()) else None


class RowOperator(NamedTuple):
    """What the torch.library operators of a per-token loss share.

    Their schemas are (tensors, main_grad, scalars, wanted) and, of the backward one,
    (upstream, gradients, tensors, scalars, wanted).
    """

    run: Run
    tensors: int  # how many of its arguments are tensors; token_weight is the last of them
    is_sparse: bool = False  # its gradients are, see AheadOfTime.is_by_rows

    def forward(
        self,
        tensors: Tensors,
        main_grad: Tensor | None,
        scalars: tuple[Any, ...],
        wanted: tuple[bool, bool, bool],
    ) -> Results:
        """The results and the gradients of their sum; d_weight in fp32 if `main_grad` is given."""
        sink = GradientSink(keeps_fp32=main_grad is not None)
        result, gradient = self.run(tensors, scalars, Wanted(*wanted), sink)
        return (*result, *gradient)

    def fake(
        self,
        hidden: Tensor,
        weight: Tensor,
        main_grad: Tensor | None,
        wanted: tuple[bool, bool, bool],
    ) -> Results:
        """Empty results of `forward`."""
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        value, lse, teacher_lse = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        gradients = empty_held_gradients(hidden, weight, Wanted(*wanted), main_grad)
        return value, lse, teacher_lse, *gradients

    def ahead(
        self, gradients: Triple, tensors: Tensors, scalars: tuple[Any, ...], wanted: Wanted
    ) -> "AheadOfTime":
        """The gradients of a call, and how to compute them again."""

        def recompute(token_weight: Tensor) -> Triple:
            weight = tensors[1]
            is_kept = weight is not None and gradients[1].dtype != weight.dtype
            sink = GradientSink(keeps_fp32=is_kept)
            return self.run((*tensors[:-1], token_weight), scalars, wanted, sink)[1]

        return AheadOfTime(gradients, tensors[-1], wanted, recompute, not self.is_sparse)

    def register_autograd(self, operator: Any, backward_operator: Any) -> None:
        """Connect the two operators."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            # Else autograd fills zeros for the outputs nobody reads: d_weight is one of them.
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*output[-3:], *inputs[: self.tensors])
            ctx.main_grad, *ctx.scalars = inputs[self.tensors :]

        def backward(ctx: Any, upstream: Tensor | None, *unread: None) -> tuple[Any, ...]:
            unasked = (None,) * (self.tensors - 2 + len(ctx.scalars))
            if upstream is None:
                return (None, None, None, *unasked)
            *scalars, _, _, _ = ctx.scalars
            saved, wanted = ctx.saved_tensors, Wanted(*ctx.needs_input_grad[:3])
            ahead = self.ahead(saved[:3], saved[3:], tuple(scalars), wanted)
            keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
            gradients: Triple
            if type(upstream) is not Tensor or torch.is_grad_enabled():
                # Whoever traces must not see how the values decide.
                gradients = backward_operator(upstream, *saved, *scalars, *wanted)
            elif keeps_graph:
                gradients = ahead.scaled(upstream)
            else:
                gradients = ahead.scaled_in_place(upstream)
            return (*read_gradients(gradients, wanted, ctx.main_grad), *unasked)

        operator.register_autograd(backward, setup_context=setup_context)
        backward_operator.register_autograd(raise_double_backward)
