"""memory_plan is what happens: measured peaks lie below it and close to it, and stay bounded.

Measured with the profiler, which sees every allocation, also those inside operators.
"""

import functools
import re
from typing import NamedTuple

import pytest
import torch
from torch._C._profiler import RecordScope
from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch.autograd.profiler import profile

from xopd_kernels import (
    Backend,
    Operator,
    Workload,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    memory_plan,
    reverse_kl_advantage,
)
from xopd_kernels.records import Wanted

MIB = 2**20
CPU_BYTES = 64 * MIB  # the promise for the CPU: memory beyond inputs and gradients, whatever N
TOP_K = 32
VOCAB_SIZE, DIM = 32_000, 16
EVERY_ROWS = (2048, 8192, 32_768)


class Case(NamedTuple):
    """An operator and what decides how many [rows, V] buffers it needs."""

    operator: Operator
    needs_entropy: bool = False
    softcap: float | None = None
    beta: float = 0.5

    def __str__(self) -> str:
        parts = (
            self.operator.value,
            "entropy" * self.needs_entropy,
            "softcap" * bool(self.softcap),
        )
        return "-".join(x for x in (*parts, "" if self.beta == 0.5 else f"beta={self.beta}") if x)

    def workload(self, rows: int, vocab_size: int, dim: int, dtype: torch.dtype) -> Workload:
        return Workload(
            self.operator,
            rows,
            vocab_size,
            dim,
            dtype,
            teacher_dim=dim if self.operator is Operator.DIVERGENCE else 0,
            top_k=min(TOP_K, vocab_size) if self.operator is Operator.TOPK_DIVERGENCE else 0,
            has_softcap=self.softcap is not None,
            needs_entropy=self.needs_entropy,
        )


ALL = [
    Case(Operator.LOGPROB),
    Case(Operator.LOGPROB, needs_entropy=True),
    Case(Operator.POLICY_LOSS),
    Case(Operator.POLICY_LOSS, softcap=8.0),
    Case(Operator.DIVERGENCE),
    Case(Operator.DIVERGENCE, softcap=8.0),
    Case(Operator.TOPK_DIVERGENCE),
]
CASES = pytest.mark.parametrize("case", ALL, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
BACKENDS = pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.NATIVE])


def allocations(call) -> list[int]:
    """Bytes of every allocation (> 0) and release (< 0) of the call, in order.

    Recorded in a scope that no operator of eager torch belongs to: memory alone, as the operators
    would double the time and take gigabytes.
    """
    profiler = profile(profile_memory=True)
    _prepare_profiler(profiler.config(), profiler.kineto_activities)
    scopes = {RecordScope.STATIC_RUNTIME_OP}
    _enable_profiler(profiler.config(), profiler.kineto_activities, scopes)
    try:
        call()
    finally:
        events = _disable_profiler().events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def peak(sizes: list[int]) -> int:
    level = highest = 0
    for size in sizes:
        level += size
        highest = max(highest, level)
    return highest


