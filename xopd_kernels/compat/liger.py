"""Liger-Kernel's fused linear losses: cross-entropy, generalized JSD and GRPO.

    from xopd_kernels.compat.liger import LigerFusedLinearCrossEntropyLoss

Argument order is Liger's, which differs from class to class. Per-token weights and the linear
weight's gradient are fp32 sums in every case, so `accum_dtype` may be None or float32.
"""

import torch
from torch import Tensor, nn

from xopd_kernels import linear_divergence
from xopd_kernels.compat.liger_grpo import LigerFusedLinearGRPOLoss
from xopd_kernels.compat.scalar_loss import (
    cross_entropy,
    refuse,
    result_dtype,
    weighted_cross_entropy,
)

__all__ = [
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
]


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross-entropy, as liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        """`reduction` is "none", "sum" or "mean" over the tokens that are not ignored (0 of none).

        Raises:
            NotImplementedError: ce_weight, lse_square_scale, label_smoothing, return_z_loss,
                use_token_scaling, return_token_accuracy, return_predicted_tokens, or an
                accum_dtype other than float32.
            ValueError: reduction is none of the three.
        """
        super().__init__()
        if ce_weight is not None:
            refuse("ce_weight", ce_weight)
        z_loss_remedy = "use linear_logprob, whose lse has a gradient"
        if lse_square_scale != 0.0:
            refuse("lse_square_scale", lse_square_scale, z_loss_remedy)
        if return_z_loss:
            refuse("return_z_loss", return_z_loss, z_loss_remedy)
        if label_smoothing != 0.0:
            refuse("label_smoothing", label_smoothing, "set it to 0 or use Liger's loss")
        if use_token_scaling:
            refuse("use_token_scaling", use_token_scaling)
        if return_token_accuracy:
            refuse("return_token_accuracy", return_token_accuracy, "no argmax is computed")
        if return_predicted_tokens:
            refuse("return_predicted_tokens", return_predicted_tokens, "no argmax is computed")
        _check_accum_dtype(accum_dtype)
        if reduction not in ("none", "sum", "mean"):
            raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.softcap = softcap

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The loss [] ([N] for "none"), fp32, of the classes `target` [N].

        Args:
            lin_weight: [V, D], the first argument, as in Liger.
            _input: [N, D] bf16, fp16, fp32.
            target: [N] int64, already shifted.
            bias: [V].

        3U for "mean" and "sum", 4U for "none" (U = 2 N V D).

        Raises:
            TypeError, ValueError: as `linear_logprob`.
        """
        return cross_entropy(
            _input,
            lin_weight,
            target,
            reduction=self.reduction,
            bias=bias,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
        )


class LigerFusedLinearJSD(nn.Module):
    """Mean generalized JSD, as liger_kernel.transformers.LigerFusedLinearJSD."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        """`jsd_beta` 0 is KL(T||S), 1 is KL(S||T); `accum_dtype` is None or float32."""
        super().__init__()
        _check_accum_dtype(accum_dtype)
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """The mean divergence [], fp32, over the tokens that are not ignored (0 of none).

        Args:
            student_input: [N, D_S]; student_weight [V, D_S].
            teacher_input: [N, D_T]; teacher_weight [V, D_T]: constants.
            shift_labels: [N] int64, read for ignore_index only; None: every token counts.

        Raises:
            ValueError: the heads differ in V, which Liger does not support, either.
            TypeError, ValueError: as `linear_divergence`.
        """
        _check_one_vocab(student_weight, teacher_weight)
        token_weight = _mean_weight(student_input, shift_labels, self.ignore_index)
        return linear_divergence(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            beta=self.jsd_beta,
            temperature=self.temperature,
            token_weight=token_weight,
        ).divergence.sum()


class LigerFusedLinearJSDLoss(nn.Module):
    """Cross-entropy plus JSD, as liger_kernel.chunked_loss.LigerFusedLinearJSDLoss."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        """`compiled` and `chunk_size` have no effect; the temperature is the soft loss's alone."""
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """``weight_hard_loss * CE + weight_soft_loss * JSD``, means over the labels that count.

        Args:
            student_input: [N, D_S]; student_weight [V, D_S]; student_bias [V].
            teacher_input: [N, D_T]; teacher_weight [V, D_T]; teacher_bias [V]: constants.
            true_labels: [N] int64, already shifted.

        Returns:
            The loss [] fp32; with return_soft_hard_loss (loss, soft, hard), of which only the
            first has a gradient. A hard loss of weight 0 that nobody reads is not computed.

        Raises:
            ValueError: the heads differ in V. Liger pads the student with logits of 0 instead,
                which gives the classes that it lacks probability.
            TypeError, ValueError: as `linear_divergence` and `linear_logprob`.
        """
        _check_one_vocab(student_weight, teacher_weight)
        token_weight = _mean_weight(student_input, true_labels, self.ignore_index)
        soft = linear_divergence(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            beta=self.beta,
            bias=student_bias,
            teacher_bias=teacher_bias,
            temperature=self.temperature,
            token_weight=token_weight,
        ).divergence.sum()
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            return self.weight_soft_loss * soft
        hard = weighted_cross_entropy(
            student_input,
            student_weight,
            true_labels,
            token_weight,
            bias=student_bias,
            ignore_index=self.ignore_index,
        )
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def _check_accum_dtype(accum_dtype: torch.dtype | None) -> None:
    if accum_dtype not in (None, torch.float32):
        refuse("accum_dtype", accum_dtype, "weight gradients are summed in float32; pass None")


def _check_one_vocab(student_weight: Tensor, teacher_weight: Tensor) -> None:
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student_weight and teacher_weight must have one V, got {student_weight.shape[0]} "
            f"and {teacher_weight.shape[0]}; linear_divergence takes both and slices to the smaller"
        )


def _mean_weight(hidden: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Per-token weights [N] that turn a sum into the mean over the labels that count."""
    weight = hidden.new_ones(hidden.shape[:-1], dtype=result_dtype(hidden))
    if labels is not None:
        weight = weight * (labels != ignore_index)
    return weight / weight.sum().clamp(min=1)
