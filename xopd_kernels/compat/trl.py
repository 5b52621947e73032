"""TRL's chunked kernels: `ChunkedLogProbFunction` and `ChunkedDivergenceFunction`.

    from xopd_kernels.compat.trl import ChunkedDivergenceFunction, ChunkedLogProbFunction

They are namespaces with an `apply`, not autograd functions: the operators below bring theirs.
"""

import torch
from torch import Tensor

from xopd_kernels import linear_divergence, linear_logprob
from xopd_kernels.compat.scalar_loss import refuse

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction:
    """Per-token log-probs, as trl.kernels.ChunkedLogProbFunction."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """(logprobs, entropy, None, None, None): the places of TRL's five results.

        Args:
            hidden: [N, D] bf16, fp16, fp32.
            weight: [V, D], bias [V] or None, dtype of hidden.
            targets: [N] int64. TRL has no ignored target; here -100 gives 0 and no gradient.
            temperature, final_logit_softcapping, logit_scale: as temperature, softcap and
                logit_scale in `linear_logprob`.
            chunk_size: no effect; the workspace has a bound of its own.
            outputs: () or ("entropy",). TRL's default asks for all four and raises here.

        Returns:
            logprobs [N] and entropy [N] (None unless asked for), nat, fp32, both differentiable.
            4U (U = 2 N V D).

        Raises:
            NotImplementedError: outputs names another statistic.
            TypeError, ValueError: as `linear_logprob`.
        """
        missing = tuple(name for name in outputs if name != "entropy")
        if missing:
            refuse("outputs", missing, 'pass outputs=("entropy",) or outputs=()')
        needs_entropy = "entropy" in outputs
        out = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            needs_entropy=needs_entropy,
        )
        return out.logprob, out.entropy if needs_entropy else None, None, None, None


class ChunkedDivergenceFunction:
    """Per-token divergence, as trl.kernels.chunked_divergence.ChunkedDivergenceFunction."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence [N], entropy [N] of the student without gradient), nat, fp32.

        Args:
            student_hidden: [N, D_S] bf16, fp16, fp32; student_weight [V, D_S], student_bias [V].
            teacher_hidden: [N, D_T]; teacher_weight [V, D_T], teacher_bias [V]: constants.
            beta: 0 is KL(T||S), 1 is KL(S||T), between is the generalized JSD, as in TRL.
            temperature, the scales and softcaps: as in `linear_divergence`.

        The entropy costs another 1U of the student (U = 2 N V D); call `linear_divergence` where
        nobody reads it.

        Raises:
            ValueError: the heads differ in V; TRL reads past the end of the smaller one.
            TypeError, ValueError: as `linear_divergence`.
        """
        if student_weight.shape[0] != teacher_weight.shape[0]:
            raise ValueError(
                f"student_weight and teacher_weight must have one V, got {student_weight.shape[0]} "
                f"and {teacher_weight.shape[0]}; slice the larger one to the shared classes"
            )
        out = linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            beta=beta,
            bias=student_bias,
            teacher_bias=teacher_bias,
            temperature=temperature,
            softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
        )
        with torch.no_grad():
            student = linear_logprob(
                student_hidden,
                student_weight,
                torch.zeros_like(out.divergence, dtype=torch.int64),
                bias=student_bias,
                temperature=temperature,
                softcap=student_final_logit_softcapping,
                logit_scale=student_logit_scale,
                needs_entropy=True,
            )
        return out.divergence, student.entropy
