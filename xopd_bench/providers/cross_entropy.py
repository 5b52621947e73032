"""Cut Cross-Entropy, QuACK and flash-linear-attention: the negative log-likelihood alone."""

import functools
from collections.abc import Iterator

from xopd_bench.cell import Job
from xopd_bench.problem import IGNORED, Problem, Results
from xopd_bench.providers.provider import (
    Needs,
    Package,
    Prepare,
    Provider,
    Run,
    Where,
    advantage_of,
    differentiated,
)

_LOSSES = (Job.POLICY_LOSS, Job.FROZEN_HEAD)


def providers(job: Job, where: Where) -> Iterator[Provider]:
    """Cut Cross-Entropy as it comes, which leaves small gradients out, and exact; QuACK; FLA."""
    cut = Package.of("cut-cross-entropy", "cut_cross_entropy")
    for name, is_filtered in (("CCE", True), ("CCE exact", False)):
        prepare: Prepare = functools.partial(_cut, is_filtered)
        chosen: Prepare | None = prepare if job in (*_LOSSES, Job.SCORING) else None
        if job is Job.ADVANTAGE:
            chosen = advantage_of(prepare)
        yield cut.provider(name, where, Needs.CUDA, chosen)
    summed: dict[str, tuple[Package, Needs, Prepare]] = {
        "QuACK": (
            Package.of("quack-kernels", "quack.linear_cross_entropy"),
            Needs.CUDA,
            _quack,
        ),
        "FLA": (
            Package.of("flash-linear-attention", "fla.modules.fused_linear_cross_entropy"),
            Needs.CUDA,
            _flash_linear_attention,
        ),
    }
    for name, (package, needs, prepare) in summed.items():
        yield package.provider(name, where, needs, prepare if job in _LOSSES else None)


def _cut(is_filtered: bool, problem: Problem) -> Run:
    from cut_cross_entropy import linear_cross_entropy

    call = linear_cross_entropy
    if not is_filtered:
        call = functools.partial(call, filter_eps=None)
    reduction = "none" if problem.job is Job.SCORING else "sum"

    def run() -> Results:
        loss = call(
            problem.hidden,
            problem.weight,
            problem.target,
            ignore_index=IGNORED,
            reduction=reduction,
        )
        if problem.job is Job.SCORING:
            return {"logprob": -loss}
        return differentiated(problem, loss, {"loss": loss})

    return run


def _quack(problem: Problem) -> Run:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run() -> Results:
        loss = chunked_linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.target,
            ignore_index=IGNORED,
            reduction="sum",
        )
        return differentiated(problem, loss, {"loss": loss})

    return run


def _flash_linear_attention(problem: Problem) -> Run:
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    module = FusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")

    def run() -> Results:
        loss = module(problem.hidden, problem.target, problem.weight)
        return differentiated(problem, loss, {"loss": loss})

    return run
