"""Who is compared: bare GEMMs, plain torch, torch.compile, F.linear_cross_entropy, TRL, ours.

Everything gets the same tensors and returns what it can compute of the same results. The policy
loss has advantage 1 and ratio 1: its gradient is then that of the summed negative log-likelihood,
which is all that F.linear_cross_entropy can compute.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cpu.problem import IGNORED, Job, Problem, Results
from xopd_kernels import Backend, linear_divergence, linear_logprob, linear_policy_loss
from xopd_kernels.backend import unavailable_reason
from xopd_kernels.testing import BUDGET_FACTOR

Run = Callable[[], Results]
Prepare = Callable[[Problem], Run]


class Budget(NamedTuple):
    """The relative error that is allowed: factor * that of plain torch + slack + one rounding."""

    factor: float
    slack: float


# Ours is held to the error budget of the tests. Others may sum in another order or in fewer
# digits: that is a property, not a bug, and the table shows their error.
OUR_BUDGET, PEER_BUDGET = Budget(BUDGET_FACTOR, 0.0), Budget(3.0, 1e-5)
_TRL_CHUNK = 32_768  # what TRL's trainers pass
GEMM, GEMM_FP32, EAGER = "torch.mm", "torch.mm fp32", "torch eager"
OURS = "ours "
REFERENCE, NATIVE = (f"{OURS}{x.value}" for x in (Backend.REFERENCE, Backend.NATIVE))


@dataclass(frozen=True)
class Provider:
    """One implementation. `prepare` does what is not timed and returns what is."""

    name: str
    prepare: Prepare | None  # None: cannot run here
    absent: str = ""  # why not
    budget: Budget = PEER_BUDGET  # beyond it a result counts as wrong
    stand_in: Prepare | None = None  # probed instead, where each new shape costs a compilation
    is_floor: bool = False  # bare GEMMs: no results to verify, not ranked


def providers(job: Job, dtype: torch.dtype) -> list[Provider]:
    """All of the job, also those that cannot run here, with the reason."""
    listed = [Provider(GEMM, functools.partial(_gemms, dtype), is_floor=True)]
    if dtype != torch.float32:
        fp32 = functools.partial(_gemms, torch.float32)
        listed.append(Provider(GEMM_FP32, fp32, is_floor=True))
    eager = functools.partial(_eager, _PLAIN[job])
    listed += [Provider(EAGER, eager), _compiled(job, eager)]
    listed += [_linear_cross_entropy(job, is_chunked) for is_chunked in (False, True)]
    listed.append(_trl(job))
    for backend in (Backend.REFERENCE, Backend.NATIVE):
        name = f"{OURS}{backend.value}"
        reason = unavailable_reason(backend, torch.device("cpu"), dtype)
        prepare = functools.partial(_ours, backend) if reason is None else None
        listed.append(Provider(name, prepare, reason or "", OUR_BUDGET))
    return listed


def _gemms(dtype: torch.dtype, problem: Problem) -> Run:
    """The GEMMs alone: the logits in one buffer, the gradients allocated anew as all others do.

    All tokens are multiplied, also the ignored ones. The teacher's GEMM reads the student's
    tensors, which have the same sizes.
    """
    hidden, weight = problem.hidden.detach().to(dtype), problem.weight.detach().to(dtype)
    logits = torch.empty(len(hidden), len(weight), dtype=dtype)

    def run() -> Results:
        torch.mm(hidden, weight.t(), out=logits)
        if problem.job is not Job.SCORING:
            torch.mm(logits, weight)
            torch.mm(logits.t(), hidden)
        if problem.job is Job.DIVERGENCE:
            torch.mm(hidden, weight.t(), out=logits)
        return {}

    return run


def plain_logprob(problem: Problem) -> tuple[Tensor, Results]:
    """Log-probs from materialised logits, as it is usually written."""
    logits = functional.linear(problem.hidden, problem.weight).float()
    column = problem.target.clamp(min=0)[:, None]
    logprob = logits.log_softmax(-1).gather(1, column).squeeze(1) * problem.is_live
    return logprob.sum(), {"logprob": logprob}


def plain_policy_loss(problem: Problem) -> tuple[Tensor, Results]:
    """The clipped policy loss of `plain_logprob`."""
    _, results = plain_logprob(problem)
    return _policy_loss(results["logprob"], problem), results


def plain_divergence(problem: Problem) -> tuple[Tensor, Results]:
    """The reverse KL from materialised logits of both models."""
    teacher_hidden, teacher_weight = problem.teacher()
    log_p = functional.linear(problem.hidden, problem.weight).float().log_softmax(-1)
    with torch.no_grad():
        log_q = functional.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    divergence = kl * problem.is_live
    return divergence.sum(), {"divergence": divergence}


Plain = Callable[[Problem], tuple[Tensor, Results]]
_PLAIN: dict[Job, Plain] = {
    Job.POLICY_LOSS: plain_policy_loss,
    Job.SCORING: plain_logprob,
    Job.DIVERGENCE: plain_divergence,
}


def _policy_loss(logprob: Tensor, problem: Problem) -> Tensor:
    ratio = (logprob - logprob.detach()).exp()
    return -(torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * problem.is_live).sum()


def _eager(function: Plain, problem: Problem) -> Run:
    return lambda: _differentiated(problem, *function(problem))


def _differentiated(problem: Problem, loss: Tensor, values: Results) -> Results:
    """The values, and the gradients of the loss where the job has any."""
    results = {name: value.detach() for name, value in values.items()}
    if problem.job is not Job.SCORING:
        gradients = torch.autograd.grad(loss, (problem.hidden, problem.weight))
        results["d_hidden"], results["d_weight"] = gradients
    return results


def _compiled(job: Job, eager: Prepare) -> Provider:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    name = "torch.compile"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return Provider(name, None, "needs a C++ compiler: install g++ or set CXX")
    function = torch.compile(_PLAIN[job], dynamic=False)
    return Provider(name, functools.partial(_eager, function), stand_in=eager)


def _linear_cross_entropy(job: Job, is_chunked: bool) -> Provider:
    name = f"F.linear_cross_entropy{' chunked' if is_chunked else ''}"
    if job is Job.DIVERGENCE:
        return Provider(name, None, "computes no divergence")
    if not hasattr(functional, "linear_cross_entropy"):
        return Provider(name, None, f"torch {torch.__version__} has none; it came with 2.13")
    options = torch.nn.LinearCrossEntropyOptions() if is_chunked else None
    reduction = "none" if job is Job.SCORING else "sum"

    def prepare(problem: Problem) -> Run:
        def run() -> Results:
            loss = functional.linear_cross_entropy(
                problem.hidden,
                problem.weight,
                problem.target,
                reduction=reduction,
                ignore_index=IGNORED,
                options=options,
            )
            if job is Job.SCORING:
                return {"logprob": -loss}
            return _differentiated(problem, loss, {"loss": loss})

        return run

    return Provider(name, prepare)


def _trl(job: Job) -> Provider:
    """TRL's chunked functions as its trainers call them on a CPU: every token is projected."""
    name = "TRL chunked"
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        return Provider(name, None, f"pip install 'trl>=1.16' ({error})")

    def logprob(problem: Problem) -> tuple[Tensor, Results]:
        target = problem.target.clamp(min=0)
        arguments = (problem.hidden, problem.weight, None, target, 1.0, _TRL_CHUNK, None, 1.0, ())
        out = ChunkedLogProbFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        value = out[0].masked_fill(~problem.is_live, 0.0)
        loss = value.sum() if job is Job.SCORING else _policy_loss(value, problem)
        return loss, {"logprob": value}

    def divergence(problem: Problem) -> tuple[Tensor, Results]:
        arguments = (problem.hidden, problem.weight, None, *problem.teacher(), None, 1.0)
        out = ChunkedDivergenceFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        value = out[0].masked_fill(~problem.is_live, 0.0)
        return value.sum(), {"divergence": value}

    function = divergence if job is Job.DIVERGENCE else logprob
    return Provider(name, functools.partial(_eager, function))


def _ours(backend: Backend, problem: Problem) -> Run:
    hidden, weight, target = problem.hidden, problem.weight, problem.target
    ones = torch.ones(target.shape)
    live = problem.is_live.float()

    def run() -> Results:
        if problem.job is Job.SCORING:
            return {"logprob": linear_logprob(hidden, weight, target, backend=backend).logprob}
        if problem.job is Job.POLICY_LOSS:
            out = linear_policy_loss(hidden, weight, target, advantage=ones, backend=backend)
            return _differentiated(problem, out.loss, {"logprob": out.logprob})
        teacher = problem.teacher()
        value = linear_divergence(
            hidden, weight, *teacher, beta=1.0, token_weight=live, backend=backend
        ).divergence
        return _differentiated(problem, value.sum(), {"divergence": value})

    return run
