"""Liger-Kernel: its Triton functions, its scaled cross-entropy, and its chunked torch losses.

Those whose loss is a mean over the tokens that count are called as they are, and compared with the
gradient of the mean: a factor on the loss would cost them a pass over d_weight.
"""

import functools
from collections.abc import Iterator

from torch import Tensor

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
    clipped_loss,
    differentiated,
)

_OPS, _CHUNKED = "liger_kernel.ops", "liger_kernel.chunked_loss"
_NLL = (Job.SCORING, Job.POLICY_LOSS, Job.FROZEN_HEAD)
_LOSSES = (Job.POLICY_LOSS, Job.FROZEN_HEAD)
_DIVERGENCES = (Job.DIVERGENCE, Job.JSD)


def providers(job: Job, where: Where) -> Iterator[Provider]:
    """Each of Liger's ways to the job."""

    def one(
        name: str, module: str, needs: Needs, jobs: tuple[Job, ...], prepare: Prepare
    ) -> Provider:
        package = Package.of("liger-kernel", module)
        chosen, compiles = prepare if job in jobs else None, module.startswith(_CHUNKED)
        if job is Job.ADVANTAGE and Job.SCORING in jobs:
            chosen = advantage_of(prepare)
        is_mean = Job.SCORING not in jobs
        return package.provider(f"Liger {name}", where, needs, chosen, compiles, is_mean)

    ops = f"{_OPS}.fused_linear_cross_entropy"
    yield one("FLCE", ops, Needs.TRITON, _NLL, _cross_entropy)
    ops = f"{_OPS}.fused_linear_scaled_cross_entropy"
    yield one("scaled CE", ops, Needs.ANYTHING, _NLL, _scaled_cross_entropy)
    yield one("GRPO chunked", f"{_CHUNKED}.grpo_loss", Needs.ANYTHING, _LOSSES, _grpo)
    ops = f"{_OPS}.fused_linear_jsd"
    yield one("FLJSD", ops, Needs.TRITON, _DIVERGENCES, _fused_jsd)
    yield one("JSD chunked", f"{_CHUNKED}.jsd_loss", Needs.ANYTHING, _DIVERGENCES, _chunked_jsd)


def _cross_entropy(problem: Problem) -> Run:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    reduction = "none" if problem.job is Job.SCORING else "sum"
    # bias, class weights, ignore_index, z-loss, label smoothing, reduction
    options = (None, None, IGNORED, 0.0, 0.0, reduction)

    def run() -> Results:
        heads = (problem.hidden, problem.weight, problem.target)
        loss = LigerFusedLinearCrossEntropyFunction.apply(*heads, *options)[0]
        if problem.job is Job.SCORING:
            return {"logprob": -loss}
        return differentiated(problem, loss, {"loss": loss})

    return run


def _scaled_cross_entropy(problem: Problem) -> Run:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def run() -> Results:
        heads = (problem.hidden, problem.weight, problem.target)
        out = LigerFusedLinearScaledCrossEntropyFunction.apply(*heads, 1.0, IGNORED)
        logprob: Tensor = -(out if isinstance(out, Tensor) else out[0])
        loss = logprob.sum() if problem.job is Job.SCORING else clipped_loss(logprob, problem)
        return differentiated(problem, loss, {"logprob": logprob})

    return run


def _grpo(problem: Problem) -> Run:
    """Advantage 1; DAPO's loss is the mean over the tokens that count."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    rows, dim = problem.hidden.shape
    sequences = next(x for x in (8, 4, 2, 1) if rows % x == 0)
    loss_of = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    target = problem.target.clamp(min=0).view(sequences, -1)
    mask, advantage = problem.is_live.view(sequences, -1), problem.hidden.new_ones(sequences)

    def run() -> Results:
        hidden = problem.hidden.view(sequences, -1, dim)
        loss = loss_of(hidden, problem.weight, target, mask, advantage)[0]
        return differentiated(problem, loss, {})

    return run


def _fused_jsd(problem: Problem) -> Run:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def run() -> Results:
        heads = (problem.hidden, problem.weight, *problem.teacher())
        options = (problem.target, problem.job.beta, IGNORED, 1.0)
        loss = LigerFusedLinearJSDFunction.apply(*heads, *options)
        return differentiated(problem, loss, {})

    return run


def _chunked_jsd(problem: Problem) -> Run:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(0.0, 1.0, problem.job.beta, IGNORED)
    run_loss = functools.partial(loss_of, problem.hidden, problem.weight)

    def run() -> Results:
        loss = run_loss(*problem.teacher(), problem.target)
        return differentiated(problem, loss, {})

    return run
