"""Autograd of operators whose result is a loss for each token, with gradients computed ahead."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.chunk.autograd import Triple, refuse_graph_of_main_grad
from xopd_kernels.records import Wanted

Recompute = Callable[[Tensor], Triple]  # token_weight [N] -> gradients of the weighted sum


class AheadOfTime(NamedTuple):
    """Gradients of the sum over the tokens, and how to get those of any other weighting."""

    gradients: Triple  # of hidden, weight, bias; [0] where not wanted
    token_weight: Tensor | None  # [N]; rows of weight 0 have no gradient
    wanted: Wanted
    recompute: Recompute

    def scaled(self, upstream: Tensor) -> Triple:
        """The gradients for `upstream` [N], as copies.

        One factor for all tokens (a sum or a mean over them) scales what was computed ahead; so
        does any `upstream` if d_hidden alone is wanted, row by row. Else d_weight mixes the rows,
        and the logits are computed again.
        """
        d_hidden, d_weight, d_bias = self.gradients
        if not (self.wanted.weight or self.wanted.bias):
            scaled = d_hidden * self._live(upstream)[:, None]
            return scaled.to(d_hidden.dtype), d_weight.clone(), d_bias.clone()
        factor = self._common_factor(upstream)
        if factor is None:
            live = self._live(upstream)
            return self.recompute(live if self.token_weight is None else live * self.token_weight)
        return d_hidden * factor, d_weight * factor, d_bias * factor

    def scaled_in_place(self, upstream: Tensor) -> Triple:
        """As `scaled`, over the gradients themselves: a copy of d_weight is gigabytes."""
        if not (self.wanted.weight or self.wanted.bias):
            self.gradients[0].mul_(self._live(upstream)[:, None])
            return self.gradients
        factor = self._common_factor(upstream)
        if factor is None:
            return self.scaled(upstream)
        if factor.device.type != "cpu" or factor.item() != 1.0:
            for gradient in self.gradients:
                gradient.mul_(factor)
        return self.gradients

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


def row_gradients(
    upstream: Tensor,
    ahead: AheadOfTime,
    main_grad: Tensor | None,
    traced: Callable[[], Triple],
) -> list[Tensor | None]:
    """What backward hands out: None where not wanted, or added to `main_grad`.

    `traced` is the backward operator: whoever traces must not see how the values decide.
    """
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    if type(upstream) is not Tensor or torch.is_grad_enabled():
        gradients = traced()
    elif keeps_graph:
        gradients = ahead.scaled(upstream)
    else:
        gradients = ahead.scaled_in_place(upstream)
    pairs = zip(gradients, ahead.wanted, strict=True)
    read: list[Tensor | None] = [grad if is_wanted else None for grad, is_wanted in pairs]
    if main_grad is not None and ahead.wanted.weight:
        refuse_graph_of_main_grad()
        main_grad.add_(gradients[1])
        read[1] = None
    return read
