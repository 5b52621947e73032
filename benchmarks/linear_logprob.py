"""Scoring: per-token log-probs of a linear head, forward only (1U)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Options, Provider, gemm_providers, measure, our_backends
from benchmarks.harness import parse_options as parse
from xopd_kernels import Backend, linear_logprob
from xopd_kernels.records import Head, Wanted
from xopd_kernels.testing import Inputs, make_inputs
from xopd_kernels.workload import Operator, Workload


def providers(inputs: Inputs, backends: list[Backend]) -> Iterator[Provider]:
    """Everything that is compared, on the same inputs."""
    hidden, weight, target = inputs.hidden.detach(), inputs.weight.detach(), inputs.target

    def eager() -> Tensor:
        log_p = functional.linear(hidden, weight).float().log_softmax(-1)
        is_live = target != -100
        return log_p.gather(1, target.where(is_live, 0)[:, None]).squeeze(1) * is_live

    yield gemm_providers(hidden, weight)[0]
    yield Provider("torch eager", eager)
    for backend in backends:

        def ours(backend: Backend = backend) -> Tensor:
            return linear_logprob(hidden, weight, target, backend=backend).logprob

        yield Provider(f"ours-{backend.value}", ours)


def scoring_providers(inputs: Inputs) -> Iterator[Provider]:
    """The scoring variants, each forced (CUDA only)."""
    from xopd_kernels.chunk.call import Call
    from xopd_kernels.chunk.config import Scoring
    from xopd_kernels.chunk.device_rows import DeviceRows, RowStatistics
    from xopd_kernels.chunk.scoring import run_variant
    from xopd_kernels.chunk.triton import ChunkPipeline

    hidden, target = inputs.hidden.detach(), inputs.target
    weight = inputs.weight.detach()
    nothing = Wanted(hidden=False, weight=False, bias=False)
    work = Workload.of(Operator.LOGPROB, hidden, weight, nothing)
    call = Call.of(Head(weight, None, 1.0, None, 1.0, ""), work, Backend.TRITON, None)

    for scoring in Scoring:

        def score(scoring: Scoring = scoring) -> Tensor:
            live = DeviceRows.of(target != -100, call.step)
            pipeline = ChunkPipeline.of(call, target, live)
            rows = RowStatistics.zeros(pipeline.target_logit, has_entropy=False)
            for part, live_count in live.parts():
                chunk = pipeline.gather(hidden, part)
                partial = run_variant(scoring, pipeline, chunk, part, live_count, False)
                pipeline.run_statistics(partial, part, live_count, rows)
            return live.spread(rows.logprob)

        yield Provider(f"ours-triton-{scoring.value}", score)


def main(options: Options) -> None:
    """Measure every shape on every distribution."""
    backends = our_backends(options)
    for shape in options.shapes:
        for distribution in options.distributions:
            sizes = (shape.rows, shape.vocab_size, shape.dim)
            inputs = make_inputs(*sizes, options.dtype, distribution, str(options.device))
            compared = [*providers(inputs, backends)]
            if options.device.type == "cuda" and Backend.TRITON in backends:
                compared += scoring_providers(inputs)
            with torch.no_grad():
                measure("linear_logprob", shape, distribution, compared, options)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
