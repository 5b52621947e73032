"""Scoring: per-token log-probs of a linear head, forward only (1U)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Options, Provider, gemm_providers, measure, our_backends
from benchmarks.harness import parse_options as parse
from xopd_kernels import Backend, linear_logprob
from xopd_kernels.testing import Inputs, make_inputs


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


def main(options: Options) -> None:
    """Measure every shape on every distribution."""
    backends = our_backends(options)
    for shape in options.shapes:
        for distribution in options.distributions:
            sizes = (shape.rows, shape.vocab_size, shape.dim)
            inputs = make_inputs(*sizes, options.dtype, distribution, str(options.device))
            with torch.no_grad():
                measure(
                    "linear_logprob", shape, distribution, [*providers(inputs, backends)], options
                )


if __name__ == "__main__":
    main(parse(__doc__ or ""))
