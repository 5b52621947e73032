"""A vocabulary sharded over gloo ranks gives the values and gradients of the whole one.

Four processes, since starting them is what takes time: first they share one vocabulary, then each
pair shares one, as in a mesh of data and tensor parallelism. This file is also their script: a
spawned function would be looked up by the module's name, and other packages ship a `tests`, too.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from xopd_kernels import (
    Backend,
    Operator,
    Workload,
    linear_logprob,
    linear_policy_loss,
    memory_plan,
)
from xopd_kernels.memory import Panel
from xopd_kernels.native_matmul import multiplies
from xopd_kernels.testing import Inputs, Terms, assert_within_budget, make_inputs, make_terms

SHAPE = (37, 53, 11)  # N, V, D; neither 2 nor 4 divide V
EVEN_DIM = 12  # whole pairs: bf16 products of NATIVE
WORLD_SIZE = 4
SPLITS = {2: (20, 33), 4: (20, 5, 1, 27)}  # classes of each rank of a group: uneven
KEPT_SPLITS = {2: (2000, 333), 4: (700, 2000, 1, 333)}
KEPT_BUDGET = 1_900_000  # holds 128 rows at a time, and fewer beside their logits
VALUES = ("logprob", "lse", "entropy", "loss", "logprob", "lse", "advantage", "ratio", "clipped")
LEAVES = ("hidden", "weight", "bias")
DEAD_ROWS = slice(5, 15)  # no advantage: left out of the two GEMMs of the gradient


class Setting(NamedTuple):
    """What a call runs on."""

    group: ProcessGroup | None
    backend: Backend
    budget: int  # memory_budget_bytes

    def several_chunks(self, dtype: torch.dtype, dim: int) -> "Setting":
        """With a budget that makes several chunks of the rows; checked for the widest shard."""
        wide = dtype == torch.float64
        budget = {Backend.TRITON: 6144, Backend.NATIVE: 4096}.get(self.backend, 8192 << wide)
        if self.backend is Backend.NATIVE and multiplies(dtype, dim):
            budget = 20_000  # packed in whole blocks
        widest = max(SPLITS[dist.get_world_size(self.group)])
        work = Workload(Operator.POLICY_LOSS, SHAPE[0], widest, dim, dtype)
        assert 1 < memory_plan(work, self.backend, budget).chunk_rows < SHAPE[0]
        return self._replace(budget=budget)

    def classes(self) -> slice:
        """Those of this rank."""
        sizes, rank = SPLITS[dist.get_world_size(self.group)], dist.get_rank(self.group)
        begin = sum(sizes[:rank])
        return slice(begin, begin + sizes[rank])


def compute(inputs: Inputs, terms: Terms, setting: Setting) -> list[Tensor]:
    """Values of both operators, then the gradients of each by hidden, weight and bias."""
    group, backend, budget = setting
    common = {
        "bias": inputs.bias,
        "vocab_group": group,
        "backend": backend,
        "memory_budget_bytes": budget,
    }
    softcap = 4.0  # shards of the slope as well as of the logits
    rows = linear_logprob(*inputs[:2], inputs.target, needs_entropy=True, softcap=softcap, **common)
    loss = rows.logprob.sum() + 0.5 * rows.entropy.sum() - 0.1 * rows.lse.sum()
    advantage = terms.teacher_logprob.clone()
    advantage[DEAD_ROWS] = 0.0
    policy = linear_policy_loss(
        *inputs[:2],
        inputs.target,
        advantage=advantage,
        old_logprob=terms.old_logprob,
        token_weight=terms.token_weight,
        temperature=1.3,
        **common,
    )
    assert policy.is_clipped.any()
    gradients = [torch.autograd.grad(x, inputs[:3]) for x in (loss, policy.loss)]
    values = (x.detach() for x in (*rows, *policy))
    return [*values, *gradients[0], *gradients[1]]


def own_part(inputs: Inputs, classes: slice) -> Inputs:
    """Leaves of this rank: hidden as it is, its classes of weight and bias."""
    parts = (inputs.hidden, inputs.weight[classes], inputs.bias[classes])
    leaves = (x.detach().clone().requires_grad_() for x in parts)
    return Inputs(*leaves, inputs.target)


def own_results(whole: list[Tensor], classes: slice) -> list[Tensor]:
    """What this rank should get where one process gets `whole`."""
    values, gradients = whole[: len(VALUES)], whole[len(VALUES) :]
    cut = [x if i % 3 == 0 else x[classes] for i, x in enumerate(gradients)]
    return [*values, *cut]


def check_operators(dtype: torch.dtype, setting: Setting, dim: int = SHAPE[2]) -> None:
    """Sharded against whole: to the last digits in fp64, else within the error budget."""
    setting, classes = setting.several_chunks(dtype, dim), setting.classes()
    inputs = make_inputs(*SHAPE[:2], dim, dtype)
    terms = make_terms(linear_logprob(*inputs[:2], inputs.target).logprob)
    actual = compute(own_part(inputs, classes), terms, setting)
    whole = own_results(compute(inputs, terms, setting._replace(group=None)), classes)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, whole, rtol=1e-11, atol=1e-12)
        return
    alone = Setting(None, Backend.REFERENCE, 2**20)
    oracle = own_results(compute(inputs.to(torch.float64), terms, alone), classes)
    names = (*VALUES, *LEAVES, *LEAVES)
    for name, value, baseline, truth in zip(names, actual, whole, oracle, strict=True):
        if value.dtype == torch.bool:
            assert torch.equal(value, truth)
        elif value.shape[:1] == (1,) and name != "hidden":
            # A shard of one class: too few roundings for a norm to average.
            torch.testing.assert_close(value, baseline, rtol=1e-2, atol=1e-2)
        else:
            assert_within_budget(name, value, baseline, truth)


def check_kept_gradient(setting: Setting) -> None:
    """bf16 products of NATIVE whose d_logit waits in d_weight for its GEMM: `chunk.native_kept`."""
    (rows, dim), sizes = (190, 256), KEPT_SPLITS[dist.get_world_size(setting.group)]
    work = Workload(Operator.POLICY_LOSS, rows, max(sizes), dim, torch.bfloat16)
    assert Panel.of(work, KEPT_BUDGET).is_kept(rows)
    rank = dist.get_rank(setting.group)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=rng).bfloat16()
    weight = (torch.randn(sum(sizes), dim, generator=rng) / 8).bfloat16()
    target = torch.randint(sum(sizes), (rows,), generator=rng)
    advantage = torch.randn(rows, generator=rng)

    def gradients(leaves: tuple[Tensor, ...], budget: int | None, **options) -> tuple[Tensor, ...]:
        options = {"advantage": advantage, "memory_budget_bytes": budget, **options}
        loss = linear_policy_loss(*leaves, target, **options).loss
        return torch.autograd.grad(loss, leaves)

    leaves = tuple(x.clone().requires_grad_() for x in (hidden, weight[own]))
    options = {"backend": Backend.NATIVE, "vocab_group": setting.group}
    actual = gradients(leaves, KEPT_BUDGET, **options)
    leaves = tuple(x.double().requires_grad_() for x in (hidden, weight))
    d_hidden, d_weight = gradients(leaves, None, backend=Backend.REFERENCE)
    for name, found, true in zip(LEAVES, actual, (d_hidden, d_weight[own]), strict=False):
        assert (found.double() - true).norm() < 4e-3 * true.norm(), name  # roundings to bf16


def check_targets(setting: Setting) -> None:
    """Ignored rows alone give zeros; a target out of range raises on every rank."""
    inputs = own_part(make_inputs(*SHAPE, torch.float32), setting.classes())
    group = {"vocab_group": setting.group, "backend": setting.backend}
    nothing = torch.full(SHAPE[:1], -100)
    for target, message in ((53, r"target must lie in \[0, 53\)"), (-1, "from -1 to")):
        wrong = nothing.clone()
        wrong[3] = target
        for call in (
            lambda target: linear_logprob(*inputs[:2], target, **group),
            lambda target: linear_policy_loss(
                *inputs[:2], target, advantage=torch.ones(SHAPE[0]), **group
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call(wrong)
    rows = linear_logprob(*inputs[:2], nothing, **group)
    rows.logprob.sum().backward()
    assert not rows.logprob.any()
    assert not inputs.hidden.grad.any()
    assert not inputs.weight.grad.any()


def check_dtensor(mesh: DeviceMesh) -> None:
    """A weight sharded as distribute_tensor does it; its gradient is sharded alike."""
    inputs = make_inputs(*SHAPE, torch.float64)
    loss = linear_logprob(*inputs[:2], inputs.target, bias=inputs.bias).logprob.sum()
    whole = torch.autograd.grad(loss, inputs[:3])
    weight, bias = (
        distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in inputs[1:3]
    )
    hidden = distribute_tensor(inputs.hidden.detach(), mesh, [Replicate()]).requires_grad_()
    plain_hidden = inputs.hidden.detach().clone().requires_grad_()
    for x, group in ((hidden, None), (plain_hidden, mesh.get_group())):
        out = linear_logprob(x, weight, inputs.target, bias=bias, vocab_group=group)
        torch.testing.assert_close(out.logprob.sum(), loss, rtol=1e-12, atol=0.0)
        d_hidden, *shards = torch.autograd.grad(out.logprob.sum(), (x, weight, bias))
        assert isinstance(d_hidden, DTensor) == isinstance(x, DTensor)
        d_hidden = d_hidden.to_local() if isinstance(d_hidden, DTensor) else d_hidden
        torch.testing.assert_close(d_hidden, whole[0], rtol=1e-11, atol=1e-12)
        for shard, expected in zip(shards, whole[1:], strict=True):
            assert shard.placements == (Shard(0),)
            part = expected.chunk(mesh.size())[mesh.get_local_rank()]
            torch.testing.assert_close(shard.to_local(), part, rtol=1e-11, atol=1e-12)
    target = inputs.target
    replicated = distribute_tensor(inputs.weight.detach(), mesh, [Replicate()])
    cut = distribute_tensor(inputs.hidden.detach(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"pass vocab_group=weight\.device_mesh\.get_group\(\)"):
        linear_logprob(plain_hidden, weight, target)
    with pytest.raises(ValueError, match=r"weight must be sharded on dim 0 .* got placements"):
        linear_logprob(hidden, replicated, target)
    with pytest.raises(ValueError, match="hidden must be replicated on the mesh of weight"):
        linear_logprob(cut, weight, target)
    with pytest.raises(TypeError, match="hidden is a DTensor, weight is not"):
        linear_logprob(hidden, inputs.weight, target)
    with pytest.raises(ValueError, match="bias must be sharded as weight is"):
        wrong = distribute_tensor(inputs.bias.detach(), mesh, [Replicate()])
        linear_logprob(hidden, weight, target, bias=wrong)
    # One class for two ranks or more: torch gives the last one nothing. All of them raise.
    small = distribute_tensor(inputs.weight.detach()[:1], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="at least one class on every rank"):
        linear_logprob(hidden, small, target)


def check_empty_shard(setting: Setting) -> None:
    """A rank without classes raises before it is in a collective."""
    hidden, weight = torch.zeros(3, SHAPE[2]), torch.zeros(0, SHAPE[2])
    if dist.get_rank(setting.group) == 0:
        return
    with pytest.raises(ValueError, match=r"weight \[0, 11\] .*at least one class on every rank"):
        linear_logprob(hidden, weight, torch.zeros(3).long(), vocab_group=setting.group)


def run_rank(rank: int, port: int, backend: Backend) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocab"))["vocab"]
    for mesh in (init_device_mesh("cpu", (WORLD_SIZE,)), pairs):
        setting = Setting(mesh.get_group(), backend, 2**20)
        is_narrow = backend is not Backend.REFERENCE
        check_operators(torch.float32 if is_narrow else torch.float64, setting)
        check_operators(torch.bfloat16, setting)
        if setting.backend is Backend.NATIVE:
            check_operators(torch.bfloat16, setting, EVEN_DIM)
            if multiplies(torch.bfloat16, EVEN_DIM):
                check_kept_gradient(setting)
        check_targets(setting)
        if not is_narrow:
            check_dtensor(mesh)
            check_empty_shard(setting)
    dist.destroy_process_group()


def run_ranks(backend: Backend, folder: Path) -> None:
    """Start a process for each rank and wait for all of them; the output of one that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    ranks = []
    for rank in range(WORLD_SIZE):
        command = [sys.executable, __file__, str(rank), str(port), backend.value]
        with (folder / f"{rank}.log").open("wb") as log:
            env = {**os.environ, "PYTHONPATH": path}
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
    # A rank that fails leaves the others waiting for it.
    while any(x.poll() is None for x in ranks) and not any(x.poll() for x in ranks):
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(ranks) if process.poll()]
    for process in ranks:
        process.kill()
        process.wait()
    assert not failed, (folder / f"{failed[0]}.log").read_text()


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])
def test_shards_equal_the_whole(backend, tmp_path):
    run_ranks(backend, tmp_path)


@pytest.mark.interpret
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1, set before triton is imported: a process of its own",
)
def test_shards_equal_the_whole_on_triton(tmp_path):
    run_ranks(Backend.TRITON, tmp_path)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Backend(sys.argv[3]))
