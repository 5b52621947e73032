"""The values that pass between the API, the operator schemas and the backends."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Transform(NamedTuple):
    """The scalars between the output of a linear head and its logits."""

    temperature: float  # > 0
    softcap: float | None  # > 0
    logit_scale: float  # finite

    def problem(self, prefix: str = "") -> str | None:
        """What is wrong with the scalars, as a sentence; None if nothing is.

        `prefix` is that of softcap and logit_scale among the arguments of the caller.
        """
        # Comparisons, because torch.compile does not trace math.isfinite of a symbolic float.
        if not 0.0 < self.temperature < math.inf:
            return f"temperature must be finite and > 0, got {self.temperature}"
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            return f"{prefix}softcap must be None or finite and > 0, got {self.softcap}"
        if not -math.inf < self.logit_scale < math.inf:
            return f"{prefix}logit_scale must be finite, got {self.logit_scale}"
        if self.softcap is not None:
            parts = (self.softcap / self.temperature, self.logit_scale / self.softcap)
            if not (1e-37 < parts[0] < 3e38 and -3e38 < parts[1] < 3e38):
                return (
                    f"{prefix}softcap / temperature and {prefix}logit_scale / {prefix}softcap must "
                    f"fit float32, got {self.softcap} / {self.temperature} and {self.logit_scale} "
                    f"/ {self.softcap}"
                )
        if not -3e38 < self.logit_scale / self.temperature < 3e38:
            return (
                f"{prefix}logit_scale / temperature must fit float32, got {self.logit_scale} / "
                f"{self.temperature}"
            )
        return None


class Head(NamedTuple):
    """A linear head and the transform that turns its output into logits.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`` with
    ``softcap(x) = c * tanh(x / c)``; the order is that of TRL and Liger.
    """

    weight: Tensor  # [V, D]; with vocab_group: this rank's contiguous shard of the rows
    bias: Tensor | None  # [V]
    temperature: float  # > 0
    softcap: float | None  # > 0
    logit_scale: float  # finite
    vocab_group: str  # name of the process group that shards the vocabulary; "" = not sharded

    @property
    def slope(self) -> float:
        """d(logit)/d(linear output) where the softcap is flat or absent."""
        return self.logit_scale / self.temperature

    @property
    def scale_and_cap(self) -> tuple[float, float | None]:
        """(a, c): the logit is a * x, or c * tanh(a * x) if c is not None."""
        if self.softcap is None:
            return self.slope, None
        return self.logit_scale / self.softcap, self.softcap / self.temperature

    def classes(self, count: int) -> "Head":
        """The head of the first `count` classes: what lies beyond is sliced away, never padded."""
        bias = None if self.bias is None else self.bias[:count]
        return self._replace(weight=self.weight[:count], bias=bias)


class LinearLogprob(NamedTuple):
    """Per-token statistics of softmax(logits); fp32 (fp64 for fp64 inputs), 0 where ignored."""

    logprob: Tensor  # [...] log-probability of the target, nat
    lse: Tensor  # [...] log-sum-exp of the transformed logits
    entropy: Tensor  # [...] nat; [0] unless needs_entropy


class PolicyLoss(NamedTuple):
    """The clipped policy loss and the per-token values it is made of; 0 where ignored."""

    loss: Tensor  # [] fp32 (fp64 for fp64 inputs); the only differentiable field
    logprob: Tensor  # [...] log-probability of the target, nat
    lse: Tensor  # [...] log-sum-exp of the transformed logits
    advantage: Tensor  # [...] as used: given, or clamp(teacher_logprob - logprob)
    ratio: Tensor  # [...] exp(logprob - old_logprob); 1 without old_logprob
    is_clipped: Tensor  # [...] bool: the clipped branch is strictly smaller, no gradient


class Sparsity(NamedTuple):
    """How much of the gradient of the logits a call may leave out; None in its place: nothing."""

    mode: str  # "sparse", or "unbiased": one of the classes left out is drawn for all of them
    max_error: float  # e: sum ||dz - dz'||_1 <= e * sum ||dz||_1
    seed: int  # of "unbiased"; 0 else

    @property
    def leaves_out(self) -> bool:
        """Whether anything may be left out: with e = 0 the gradient is that of "exact"."""
        return self.max_error > 0

    @property
    def is_unbiased(self) -> bool:
        """Whether a class is drawn for those that are left out."""
        return self.mode == "unbiased"


class Entries(NamedTuple):
    """Rows of d(logprob) / d(linear output) as lists, kept from forward to backward."""

    ids: Tensor  # [N, K] int64 classes, ascending; -1 pads the end
    # [N, K] fp32 (fp64 for fp64 inputs): s * (1[y] - p), at the target -s * expm1(logprob), with
    # s = d(logit) / d(linear output) of the class (scale, temperature, softcap); 0 where padded.
    derivative: Tensor
    is_dense: Tensor  # [N] bool: the row has no list (all -1), its logits are computed again
    dropped_mass: Tensor  # [N] fp32 probability of the classes left out; 0 where dense


class SparsePolicyLoss(NamedTuple):
    """PolicyLoss of a sparse gradient, and what the gradient lacks."""

    loss: Tensor  # [] fp32 (fp64 for fp64 inputs); the only differentiable field
    logprob: Tensor  # [...] log-probability of the target, nat
    lse: Tensor  # [...] log-sum-exp of the transformed logits
    advantage: Tensor  # [...] as used: given, or clamp(teacher_logprob - logprob)
    ratio: Tensor  # [...] exp(logprob - old_logprob); 1 without old_logprob
    is_clipped: Tensor  # [...] bool: the clipped branch is strictly smaller, no gradient
    dropped_mass: Tensor  # [...] fp32 probability of the classes without an entry in the gradient
    gradient_error: Tensor  # [] fp32 bound that was reached, <= max_gradient_error


class SparseLinearLogprob(NamedTuple):
    """LinearLogprob of a sparse gradient, and what the gradient lacks."""

    logprob: Tensor  # [...] log-probability of the target, nat; the only differentiable field
    lse: Tensor  # [...] log-sum-exp of the transformed logits
    entropy: Tensor  # [...] nat; [0] unless needs_entropy
    dropped_mass: Tensor  # [...] fp32 probability of the classes without an entry in the gradient
    gradient_error: Tensor  # [] fp32 bound of every row, <= max_gradient_error


class LinearDivergence(NamedTuple):
    """Per-token divergence of student and teacher; fp32 (fp64 for fp64 inputs), 0 where ignored."""

    divergence: Tensor  # [...] token_weight * divergence, nat; the only differentiable field
    lse: Tensor  # [...] log-sum-exp of the student's transformed logits
    teacher_lse: Tensor  # [...] of the teacher's; top-k: log of the mass that the ids hold


class SparseDivergence(NamedTuple):
    """LinearDivergence of a sparse gradient, and what the gradient lacks."""

    divergence: Tensor  # [...] token_weight * divergence, nat; the only differentiable field
    lse: Tensor  # [...] log-sum-exp of the student's transformed logits
    teacher_lse: Tensor  # [...] log of the mass that the ids hold
    dropped_mass: Tensor  # [...] fp32 probability of the classes without an entry in the gradient
    gradient_error: Tensor  # [] fp32 bound that was reached, <= max_gradient_error


class ReverseKLAdvantage(NamedTuple):
    """Per-token advantage of on-policy distillation; fp32, 0 where ignored, no gradient."""

    advantage: Tensor  # [...] clamp(teacher_logprob - logprob), nat
    logprob: Tensor  # [...] of the student
    teacher_logprob: Tensor  # [...]


class Teacher(NamedTuple):
    """The frozen side of a divergence."""

    hidden: Tensor  # [N, D_T]
    head: Head  # as many classes as the student's


# The least mass that a teacher's tail has. fp32 log-probs whose mass rounds to 1 would leave 0, and
# the reverse KL would be infinite for any student.
TAIL_FLOOR = 2.0**-24


class TopK(NamedTuple):
    """What a teacher hands out of its distribution."""

    ids: Tensor  # [N, K] int64, distinct in a row
    logprob: Tensor  # [N, K] nat
    has_tail: bool  # the other classes form one more class


class PolicyTerms(NamedTuple):
    """The per-token inputs [N] and the scalars of the policy loss."""

    teacher_logprob: Tensor | None  # exactly one of these two is given
    advantage: Tensor | None
    old_logprob: Tensor | None
    token_weight: Tensor | None
    clip_low: float
    clip_high: float
    advantage_clamp: float

    def map(self, change: Callable[[Tensor], Tensor]) -> "PolicyTerms":
        """The same terms with `change` applied to every tensor that is given."""

        def changed(value: Tensor | None) -> Tensor | None:
            return None if value is None else change(value)

        return self._replace(
            teacher_logprob=changed(self.teacher_logprob),
            advantage=changed(self.advantage),
            old_logprob=changed(self.old_logprob),
            token_weight=changed(self.token_weight),
        )


class Wanted(NamedTuple):
    """Which gradients somebody reads; the others cost nothing."""

    hidden: bool
    weight: bool
    bias: bool


class GradientSink(NamedTuple):
    """Where the gradients of a head go."""

    main_grad: Tensor | None = None  # [V, D] fp32: d_weight is added to it, chunk by chunk
    keeps_fp32: bool = False  # d_weight is handed out unrounded, in the dtype of the arithmetic


class HeadGradient(NamedTuple):
    """Gradients in the dtypes of their tensors; a [0] tensor where not wanted."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
