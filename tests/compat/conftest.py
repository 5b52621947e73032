"""How a face is held to its peer: both against fp64, gradients included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from xopd_kernels.testing import BUDGET_FACTOR

# Relative error that is allowed on top of the peer's. bf16: one rounding of the result. fp32: the
# tolerance of torch.testing, because a ratio exp(logprob - old) carries the rounding of its
# log-probs, here and in the peer alike.
BAND = {torch.bfloat16: 2**-7, torch.float32: 1.3e-6}

Outputs = Tensor | Sequence[Tensor | None]


def tensors(result: Outputs) -> list[Tensor]:
    """The tensors of a result, nested or not."""
    if isinstance(result, Tensor):
        return [result]
    return [x for item in result if item is not None for x in tensors(item)]


def results(call: Callable[..., Outputs], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of ``call(*leaves)`` and the gradients of a fixed mixture of those that have one."""
    outputs = tensors(call(*leaves))
    rng = torch.Generator().manual_seed(7)
    mixed = [
        (out.double() * torch.rand(out.shape, generator=rng).add(0.5).to(out.device)).sum()
        for out in outputs
        if out.requires_grad
    ]
    grads = torch.autograd.grad(sum(mixed), [x for x in leaves if x.requires_grad])
    return [*outputs, *grads]


def assert_no_worse(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """AssertionError unless our error against fp64 is within the peer's and a rounding band."""
    assert ours.shape == theirs.shape == truth.shape, name
    truth = truth.detach()
    error = (ours.detach().double() - truth).norm().item()
    allowed = BUDGET_FACTOR * (theirs.detach().double() - truth).norm().item()
    allowed += BAND[ours.dtype] * truth.norm().item()
    assert error <= allowed, f"{name}: error {error:.3e} against fp64, allowed {allowed:.3e}"


@pytest.fixture
def check_face() -> Callable[..., None]:
    """``check(face, peer, dense, leaves)``: `assert_no_worse`, tensor by tensor.

    `face` and `peer` get the leaves, `dense`, a plain formula, gets them in fp64. Without a peer
    the baseline is `dense` in the dtype of the leaves.
    """

    def check(
        face: Callable[..., Outputs],
        peer: Callable[..., Outputs] | None,
        dense: Callable[..., Outputs],
        leaves: Sequence[Tensor],
    ) -> None:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
        oracle = results(dense, wide)
        actual = results(face, leaves)
        baseline = results(dense if peer is None else peer, leaves)
        assert len(actual) == len(baseline) == len(oracle)
        for number, (ours, theirs, truth) in enumerate(zip(actual, baseline, oracle, strict=True)):
            if peer is not None:
                assert ours.dtype == theirs.dtype, f"result {number}"
            assert_no_worse(f"result {number}", ours, theirs, truth)

    return check


@pytest.fixture(scope="session")
def verl_module() -> Callable[[str], ModuleType]:
    """A file of verl as a module: `import verl` needs ray and more, the files used torch alone."""

    def load(file: str) -> ModuleType:
        package = importlib.util.find_spec("verl")
        if package is None or not package.submodule_search_locations:
            pytest.skip("verl is not installed; pip install --no-deps verl is enough")
        path = Path(package.submodule_search_locations[0]) / file
        spec = importlib.util.spec_from_file_location(f"verl_{path.stem}", path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
