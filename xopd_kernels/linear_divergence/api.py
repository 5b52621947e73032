"""linear_divergence: forward KL, reverse KL or JSD of two linear heads, at 3U + 1U."""

from torch import Tensor

from xopd_kernels.backend import BackendChoice
from xopd_kernels.chunk.autograd import compute_ahead
from xopd_kernels.inputs import (
    check_pair,
    main_grad_to_add_ahead,
    prepare_head,
    prepare_options,
    refuse_shards,
    wanted_gradients,
)
from xopd_kernels.linear_divergence.op import linear_divergence_op, run
from xopd_kernels.records import LinearDivergence, Transform
from xopd_kernels.validation import check_beta, check_per_token


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    main_grad_ahead: bool = False,
    memory_budget_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> LinearDivergence:
    """Divergence of a student's and a teacher's distribution over the whole vocabulary.

    ``divergence_i = token_weight_i * D_i`` with p the student's and q the teacher's softmax, and
    ``D = KL(q || p)`` for beta 0, ``KL(p || q)`` for beta 1, else the generalised Jensen-Shannon
    divergence ``beta KL(q || m) + (1 - beta) KL(p || m)``, ``m = (1 - beta) p + beta q``
    (GKD, arXiv 2306.13649; as in Liger and TRL). Logits as in `linear_logprob`; no factor T^2.

    Args:
        hidden: [..., D] bf16, fp16, fp32 (fp64: Backend.REFERENCE only).
        weight: [V, D], dtype of hidden. An fp32 ``main_grad`` is used as in `linear_policy_loss`.
        teacher_hidden: [..., D_T], any of the dtypes (fp64 with fp64 alone).
        teacher_weight: [V_T, D_T], dtype of teacher_hidden. Classes beyond the smaller of V and
            V_T are sliced away: padding rows of a vocabulary hold no mass.
        beta: in [0, 1]; 0 is the forward KL, 1 (the default) the reverse KL: not the limits of the
            formula between, which are 0. A class of probability 0 in q alone makes the reverse KL
            inf and its gradient NaN. Near 0, fp32 gradients are off by about 3e-8 / beta.
        bias, teacher_bias: [V], [V_T].
        temperature: divides the logits of both.
        softcap, teacher_softcap, logit_scale, teacher_logit_scale: as in `linear_logprob`.
        token_weight: [...] carries mask, normaliser and loss scale; None: 1. A token of weight 0
            is taken out before the first GEMM and gives 0 in every field.
        main_grad_ahead: as in `linear_policy_loss`; every token's upstream gradient is 1 (a sum).
        memory_budget_bytes, backend: as in `linear_logprob`.

    Returns:
        LinearDivergence(divergence, lse, teacher_lse), [...] fp32 (fp64 for fp64 inputs).
        Only `divergence` has a gradient: to hidden, weight and bias; the teacher is a constant.

    Cost: 3U of the student and 1U of the teacher if the result is summed or, on a CPU, averaged
    (U = 2 N V D): the gradients of the sum are computed in the forward pass, held, and scaled in
    the backward pass. An upstream gradient that differs from token to token computes the logits
    again (once more 3U + 1U): put mask, 1/n and factors into token_weight, and call sum(). Without
    a trained weight that never happens: 2U + 1U. bf16 gradients are rounded in the forward pass,
    and once more if the upstream gradient is no power of two; fp16 ones wait in fp32.

    Numerics: fp32 logits; every class adds a term >= 0 to D, so that nothing cancels where p is
    close to q; fp32 accumulation of d_weight; bitwise repeatable.

    Raises:
        TypeError, ValueError: an input is wrong; nothing was computed.
        BackendUnavailableError: an explicit backend cannot run here.
        NotImplementedError: a weight is sharded over its vocabulary; else as `linear_policy_loss`.
        RuntimeError: the gradient is differentiated again; `main_grad_ahead` was promised wrongly.

    Example:
        >>> import torch
        >>> from xopd_kernels import linear_divergence
        >>> student, teacher = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 2)
        >>> out = linear_divergence(student, torch.zeros(8, 4), teacher, torch.zeros(9, 2))
        >>> out.divergence.sum().backward()
        >>> out.divergence.detach(), out.teacher_lse
        (tensor([0.]), tensor([2.0794]))
    """
    required = [
        ("hidden", hidden),
        ("weight", weight),
        ("teacher_hidden", teacher_hidden),
        ("teacher_weight", teacher_weight),
    ]
    per_token = [("token_weight", token_weight)]
    optional = [("bias", bias), ("teacher_bias", teacher_bias), *per_token]
    backend_name = prepare_options(required, optional, memory_budget_bytes, backend)
    check_beta(beta)
    own = Transform(temperature, softcap, logit_scale)
    other = Transform(temperature, teacher_softcap, teacher_logit_scale)
    student = prepare_head(hidden, weight, bias, own)
    teacher = prepare_head(teacher_hidden, teacher_weight, teacher_bias, other, prefix="teacher_")
    classes = check_pair(
        (hidden, weight, bias, own), (teacher_hidden, teacher_weight, teacher_bias, other)
    )
    refuse_shards([student, teacher], "linear_divergence")
    check_per_token(per_token, student.shape)
    student, teacher = student.first_classes(classes), teacher.first_classes(classes)
    tensors = (
        *student[:3],
        # Constants: without detach they would ask for a gradient that nobody computes.
        *(None if x is None else x.detach() for x in teacher[:3]),
        None if token_weight is None else token_weight.detach().reshape(-1),
    )
    caps = (student.scalars.temperature, student.scalars.softcap, teacher.scalars.softcap)
    scales = (student.scalars.logit_scale, teacher.scalars.logit_scale)
    scalars = (float(beta), *caps, *scales, memory_budget_bytes, backend_name)
    wanted = wanted_gradients(*student[:3])
    main_grad = main_grad_to_add_ahead(student, main_grad_ahead)
    if main_grad is not None:
        divergence, lse, teacher_lse = compute_ahead(run, tensors, scalars, wanted, main_grad)
    else:
        results = linear_divergence_op(*tensors, student.main_grad, *scalars, *wanted)
        divergence, lse, teacher_lse, _, _, _ = results
    shape = student.shape
    rows = (lse.detach().view(shape), teacher_lse.detach().view(shape))
    return LinearDivergence(divergence.view(shape), *rows)
