"""One implementation, and how those that are not installed say so."""

import enum
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_bench.problem import Problem, Results
from xopd_kernels.testing import BUDGET_FACTOR

Run = Callable[[], Results]
Prepare = Callable[[Problem], Run]


class Budget(NamedTuple):
    """The relative error that is allowed: factor * that of plain torch + slack + one rounding."""

    factor: float
    slack: float
    # What no row of d_hidden may be off by, however small it is; at least 1.05 x torch's worst row.
    row_error: float | None = None


# Ours is held to the error budget of the tests. Others may sum in another order or in fewer
# digits: that is a property, not a bug, and the table shows their error.
OUR_BUDGET, PEER_BUDGET = Budget(BUDGET_FACTOR, 0.0, 0.05), Budget(3.0, 1e-5)


@dataclass(frozen=True)
class Provider:
    """One implementation. `prepare` does what is not timed and returns what is."""

    name: str
    prepare: Prepare | None  # None: cannot run here
    absent: str = ""  # why not
    version: str = ""
    budget: Budget = PEER_BUDGET  # beyond it a result counts as wrong
    stand_in: Prepare | None = None  # probed instead, where each new shape costs a compilation
    is_floor: bool = False  # bare GEMMs: no results to verify, not ranked
    compiles: bool = False  # at its first pass of a shape, for many seconds
    is_interpreted: bool = False  # in Triton's interpreter: verified, and not timed
    is_mean: bool = False  # its loss is the mean over the tokens that count, not the sum


class Where(NamedTuple):
    """What a provider is asked for."""

    device: torch.device
    dtype: torch.dtype
    is_interpreted: bool  # on a CPU: Triton kernels run in the interpreter


class Needs(enum.Enum):
    """What code of others runs on."""

    ANYTHING = "anything"
    TRITON = "Triton kernels need a CUDA device; --smoke verifies them in the interpreter"
    CUDA = "needs a CUDA device"


class Package(NamedTuple):
    """A library that others make."""

    name: str  # of the distribution
    version: str  # "" if it is not installed
    absent: str  # why it cannot be used; "" if it can

    @classmethod
    def of(cls, name: str, *modules: str, bare: Sequence[str] = ()) -> "Package":
        """Import its modules, or say what is missing.

        `bare`: packages, outer ones first, that are entered without running their `__init__`.
        """
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return cls(name, "", f"not installed: pip install {name}")
        for package in bare:
            _enter(package)
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                # It is installed, and lacks something of its own: whatever it raises then.
                return cls(name, version, f"{module} does not load: {first_line(error)}")
        return cls(name, version, "")

    def provider(
        self,
        name: str,
        where: Where,
        needs: Needs,
        prepare: Prepare | None,
        compiles: bool = False,
        is_mean: bool = False,
    ) -> Provider:
        """The provider, or why there is none; `prepare` is None where it has no such job."""
        is_cuda = where.device.type == "cuda"
        reason = self.absent
        if not reason and prepare is None:
            reason = "computes no such thing"
        if not reason and not is_cuda:
            missing = needs is Needs.CUDA or (needs is Needs.TRITON and not where.is_interpreted)
            reason = needs.value if missing else ""
        interpreted = needs is Needs.TRITON and not is_cuda
        chosen = None if reason else prepare
        return Provider(
            name,
            chosen,
            reason,
            self.version,
            compiles=compiles,
            is_interpreted=interpreted,
            is_mean=is_mean,
        )


def _enter(package: str) -> None:
    """Make the modules of a package importable, and leave its `__init__` alone."""
    if package not in sys.modules and (spec := importlib.util.find_spec(package)) is not None:
        sys.modules[package] = importlib.util.module_from_spec(spec)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def advantage_of(scoring: Prepare) -> Prepare:
    """The advantage, made of two scorings of a library that has no function for it."""

    def prepare(problem: Problem) -> Run:
        student, teacher = (scoring(part) for part in problem.scorings())

        def run() -> Results:
            logprob, teacher_logprob = student()["logprob"], teacher()["logprob"]
            advantage = (teacher_logprob - logprob).clamp(-10.0, 10.0)
            return {"advantage": advantage, "logprob": logprob}

        return run

    return prepare


def differentiated(problem: Problem, loss: Tensor, values: Results) -> Results:
    """The values, and the gradients of the loss where the job has any."""
    results = {name: value.detach() for name, value in values.items()}
    if not problem.job.has_gradient:
        return results
    leaves = {"d_hidden": problem.hidden}
    if problem.job.has_d_weight:
        leaves["d_weight"] = problem.weight
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return results | dict(zip(leaves, gradients, strict=True))


def clipped_loss(logprob: Tensor, problem: Problem) -> Tensor:
    """The clipped policy loss with advantage 1, of log-probs that are their own old ones."""
    ratio = (logprob - logprob.detach()).exp()
    return -(torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * problem.is_live).sum()
