"""Small hostile cases of a linear head, and how far one rounding of their logits reaches."""

import dataclasses
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xopd_kernels.backend import Backend, resolve
from xopd_kernels.native_matmul import multiplies
from xopd_kernels.records import Head
from xopd_kernels.testing.dense import dense_logits, transform
from xopd_kernels.testing.inputs import Inputs

HUGE_LOGIT = 1e4
_ORACLE_NOISE = 1e-13  # what fp64 itself leaves of 1 - p and of sums, relative to the upstream


class Values(enum.Enum):
    """What the logits are like."""

    NORMAL = "normal"  # of the order of sqrt(D)
    HUGE = "huge"  # up to +-1e4, rounded by every GEMM: ill-conditioned
    EXACT = "exact"  # up to +-2e4, from products and sums that no dtype rounds


class Masked(enum.Enum):
    """Which rows carry ignore_index."""

    NONE = "none"
    SOME = "some"
    ALL = "all"


class Layout(enum.Enum):
    """How the elements of hidden and weight lie in memory."""

    CONTIGUOUS = "contiguous"
    TRANSPOSED = "transposed"  # column-major
    STRIDED = "strided"  # every second row and every third column of a wider tensor


class Targets(enum.Enum):
    """Which classes are asked for."""

    RANDOM = "random"
    ENDS = "ends"  # the first and the last class
    SAME = "same"  # one class for all rows


