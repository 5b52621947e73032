"""verl's fused log-prob and entropy: `linear_cross_entropy` and `FusedLinearForPPO`.

from xopd_kernels.compat.verl import FusedLinearForPPO, linear_cross_entropy
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from xopd_kernels import linear_logprob
from xopd_kernels.compat.scalar_loss import refuse


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of `labels` and entropy, as verl.utils.kernel.linear_cross_entropy; any width D.

    Args:
        hidden: [..., D] bf16, fp16, fp32; flattened to N rows.
        weight: [V, D], dtype of hidden.
        labels: [...] int64. verl has no ignored label; here -100 gives 0 and no gradient.
        temperature: divides the logits.
        reduction: "none", "sum" or "mean" (over all N rows) of the log-probs, in any case.
        dist_process_group: must be None.

    Returns:
        (logprobs [N] or [], entropy [N]), fp32, nat, both differentiable. 4U (U = 2 N V D).

    Raises:
        NotImplementedError: dist_process_group. verl leaves d_hidden partial on each rank and its
            caller sums it; `linear_logprob` with vocab_group returns the sum.
        TypeError, ValueError: as `linear_logprob`; an unknown reduction.
    """
    if dist_process_group is not None:
        refuse(
            "dist_process_group",
            dist_process_group,
            "call linear_logprob with vocab_group, which sums d_hidden over the ranks itself",
        )
    name = reduction.lower()
    if name not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
    out = linear_logprob(hidden, weight, labels, temperature=temperature, needs_entropy=True)
    logprobs = out.logprob.reshape(-1)
    if name != "none":
        logprobs = logprobs.sum() if name == "sum" else logprobs.mean()
    return logprobs, out.entropy.reshape(-1)


class FusedLinearForPPO(nn.Module):
    """Log-prob and entropy, as verl.utils.experimental.torch_functional.FusedLinearForPPO."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        """`chunk_size` has no effect; `impl_backend` "torch" or "liger" sets the entropy's dtype.

        Raises:
            ValueError: impl_backend is neither.
        """
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f'impl_backend must be "torch" or "liger", got {impl_backend!r}')
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of `input_ids` [...], nat, both differentiable.

        Args:
            hidden_states: [..., D] bf16, fp16, fp32.
            vocab_weights: [V, D], dtype of hidden_states.
            input_ids: [...] integer classes, already shifted; -100 gives 0 and no gradient.
            temperature: divides the logits.

        Returns:
            log_probs [...] fp32; entropy [...] in the dtype of hidden_states for impl_backend
            "torch", as in verl, and fp32 for "liger". 4U (U = 2 N V D).

        Raises:
            TypeError, ValueError: as `linear_logprob`.
        """
        out = linear_logprob(
            hidden_states,
            vocab_weights,
            input_ids.to(torch.int64),
            temperature=temperature,
            needs_entropy=True,
        )
        is_narrow = self.impl_backend == "torch"
        entropy = out.entropy.to(hidden_states.dtype) if is_narrow else out.entropy
        return out.logprob, entropy