def measure(
    case: Case,
    work: Workload,
    backend: Backend,
    live: int,
    budget: int | None = None,
    has_main_grad: bool = False,
    is_ahead: bool = False,
) -> list[int]:
    """Allocations of forward and backward with `live` of the rows, spread over all of them."""
    rng = torch.Generator().manual_seed(0)
    rows, vocab_size, dim = work.rows, work.vocab_size, work.dim
    hidden = torch.randn(rows, dim, generator=rng).to(work.dtype).requires_grad_()
    weight = torch.randn(vocab_size, dim, generator=rng).to(work.dtype).requires_grad_()
    if has_main_grad:
        weight.main_grad = torch.zeros(weight.shape)
    is_live = torch.zeros(rows)
    is_live[:: rows // live] = 1.0
    target = torch.randint(vocab_size, (rows,), generator=rng).where(is_live > 0, -100)
    options = {"memory_budget_bytes": budget, "softcap": case.softcap, "backend": backend}
    ids = torch.arange(work.top_k).repeat(rows, 1)
    teacher = torch.full((rows,), -4.0)
    ahead = {"main_grad_ahead": True} if is_ahead else {}

    def loss():
        if case.operator is Operator.LOGPROB:
            entropy = case.needs_entropy
            out = linear_logprob(hidden, weight, target, needs_entropy=entropy, **options)
            return out.logprob.sum() + out.entropy.sum()
        if case.operator is Operator.POLICY_LOSS:
            given = {"teacher_logprob": teacher, **options, **ahead}
            return linear_policy_loss(hidden, weight, target, **given).loss
        given = {"token_weight": is_live, "beta": case.beta, **options, **ahead}
        if case.operator is Operator.DIVERGENCE:
            heads = (hidden, weight, hidden.detach(), weight.detach())
            return linear_divergence(*heads, **given).divergence.sum()
        heads = (hidden, weight, ids, teacher[:, None].expand(ids.shape) - 8.0)
        return linear_topk_divergence(*heads, **given).divergence.sum()

    return allocations(lambda: torch.autograd.grad(loss(), (hidden, weight), allow_unused=True))


def assert_planned(
    sizes: list[int], work: Workload, backend: Backend, budget: int | None, least_share: float
):
    """The peak lies in [least_share, 1] of the plan; the rest of the plan is not allocated."""
    plan = memory_plan(work, backend, budget)
    assert least_share * plan.peak_bytes <= peak(sizes) <= plan.peak_bytes


def test_the_measurement_sees_the_dense_version():
    sizes = allocations(lambda: (torch.randn(64, 8) @ torch.randn(8, 1000)).softmax(-1))
    assert max(sizes) == 64 * 1000 * 4


@BACKENDS
@CASES
@DTYPES
def test_peak_of_a_call(backend, case, dtype):
    """Half of the rows are masked; the default budget. No tensor of N * V elements."""
    work = case.workload(2048, VOCAB_SIZE, DIM, dtype)
    sizes = measure(case, work, backend, live=1024)
    assert max(sizes) <= memory_plan(work, backend).logits_bytes
    assert max(sizes) < 1024 * VOCAB_SIZE * dtype.itemsize
    assert_planned(sizes, work, backend, None, least_share=0.9)


@BACKENDS
@CASES
@DTYPES
def test_a_low_budget_is_kept(backend, case, dtype):
    """Then the rounding of d_weight is what the plan adds up, although it comes last."""
    work = case.workload(512, VOCAB_SIZE, DIM, dtype)
    assert memory_plan(work, backend, 8 * MIB).workspace_bytes <= 8 * MIB
    sizes = measure(case, work, backend, live=128, budget=8 * MIB)
    assert_planned(sizes, work, backend, 8 * MIB, least_share=0.65)


@BACKENDS
@pytest.mark.parametrize("rows", [8192, 32_768])
@CASES
def test_workspace_does_not_grow_with_the_tokens(backend, case, rows):
    """Only row_bytes and d_hidden do; 512 live rows fill a chunk."""
    few, many = (case.workload(n, VOCAB_SIZE, DIM, torch.bfloat16) for n in (2048, rows))
    plans = [memory_plan(work, backend) for work in (few, many)]
    assert plans[0].workspace_bytes == plans[1].workspace_bytes
    assert plans[0].chunk_rows < 512
    assert_planned(measure(case, many, backend, live=512), many, backend, None, least_share=0.75)


def assert_same_workspace(works: list[Workload], backend: Backend, measured: list[list[int]]):
    """What grows from one workload to the next is row_bytes and the gradients, and no more."""
    plans = [memory_plan(work, backend) for work in works]
    assert len({plan.workspace_bytes for plan in plans}) == 1
    extra = []
    for plan, sizes in zip(plans, measured, strict=True):
        assert peak(sizes) <= plan.peak_bytes
        extra.append(peak(sizes) - plan.gradient_bytes)
        assert 0.9 * plan.workspace_bytes <= extra[-1]
        assert extra[-1] - plan.row_bytes <= plan.workspace_bytes
        assert sum(sizes) == 0  # no release was missed
    assert extra[-1] - extra[0] <= plans[-1].row_bytes - plans[0].row_bytes


# Kullback-Leibler for the full divergence: the Jensen-Shannon one takes twice as long.
@BACKENDS
@pytest.mark.parametrize("case", [ALL[0], ALL[2], ALL[4]._replace(beta=0.0), ALL[6]], ids=str)
def test_every_row_live(backend, case):
    """The same workspace for 2k, 8k and 32k tokens, all of them in the loss; V = 32,000."""
    works = [case.workload(rows, VOCAB_SIZE, 4, torch.float32) for rows in EVERY_ROWS]
    assert_same_workspace(
        works, backend, [measure(case, work, backend, live=work.rows) for work in works]
    )


@BACKENDS
def test_every_row_live_for_the_advantage(backend):
    """Both models are scored one after the other: the workspace of one."""
    works, measured = [], []
    for rows in EVERY_ROWS:
        work = Case(Operator.LOGPROB).workload(rows, VOCAB_SIZE, 4, torch.float32)
        works.append(work._replace(wanted=Wanted(False, False, False)))
        hidden, weight = torch.randn(rows, 4), torch.randn(VOCAB_SIZE, 4)
        heads = (hidden, weight, hidden, -weight, torch.zeros(rows, dtype=torch.int64))
        call = functools.partial(reverse_kl_advantage, *heads, backend=backend)
        measured.append(allocations(call))
    assert_same_workspace(works, backend, measured)


@BACKENDS
@pytest.mark.parametrize("case", [*ALL, *(ALL[4]._replace(beta=x) for x in (0.0, 1.0))], ids=str)
def test_the_promise_for_the_cpu(backend, case):
    """32,768 rows, and so few classes that a chunk has a thousand rows or more."""
    work = case.workload(32_768, 3600, 4, torch.float32)
    plan = memory_plan(work, backend)
    assert plan.workspace_bytes > 46 * MIB
    sizes = measure(case, work, backend, live=4096)
    assert peak(sizes) - plan.gradient_bytes <= CPU_BYTES
    assert_planned(sizes, work, backend, None, least_share=0.75)


@BACKENDS
@pytest.mark.parametrize("case", [ALL[2], ALL[5], ALL[6]], ids=str)
@DTYPES
def test_a_wide_head(backend, case, dtype):
    """Where hidden states, weight tiles and gradients weigh as much as the logits do.

    The plan adds up what is there at different times: tiles in the GEMMs, temporaries between.
    """
    work = case.workload(1024, 6000, 768, dtype)
    assert_planned(measure(case, work, backend, live=1024), work, backend, None, least_share=0.7)


@BACKENDS
@CASES
def test_few_tokens_do_not_pay_for_a_second_gradient_of_the_weight(backend, case):
    """Autograd must not fill the gradients of outputs that nobody read with zeros."""
    work = case.workload(16, VOCAB_SIZE, 64, torch.float32)
    sizes = measure(case, work, backend, live=16)
    assert sizes.count(VOCAB_SIZE * 64 * 4) == 1
    assert_planned(sizes, work, backend, None, least_share=0.8)


@pytest.mark.parametrize("case", ALL[2:], ids=str)
def test_logits_are_the_buffers_that_are_allocated(case):
    work = case.workload(640, VOCAB_SIZE, DIM, torch.float32)
    plan = memory_plan(work, Backend.REFERENCE)
    buffer = plan.chunk_rows * VOCAB_SIZE * 4
    sizes = measure(case, work, Backend.REFERENCE, live=640)
    assert buffer * sizes.count(buffer) == plan.logits_bytes


@BACKENDS
@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("case", [ALL[2], ALL[4], ALL[6]], ids=str)
def test_d_weight_goes_straight_to_main_grad(backend, case, is_ahead):
    """bf16: neither an fp32 sum nor a gradient of [V, D] besides; else the fp32 sum is held."""
    work = case.workload(48, VOCAB_SIZE, 256, torch.bfloat16)
    straight = work._replace(adds_to_main_grad=True)
    sizes = measure(case, work, backend, live=48, is_ahead=is_ahead, has_main_grad=True)
    assert sizes.count(VOCAB_SIZE * 256 * 4) == (0 if is_ahead else 1)
    assert sizes.count(VOCAB_SIZE * 256 * 2) == 0
    if is_ahead:
        assert_planned(sizes, straight, backend, None, least_share=0.8)
    else:
        assert peak(sizes) > memory_plan(straight, backend).peak_bytes


@BACKENDS
@pytest.mark.parametrize("needs_entropy", [False, True])
def test_scoring_needs_no_slope_and_no_gradient(backend, needs_entropy):
    case = Case(Operator.LOGPROB, needs_entropy, softcap=4.0)
    work = case.workload(640, VOCAB_SIZE, DIM, torch.float32)
    work = work._replace(wanted=Wanted(False, False, False))
    plan = memory_plan(work, backend)
    assert plan.gradient_bytes == plan.accumulator_bytes == 0
    hidden, weight = torch.randn(640, DIM), torch.randn(VOCAB_SIZE, DIM)
    target = torch.zeros(640, dtype=torch.int64)
    options = {"needs_entropy": needs_entropy, "softcap": 4.0, "backend": backend}
    sizes = allocations(lambda: linear_logprob(hidden, weight, target, **options))
    buffers = 1 + needs_entropy if backend is Backend.REFERENCE else 0
    assert sizes.count(plan.chunk_rows * VOCAB_SIZE * 4) == buffers
    assert_planned(sizes, work, backend, None, least_share=0.9)


@BACKENDS
@CASES
@DTYPES
def test_the_least_budget_is_named_and_enough(backend, case, dtype):
    work = case.workload(64, 2000, DIM, dtype)
    with pytest.raises(ValueError, match="memory_budget_bytes must be at least") as failure:
        measure(case, work, backend, live=64, budget=2000)
    text = str(failure.value)
    assert f"V=2000, D={DIM}, {dtype} and {case.operator.value} on {backend.name}, got 2000" in text
    least = int(re.search(r"at least (\d+)", text)[1])
    with pytest.raises(ValueError, match=f"at least {least} "):
        memory_plan(work, backend, least - 1)
    plan = memory_plan(work, backend, least)
    assert plan.chunk_rows >= 1
    assert plan.workspace_bytes <= least
    assert peak(measure(case, work, backend, live=64, budget=least)) <= plan.peak_bytes


@BACKENDS
def test_rows_without_an_advantage_are_moved_within_the_plan(backend):
    work = Workload(Operator.POLICY_LOSS, 512, 4000, 1024, torch.bfloat16)
    leaves = [torch.randn(n, 1024).bfloat16().requires_grad_() for n in (512, 4000)]
    advantage, target = torch.ones(512).index_fill_(0, torch.tensor([0]), 0.0), torch.arange(512)
    call = functools.partial(linear_policy_loss, *leaves, target, backend=backend)
    sizes = allocations(lambda: torch.autograd.grad(call(advantage=advantage).loss, leaves))
    assert peak(sizes) <= memory_plan(work, backend).peak_bytes


@pytest.mark.parametrize("vocab_size", [1, 1000, VOCAB_SIZE, 151_936, 1_000_000])
@pytest.mark.parametrize("backend", [*Backend])
@CASES
def test_plans_fit_their_budget(case, backend, vocab_size):
    """Arithmetic alone: budgets from the least one up, and the default, over all sizes."""
    work = case.workload(100_000, vocab_size, 2048, torch.bfloat16)
    default = memory_plan(work, backend)
    least = 16 * vocab_size * 4 * 3  # 16 rows of three buffers may exceed the default
    limit = 640_000_000 if backend is Backend.TRITON else 48 * MIB
    assert default.workspace_bytes <= max(limit, 3 * least + 32 * MIB)
    last = 0
    for exponent in range(16, 34):
        budget = 2**exponent
        try:
            plan = memory_plan(work, backend, budget)
        except ValueError:
            assert last == 0  # a larger budget is never refused
            continue
        assert plan.workspace_bytes <= budget
        assert plan.chunk_rows >= last
        last = plan.chunk_rows
    assert last > 0
    assert memory_plan(work._replace(rows=5), backend).chunk_rows == 5


@pytest.mark.parametrize("vocab_size", [1, VOCAB_SIZE, 151_936, 256_000, 10_000_000])
def test_chunks_on_a_device_are_whole_tiles(vocab_size):
    work = Workload(Operator.POLICY_LOSS, 1_000_000, vocab_size, 1024, torch.bfloat16)
    rows = memory_plan(work, Backend.TRITON).chunk_rows
    assert rows == 16 or (rows % 128 == 0 and 128 <= rows <= 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator": "linear_logprob"}, r"operator must be a Operator, got 'linear_logprob'"),
        ({"dtype": torch.int64}, r"dtype must be bf16, fp16, fp32 or fp64"),
        ({"dtype": "bf16"}, r"dtype must be a dtype, got 'bf16'"),
        ({"rows": -5}, r"rows must be an int >= 0, got -5"),
        ({"rows": 5.5}, r"rows must be an int >= 0, got 5.5"),
        ({"vocab_size": 0}, r"vocab_size must be an int >= 1, got 0"),
        ({"wanted": (True, True, True)}, r"wanted must be a Wanted"),
        ({"teacher_dim": 8}, r"teacher_dim must be > 0 for DIVERGENCE and 0 .* got 8 for LOGPROB"),
        ({"operator": Operator.DIVERGENCE}, r"teacher_dim must be > 0 .* got 0 for DIVERGENCE"),
        ({"operator": Operator.TOPK_DIVERGENCE, "top_k": 99}, r"top_k must lie in \[1, V\]"),
        ({"backend": "triton"}, r"backend must be a Backend, got 'triton'"),
        ({"backend": Backend.NATIVE, "dtype": torch.float64}, r"NATIVE does not run torch.float64"),
        ({"backend": Backend.TRITON, "dtype": torch.float64}, r"TRITON does not run torch.float64"),
        ({"budget": "64MB"}, r"memory_budget_bytes must be None or an int of bytes, got str"),
        ({"budget": 6.4e7}, r"memory_budget_bytes must be None or an int of bytes, got float"),
        ({"budget": 10**30}, r"memory_budget_bytes must be > 0 and < 2\*\*62"),
    ],
)
def test_plans_of_calls_that_could_not_be_made_are_refused(changes, message):
    backend = changes.pop("backend", Backend.REFERENCE)
    budget = changes.pop("budget", None)
    work = Workload(Operator.LOGPROB, 10, 20, 8, torch.float32)._replace(**changes)
    with pytest.raises((TypeError, ValueError), match=message):
        memory_plan(work, backend, budget)
