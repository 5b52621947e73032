"""Ours, by backend."""

import functools
from collections.abc import Iterator

import torch

from xopd_bench.cell import Job
from xopd_bench.problem import IGNORED, Problem, Results
from xopd_bench.providers.provider import OUR_BUDGET, Provider, Run, Where, differentiated
from xopd_kernels import (
    Backend,
    __version__,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    reverse_kl_advantage,
)
from xopd_kernels.backend import unavailable_reason

PREFIX = "ours "
REFERENCE, TRITON, NATIVE = (
    f"{PREFIX}{x.value}" for x in (Backend.REFERENCE, Backend.TRITON, Backend.NATIVE)
)


def providers(job: Job, where: Where) -> Iterator[Provider]:
    """Every backend; those that cannot run here with the reason."""
    for backend in Backend:
        reason = unavailable_reason(backend, where.device, where.dtype)
        interpreted = backend is Backend.TRITON and where.device.type != "cuda"
        if interpreted and not where.is_interpreted:
            reason = "needs a CUDA device; --smoke verifies it in the interpreter"
        prepare = functools.partial(_ours, backend) if reason is None else None
        yield Provider(
            f"{PREFIX}{backend.value}",
            prepare,
            reason or "",
            __version__,
            OUR_BUDGET,
            is_interpreted=interpreted,
        )


def _ours(backend: Backend, problem: Problem) -> Run:
    live = problem.is_live.float()
    ones = torch.ones_like(live)

    def run() -> Results:
        return _called(backend, problem, live, ones)

    return run


def _called(backend: Backend, problem: Problem, live: torch.Tensor, ones: torch.Tensor) -> Results:
    hidden, weight, target, job = problem.hidden, problem.weight, problem.target, problem.job
    if job is Job.SCORING:
        return {"logprob": linear_logprob(hidden, weight, target, backend=backend).logprob}
    if job is Job.ADVANTAGE:
        both = reverse_kl_advantage(
            hidden, weight, *problem.teacher(), target, ignore_index=IGNORED, backend=backend
        )
        return {"advantage": both.advantage, "logprob": both.logprob}
    if job in (Job.POLICY_LOSS, Job.FROZEN_HEAD):
        out = linear_policy_loss(hidden, weight, target, advantage=ones, backend=backend)
        return differentiated(problem, out.loss, {"logprob": out.logprob})
    if job is Job.TOPK_DIVERGENCE:
        value = linear_topk_divergence(
            hidden, weight, *problem.top_k(), token_weight=live, backend=backend
        ).divergence
    else:
        value = linear_divergence(
            hidden,
            weight,
            *problem.teacher(),
            beta=job.beta,
            token_weight=live,
            backend=backend,
        ).divergence
    return differentiated(problem, value.sum(), {"divergence": value})
