"""torch alone: the bare GEMMs, which are the limit, eager, compiled, and F.linear_cross_entropy."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from xopd_bench.cell import Job
from xopd_bench.problem import IGNORED, Problem, Results
from xopd_bench.providers.provider import (
    Prepare,
    Provider,
    Run,
    Where,
    advantage_of,
    clipped_loss,
    differentiated,
)

GEMM, GEMM_FP32 = "torch.mm", "torch.mm fp32"
EAGER, EAGER_FP32 = "torch eager", "torch eager, fp32 inside"

Plain = Callable[[Problem], tuple[Tensor, Results]]


def providers(job: Job, where: Where) -> Iterator[Provider]:
    """Everything that torch can do by itself."""
    version = torch.__version__
    yield Provider(GEMM, functools.partial(_gemms, where.dtype), "", version, is_floor=True)
    if where.dtype != torch.float32 and where.device.type == "cpu":
        # Without instructions for bf16 its GEMMs are no limit; those in fp32 are.
        fp32 = functools.partial(_gemms, torch.float32)
        yield Provider(GEMM_FP32, fp32, "", version, is_floor=True)
    eager = functools.partial(_eager, _PLAIN[job])
    yield Provider(EAGER, eager, "", version)
    if where.dtype != torch.float32 and where.device.type == "cpu":
        yield Provider(EAGER_FP32, functools.partial(_eager_fp32, _PLAIN[job]), "", version)
    yield _compiled(job, where, eager)
    for is_chunked in (False, True):
        yield _linear_cross_entropy(job, is_chunked)


def _gemms(dtype: torch.dtype, problem: Problem) -> Run:
    """The GEMMs alone: the logits in one buffer, the gradients allocated anew as all others do.

    All tokens are multiplied, also the ignored ones. The teacher's GEMM reads the student's
    tensors, which have the same sizes.
    """
    hidden, weight = problem.hidden.detach().to(dtype), problem.weight.detach().to(dtype)
    logits = hidden.new_empty(len(hidden), len(weight))
    job = problem.job

    def run() -> Results:
        torch.mm(hidden, weight.t(), out=logits)
        if job.has_gradient:
            torch.mm(logits, weight)
        if job.has_d_weight:
            torch.mm(logits.t(), hidden)
        if job.has_teacher:
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
    return clipped_loss(results["logprob"], problem), results


def plain_divergence(problem: Problem) -> tuple[Tensor, Results]:
    """The reverse KL, or the Jensen-Shannon divergence, from materialised logits of both models."""
    teacher_hidden, teacher_weight = problem.teacher()
    log_p = functional.linear(problem.hidden, problem.weight).float().log_softmax(-1)
    with torch.no_grad():
        log_q = functional.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    kl = functools.partial(functional.kl_div, reduction="none", log_target=True)
    if problem.job is Job.JSD:
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453  # log 2
        per_class = (kl(log_m, log_p) + kl(log_m, log_q)) / 2
    else:
        per_class = kl(log_q, log_p)
    divergence = per_class.sum(-1) * problem.is_live
    return divergence.sum(), {"divergence": divergence}


def plain_topk_divergence(problem: Problem) -> tuple[Tensor, Results]:
    """The reverse KL over the teacher's likeliest classes and one bucket of all others."""
    ids, log_q = problem.top_k()
    log_p = functional.linear(problem.hidden, problem.weight).float().log_softmax(-1)
    top = log_p.gather(1, ids)
    # 1 - sum of the top would lose the digits of a small rest; of the teacher there is no more.
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    teacher_rest = 1.0 - log_q.double().exp().sum(-1, keepdim=True)
    teacher_rest = teacher_rest.clamp(min=2.0**-24).log().float()
    pairs = ((top, log_q), (rest, teacher_rest))
    divergence = sum((p.exp() * (p - q)).sum(-1) for p, q in pairs) * problem.is_live
    return divergence.sum(), {"divergence": divergence}


def plain_advantage(problem: Problem) -> tuple[Tensor, Results]:
    """log q(y) - log p(y), clamped, from materialised logits of both models."""
    loss, results = plain_logprob(problem)
    teacher_hidden, teacher_weight = problem.teacher()
    logits = functional.linear(teacher_hidden, teacher_weight).float()
    column = problem.target.clamp(min=0)[:, None]
    teacher = logits.log_softmax(-1).gather(1, column).squeeze(1) * problem.is_live
    results["advantage"] = (teacher - results["logprob"]).clamp(-10.0, 10.0)
    return loss, results


_PLAIN: dict[Job, Plain] = {
    Job.SCORING: plain_logprob,
    Job.POLICY_LOSS: plain_policy_loss,
    Job.FROZEN_HEAD: plain_policy_loss,
    Job.DIVERGENCE: plain_divergence,
    Job.JSD: plain_divergence,
    Job.TOPK_DIVERGENCE: plain_topk_divergence,
    Job.ADVANTAGE: plain_advantage,
}


def _eager(function: Plain, problem: Problem) -> Run:
    return lambda: differentiated(problem, *function(problem))


def _eager_fp32(function: Plain, problem: Problem) -> Run:
    """What one writes where narrow GEMMs are slow: fp32 copies, and gradients rounded at last."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float()

    def run() -> Results:
        copies = dataclasses.replace(
            problem,
            hidden=problem.hidden.float(),
            weight=problem.weight.float(),
            teacher_hidden=wide(problem.teacher_hidden),
            teacher_weight=wide(problem.teacher_weight),
        )
        return differentiated(problem, *function(copies))

    return run


def _compiled(job: Job, where: Where, eager: Prepare) -> Provider:
    name, version = "torch.compile", torch.__version__
    if where.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            absent = "needs a C++ compiler: install g++ or set CXX"
            return Provider(name, None, absent, version)
    # The whole graph: where it gave up after some shapes, it would silently be eager torch.
    function = torch.compile(_PLAIN[job], dynamic=False, fullgraph=True)
    prepare = functools.partial(_eager, function)
    return Provider(name, prepare, "", version, stand_in=eager, compiles=True)


def _linear_cross_entropy(job: Job, is_chunked: bool) -> Provider:
    name, version = f"F.linear_cross_entropy{' chunked' if is_chunked else ''}", torch.__version__
    if job not in (Job.SCORING, Job.POLICY_LOSS, Job.FROZEN_HEAD, Job.ADVANTAGE):
        return Provider(name, None, "computes no such thing", version)
    if not hasattr(functional, "linear_cross_entropy"):
        return Provider(name, None, f"torch {version} has none; it came with 2.13", version)
    options = torch.nn.LinearCrossEntropyOptions() if is_chunked else None

    def prepare(problem: Problem) -> Run:
        reduction = "none" if problem.job is Job.SCORING else "sum"

        def run() -> Results:
            loss = functional.linear_cross_entropy(
                problem.hidden,
                problem.weight,
                problem.target,
                reduction=reduction,
                ignore_index=IGNORED,
                options=options,
            )
            if problem.job is Job.SCORING:
                return {"logprob": -loss}
            return differentiated(problem, loss, {"loss": loss})

        return run

    chosen = advantage_of(prepare) if job is Job.ADVANTAGE else prepare
    return Provider(name, chosen, "", version)
