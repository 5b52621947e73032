"""TRL's chunked functions as its trainers call them.

With Triton they project only the tokens that count; elsewhere all of them, since the number of
those that count would change the shapes with every batch.
"""

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

_CHUNK = 32_768  # what TRL's trainers pass


def providers(job: Job, where: Where) -> Iterator[Provider]:
    """One function for log-probs, one for divergences."""
    module, prepare = "trl.kernels", _PREPARE.get(job)
    if prepare is _divergence:
        module = "trl.kernels.chunked_divergence"  # this one needs TRL's trainers, and theirs
    package = Package.of("trl", module)
    yield package.provider("TRL chunked", where, Needs.ANYTHING, prepare)


def _logprob(problem: Problem) -> Run:
    from trl.kernels import ChunkedLogProbFunction

    def run() -> Results:
        hidden, target = _kept(problem, problem.hidden), _kept(problem, problem.target)
        arguments = (hidden, problem.weight, None, target.clamp(min=0), 1.0, _CHUNK, None, 1.0, ())
        value = _spread(problem, ChunkedLogProbFunction.apply(*arguments)[0])
        loss = value.sum() if problem.job is Job.SCORING else clipped_loss(value, problem)
        return differentiated(problem, loss, {"logprob": value})

    return run


def _divergence(problem: Problem) -> Run:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> Results:
        teacher_hidden, teacher_weight = problem.teacher()
        heads = (_kept(problem, problem.hidden), problem.weight, None)
        others = (_kept(problem, teacher_hidden), teacher_weight, None)
        out = ChunkedDivergenceFunction.apply(*heads, *others, problem.job.beta)
        value = _spread(problem, out[0])
        return differentiated(problem, value.sum(), {"divergence": value})

    return run


def _kept(problem: Problem, values: Tensor) -> Tensor:
    return values[problem.is_live] if values.is_cuda else values


def _spread(problem: Problem, values: Tensor) -> Tensor:
    if values.is_cuda:
        return values.new_zeros(len(problem.target)).masked_scatter(problem.is_live, values)
    return values.masked_fill(~problem.is_live, 0.0)


_PREPARE: dict[Job, Prepare] = {
    Job.SCORING: _logprob,
    Job.POLICY_LOSS: _logprob,
    Job.FROZEN_HEAD: _logprob,
    Job.ADVANTAGE: advantage_of(_logprob),
    Job.DIVERGENCE: _divergence,
    Job.JSD: _divergence,
}
