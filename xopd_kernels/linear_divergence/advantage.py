"""reverse_kl_advantage: what on-policy distillation needs of both heads, without a gradient."""

import torch
from torch import Tensor

from xopd_kernels.backend import BackendChoice
from xopd_kernels.inputs import check_pair, first_classes, prepare_options
from xopd_kernels.linear_logprob import linear_logprob
from xopd_kernels.records import ReverseKLAdvantage, Transform
from xopd_kernels.validation import check_clamp


def reverse_kl_advantage(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    advantage_clamp: float = 10.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> ReverseKLAdvantage:
    """The single-sample reverse-KL advantage of `target` under two linear heads; no gradient.

    ``advantage = clamp(log q(y) - log p(y), -advantage_clamp, advantage_clamp)`` with p the
    student and q the teacher (arXiv 2603.24596, eq. 1 and 2). 1U of each model, no logits.

    Args:
        hidden, weight, bias, softcap, logit_scale: the student, [..., D], [V, D], [V].
        teacher_hidden, teacher_weight, ...: the teacher, [..., D_T], [V_T, D_T], [V_T]. Classes
            beyond the smaller of V and V_T are sliced away: padding rows hold no mass.
        target: [...] int64 classes, already shifted; `ignore_index` marks ignored tokens.
        temperature: divides the logits of both.
        advantage_clamp: > 0, nat; math.inf for none.
        ignore_index, memory_budget_bytes, backend: as in `linear_logprob`.

    Returns:
        ReverseKLAdvantage(advantage, logprob, teacher_logprob), [...] fp32 (fp64 for fp64
        inputs), 0 where ignored.

    Raises:
        TypeError, ValueError: an input is wrong; nothing was computed, unless the budget holds a
            chunk of the student and none of the teacher.
        BackendUnavailableError: an explicit backend cannot run here.

    Example:
        >>> import torch
        >>> from xopd_kernels import reverse_kl_advantage
        >>> zeros = torch.zeros(1, 4)
        >>> reverse_kl_advantage(
        ...     zeros, torch.zeros(8, 4), zeros, torch.zeros(16, 4), torch.tensor([3])
        ... ).advantage
        tensor([0.])
    """
    tensors = [
        ("hidden", hidden),
        ("weight", weight),
        ("teacher_hidden", teacher_hidden),
        ("teacher_weight", teacher_weight),
        ("target", target),
    ]
    optional = [("bias", bias), ("teacher_bias", teacher_bias)]
    prepare_options(tensors, optional, memory_budget_bytes, backend)
    check_clamp(advantage_clamp)
    own = Transform(temperature, softcap, logit_scale)
    other = Transform(temperature, teacher_softcap, teacher_logit_scale)
    classes = check_pair(
        (hidden, weight, bias, own), (teacher_hidden, teacher_weight, teacher_bias, other)
    )
    with torch.no_grad():
        logprob, teacher_logprob = (
            linear_logprob(
                states,
                first_classes(matrix, classes),
                target,
                bias=None if offset is None else first_classes(offset, classes),
                temperature=temperature,
                softcap=cap,
                logit_scale=scale,
                ignore_index=ignore_index,
                memory_budget_bytes=memory_budget_bytes,
                backend=backend,
            ).logprob
            for states, matrix, offset, cap, scale in (
                (hidden, weight, bias, softcap, logit_scale),
                (
                    teacher_hidden,
                    teacher_weight,
                    teacher_bias,
                    teacher_softcap,
                    teacher_logit_scale,
                ),
            )
        )
        difference = teacher_logprob - logprob
        advantage = difference.clamp(-advantage_clamp, advantage_clamp)
    return ReverseKLAdvantage(advantage, logprob, teacher_logprob)
