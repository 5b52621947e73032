"""Training: the policy loss of a linear head, forward and backward (3U)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Options, Provider, gemm_providers, measure, our_backends
from benchmarks.harness import parse_options as parse
from xopd_kernels import Backend, linear_policy_loss
from xopd_kernels.testing import Inputs, make_inputs


def providers(inputs: Inputs, backends: list[Backend]) -> Iterator[Provider]:
    """Everything that is compared. The advantage is 1: the loss is then the summed NLL.

    That is what F.linear_cross_entropy computes as well; each provider returns d_hidden.
    """
    hidden, weight, target = inputs.hidden, inputs.weight, inputs.target

    def d_hidden(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, (hidden, weight))[0]

    def eager() -> Tensor:
        logits = functional.linear(hidden, weight).float()
        return d_hidden(functional.cross_entropy(logits, target, reduction="sum"))

    yield from gemm_providers(hidden, weight)
    yield Provider("torch eager", eager)
    if hasattr(functional, "linear_cross_entropy"):  # torch >= 2.13

        def linear_cross_entropy() -> Tensor:
            loss = functional.linear_cross_entropy(
                hidden, weight, target, reduction="sum", ignore_index=-100
            )
            return d_hidden(loss)

        yield Provider("F.linear_cross_entropy", linear_cross_entropy)
    advantage = torch.ones(target.shape, device=target.device)
    for backend in backends:

        def ours(backend: Backend = backend) -> Tensor:
            loss = linear_policy_loss(
                hidden, weight, target, advantage=advantage, backend=backend
            ).loss
            return d_hidden(loss)

        yield Provider(f"ours-{backend.value}", ours)


def main(options: Options) -> None:
    """Measure every shape on every distribution."""
    backends = our_backends(options)
    for shape in options.shapes:
        for distribution in options.distributions:
            sizes = (shape.rows, shape.vocab_size, shape.dim)
            inputs = make_inputs(*sizes, options.dtype, distribution, str(options.device))
            measure(
                "linear_policy_loss", shape, distribution, [*providers(inputs, backends)], options
            )


if __name__ == "__main__":
    main(parse(__doc__ or ""))