@dataclass(frozen=True)
class Case:
    """One call of an operator; its tensors depend on these fields alone."""

    rows: int
    vocab_size: int
    dim: int
    dtype: torch.dtype
    values: Values = Values.NORMAL
    layout: Layout = Layout.CONTIGUOUS
    masked: Masked = Masked.SOME
    targets: Targets = Targets.RANDOM
    has_bias: bool = True
    has_minus_inf: bool = False  # some bias entries, never all, are -inf
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    seed: int = 0

    def generator(self, offset: int = 0) -> torch.Generator:
        """The source of randomness of a part of the case."""
        return torch.Generator().manual_seed(self.seed * 16 + offset)

    def inputs(self) -> Inputs:
        """Leaves of the call."""
        rng = self.generator()
        hidden, weight, bias = _values(self, rng)
        if self.has_minus_inf and self.vocab_size > 1:
            gone = torch.rand(self.vocab_size, generator=rng) < 0.4
            gone[int(torch.randint(self.vocab_size, (), generator=rng))] = False
            bias = bias.masked_fill(gone, -torch.inf)
        leaves = (
            _laid_out(hidden.to(self.dtype), self.layout).requires_grad_(),
            _laid_out(weight.to(self.dtype), self.layout).requires_grad_(),
            bias.to(self.dtype).requires_grad_(),
        )
        return Inputs(*leaves, self._target(rng))

    def _target(self, rng: torch.Generator) -> Tensor:
        target = torch.randint(self.vocab_size, (self.rows,), generator=rng)
        if self.targets is Targets.SAME and self.rows:
            target[:] = int(target[0])
        if self.targets is Targets.ENDS:
            target = torch.where(target % 2 == 0, 0, self.vocab_size - 1)
        if self.masked is Masked.ALL:
            return torch.full_like(target, -100)
        if self.masked is Masked.SOME:
            target[torch.rand(self.rows, generator=rng) < 0.4] = -100
        return target

    def head(self, inputs: Inputs) -> Head:
        """The head of `inputs` with the scalars of the case."""
        bias = inputs.bias if self.has_bias else None
        scalars = (self.temperature, self.softcap, self.logit_scale)
        return Head(inputs.weight, bias, *scalars, "")

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype that the operators compute in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _values(case: Case, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (case.rows, case.dim), (case.vocab_size, case.dim), (case.vocab_size,)
    if case.values is Values.EXACT:
        hidden, weight, bias = (torch.randint(-4, 5, s, generator=rng).double() for s in sizes)
        return hidden, weight / 4, 4096.0 * bias + torch.randint(9, sizes[2], generator=rng)
    hidden, weight, bias = (torch.randn(s, generator=rng, dtype=torch.float64) for s in sizes)
    if case.values is Values.HUGE:
        largest = float((hidden @ weight.t()).abs().amax()) if case.rows else 1.0
        root = math.sqrt(HUGE_LOGIT / largest)
        return hidden * root, weight * root, bias
    return hidden, weight, bias


def _laid_out(values: Tensor, layout: Layout) -> Tensor:
    if layout is Layout.TRANSPOSED:
        return values.t().contiguous().t()
    if layout is Layout.STRIDED:
        wide = values.new_full((2 * len(values) + 1, 3 * values.shape[1] + 2), torch.nan)
        view = wide[1::2, 2::3][: len(values), : values.shape[1]]
        return view.copy_(values)
    return values


class Conditioning(NamedTuple):
    """What one rounding of every logit does to the results of a case, as 2-norms."""

    logit: float  # largest absolute error of a logit, nat
    hidden: float
    weight: float
    bias: float

    @classmethod
    def of(
        cls, case: Case, exact: Inputs, parts: Callable[[Tensor], list[Tensor]]
    ) -> "Conditioning":
        """From the terms whose sum the gradients belong to: functions of the logits [N, V].

        The gradients of the terms are added up without their signs, because a rounded softmax
        moves each of them, also where they cancel.
        """
        head = case.head(exact)
        linear = functional.linear(exact.hidden, exact.weight, head.bias).detach()
        linear.requires_grad_()
        logits = transform(linear, head)
        (slope,) = torch.autograd.grad(logits.sum(), linear, retain_graph=True)
        slope = slope.abs()
        size = functional.linear(exact.hidden.abs(), exact.weight.abs()).detach()
        if head.bias is not None:
            size = size + head.bias.detach().abs().nan_to_num(posinf=0.0)
        eps = torch.finfo(case.arithmetic).eps
        logit = eps * (2.0 + _amplitude(case, logits, size * slope))
        # The slope of a softcap moves by its own logarithmic derivative.
        bend = 0.0 if case.softcap is None else 2.0 * eps * abs(case.logit_scale) / case.softcap
        # 1 - p of the target is known as well as p is.
        noise = torch.full_like(slope, _ORACLE_NOISE)
        noise.scatter_(1, exact.target.clamp(min=0)[:, None], max(eps, _ORACLE_NOISE))
        moved = torch.zeros_like(slope)
        for part in parts(logits):
            (grad,) = torch.autograd.grad(part.sum(), linear, retain_graph=True)
            moved += (logit + bend * size) * grad.abs() + noise * slope
        hidden = moved @ exact.weight.detach().abs()
        weight = moved.t() @ exact.hidden.detach().abs()
        return cls(logit, *(float(x.norm()) for x in (hidden, weight, moved.sum(0))))


def _amplitude(case: Case, logits: Tensor, sums: Tensor) -> float:
    """The largest sum of magnitudes that a logit is made of; 0 if no logit is rounded."""
    if not logits.numel() or (case.values is Values.EXACT and case.softcap is None):
        return 0.0
    amplitude = logits.detach().nan_to_num(posinf=0.0, neginf=0.0).abs()
    return float((amplitude if case.values is Values.EXACT else amplitude + sums).amax())


class Teacher(NamedTuple):
    """The other head of a case: other D and V, the same scalars, no class the student lacks."""

    case: Case
    inputs: Inputs

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> "Teacher":
        """The teacher of a student's case and its inputs."""
        is_gone = inputs.bias.detach() == -torch.inf
        classes = max(1, case.vocab_size + (0, 5, -3)[case.seed % 3])
        if case.has_minus_inf and bool(is_gone[:classes].all()):
            classes = case.vocab_size
        other = dataclasses.replace(
            case,
            dim=case.dim + 2,
            vocab_size=classes,
            has_minus_inf=False,
            layout=Layout.CONTIGUOUS,
            seed=case.seed + 1,
        )
        leaves = other.inputs()
        if case.has_minus_inf:
            bias, shared = leaves.bias.detach().clone(), is_gone[:classes]
            bias[: len(shared)][shared] = -torch.inf
            leaves = leaves._replace(bias=bias)
        return cls(other, leaves)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """[N, V_T] in fp64, or as plain torch computes them from the tensors given."""
        inputs = self.inputs.to(torch.float64) if dtype == torch.float64 else self.inputs
        return dense_logits(inputs.hidden, self.case.head(inputs)).detach()

    def rounding(self) -> float:
        """Largest error of a logit."""
        return Conditioning.of(self.case, self.inputs.to(torch.float64), lambda _: []).logit

    def options(self) -> dict[str, Tensor | float | None]:
        """The keywords of an operator that belong to the teacher's head."""
        head = self.case.head(self.inputs)
        names = {"teacher_bias": head.bias, "teacher_softcap": head.softcap}
        return names | {"teacher_logit_scale": head.logit_scale}


def outcome_reach(log_s: Tensor, log_t: Tensor, divergence: Tensor) -> Tensor:
    """What moves in the gradient of a divergence if p and q are rounded, for each outcome.

    p * (log p - log q - D) and q - p: the terms, without the signs with which they may cancel.
    """
    gap = torch.nan_to_num(log_s - log_t, posinf=0.0, neginf=0.0).abs()
    return (log_s.exp() + log_t.exp()) * (1 + gap) + log_s.exp() * divergence.abs()[:, None]


def smallest_memory_budget(call: Callable[..., object]) -> int:
    """The least memory_budget_bytes that `call` accepts: its errors name it, head by head."""
    least, lead = 1, "memory_budget_bytes must be at least "
    while True:
        try:
            call(memory_budget_bytes=least)
        except ValueError as error:
            least = int(str(error).split(lead)[1].split()[0])
        else:
            return least


def rounding_of_factors(dtype: torch.dtype, dim: int, backend: str = "auto") -> float:
    """Relative error of each entry of d_logit as a factor of the two gradient GEMMs on the CPU.

    2^-9 where those take bf16 (Backend.NATIVE with bf16 dot products), else 0.
    """
    is_native = resolve(backend, torch.device("cpu"), dtype) is Backend.NATIVE
    return 2.0**-9 if is_native and multiplies(dtype, dim) else 0.0
