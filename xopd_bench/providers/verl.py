"""verl: its Triton kernel, and its chunked torch loop. Both project every token."""

from collections.abc import Iterator

from torch import Tensor

from xopd_bench.cell import Job
from xopd_bench.problem import Problem, Results
from xopd_bench.providers.provider import (
    Needs,
    Package,
    Prepare,
    Provider,
    Run,
    Where,
    advantage_of,
    clipped_loss,
    differentiated,
)

_JOBS = (Job.SCORING, Job.POLICY_LOSS, Job.FROZEN_HEAD)
# Their `__init__` needs ray and more; the functions that are compared need torch and Triton alone.
_BARE = ("verl", "verl.utils")
_KERNEL = ("verl.utils.kernel.linear_cross_entropy", "verl.utils.kernel.kernels")
_LOOP = ("verl.utils.experimental.torch_functional",)


def providers(job: Job, where: Where) -> Iterator[Provider]:
    """The two values of verl's `fused_kernel_options.impl_backend`."""
    both: tuple[tuple[str, tuple[str, ...], Needs, Prepare], ...] = (
        ("verl Triton", _KERNEL, Needs.CUDA, _kernel),
        ("verl chunked", _LOOP, Needs.ANYTHING, _loop),
    )
    for name, modules, needs, prepare in both:
        chosen: Prepare | None = prepare if job in _JOBS else None
        if job is Job.ADVANTAGE:
            chosen = advantage_of(prepare)
        package = Package.of("verl", *modules, bare=_BARE)
        yield package.provider(name, where, needs, chosen)


def _kernel(problem: Problem) -> Run:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    target = problem.target.clamp(min=0)

    def run() -> Results:
        out = linear_cross_entropy(problem.hidden, problem.weight, target, 1.0, "none", None)
        return _results(problem, out[0])

    return run


def _loop(problem: Problem) -> Run:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    module, target = FusedLinearForPPO(), problem.target.clamp(min=0)

    def run() -> Results:
        return _results(problem, module(problem.hidden, problem.weight, target, 1.0)[0])

    return run


def _results(problem: Problem, logprob: Tensor) -> Results:
    logprob = logprob.masked_fill(~problem.is_live, 0.0)
    loss = logprob.sum() if problem.job is Job.SCORING else clipped_loss(logprob, problem)
    return differentiated(problem, loss, {"logprob": logprob})
