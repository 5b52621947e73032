"""Distillation over the whole vocabulary: two heads, forward and backward (3U + 1U)."""

import json
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Options, Provider, Shape, gemm_providers, measure, our_backends
from benchmarks.harness import parse_options as parse
from xopd_kernels import Backend, linear_divergence
from xopd_kernels.testing import Distribution, Inputs, make_inputs

BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
# Eager torch holds some ten [N, V] fp32 tensors; more logits than this do not fit 80 GB.
EAGER_LOGITS = 1_300_000_000


def eager_divergence(student: Inputs, teacher: Inputs, beta: float) -> Tensor:
    """The divergence in plain torch, with all logits."""
    log_p = functional.linear(student.hidden, student.weight).float().log_softmax(-1)
    with torch.no_grad():
        log_q = functional.linear(teacher.hidden, teacher.weight).float().log_softmax(-1)
    if beta == 0:
        return functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if beta == 1:
        return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    of_teacher = functional.kl_div(log_m, log_q, reduction="sum", log_target=True)
    of_student = functional.kl_div(log_m, log_p, reduction="sum", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


def providers(
    student: Inputs, teacher: Inputs, beta: float, backends: list[Backend]
) -> Iterator[Provider]:
    """Everything that is compared on the same inputs; each returns d_hidden."""
    hidden, weight = student.hidden, student.weight
    three = gemm_providers(hidden, weight)[1]
    one = gemm_providers(teacher.hidden, teacher.weight)[0]

    def four() -> None:
        three.run()
        one.run()

    yield Provider("torch.mm x4", four)
    if len(hidden) * len(weight) <= EAGER_LOGITS:

        def eager() -> Tensor:
            loss = eager_divergence(student, teacher, beta)
            return torch.autograd.grad(loss, (hidden, weight))[0]

        yield Provider("torch eager", eager)
    else:
        print(json.dumps({"skipped": "torch eager", "reason": "its logits do not fit"}))
    teacher_side = (teacher.hidden.detach(), teacher.weight.detach())
    for backend in backends:

        def ours(backend: Backend = backend) -> Tensor:
            out = linear_divergence(hidden, weight, *teacher_side, beta=beta, backend=backend)
            return torch.autograd.grad(out.divergence.sum(), (hidden, weight))[0]

        yield Provider(f"ours-{backend.value}", ours)


def measure_shape(
    shape: Shape, distribution: Distribution, backends: list[Backend], options: Options
) -> None:
    """Measure the three divergences of one shape; the teacher has the student's sizes."""
    sizes = (shape.rows, shape.vocab_size, shape.dim)
    student, teacher = (
        make_inputs(*sizes, options.dtype, distribution, str(options.device), seed=seed)
        for seed in (0, 1)
    )
    for name, beta in BETAS.items():
        listed = [*providers(student, teacher, beta, backends)]
        measure(f"linear_divergence_{name}", shape, distribution, listed, options)


def main(options: Options) -> None:
    """Measure every shape on every distribution."""
    backends = our_backends(options)
    for shape in options.shapes:
        for distribution in options.distributions:
            measure_shape(shape, distribution, backends, options)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
