"""A bf16 d_weight of several chunks in which d_logit waits for its GEMM (Backend.NATIVE)."""

import pytest
import torch

from tests.kernels.test_memory_plan import ALL, Case, assert_planned, measure
from xopd_kernels import (
    Backend,
    Operator,
    Workload,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    memory_plan,
    native_matmul,
)
from xopd_kernels.memory import Panel, next_kept_rows

BF16 = torch.bfloat16
VOCAB_SIZE = 4101  # five tiles, the last one odd
BUDGET = 3_000_000  # holds 128 rows at a time, and fewer beside their logits


def dim_of(operator: Operator) -> int:
    """Of a d_weight that holds the logits of 128 rows."""
    return 512 if operator is Operator.DIVERGENCE else 256


@pytest.fixture(autouse=True)
def products() -> None:
    if not native_matmul.is_available():
        pytest.skip("this CPU has no bf16 dot products: d_logit is not rounded")


def work(
    operator: Operator,
    rows: int,
    dim: int = 0,
    dtype: torch.dtype = BF16,
    vocab_size: int = VOCAB_SIZE,
) -> Workload:
    dim = dim or dim_of(operator)
    teacher_dim = dim if operator is Operator.DIVERGENCE else 0
    top_k = 4 if operator is Operator.TOPK_DIVERGENCE else 0
    sizes = (operator, rows, vocab_size, dim, dtype)
    return Workload(*sizes, teacher_dim=teacher_dim, top_k=top_k)


class Problem:
    """The same inputs in bf16, and in fp64 for what is true of them."""

    def __init__(self, operator: Operator, rows: int, live: float = 1.0, dead: float = 0.0) -> None:
        self.operator, dim = operator, dim_of(operator)
        rng = torch.Generator().manual_seed(rows)
        self.hidden = torch.randn(rows, dim, generator=rng).to(BF16)
        self.weight = (torch.randn(VOCAB_SIZE, dim, generator=rng) / 8).to(BF16)
        self.other = (torch.randn(VOCAB_SIZE, dim, generator=rng) / 8).to(BF16)
        self.bias = torch.randn(VOCAB_SIZE, generator=rng).to(BF16)
        self.target = torch.randint(VOCAB_SIZE, (rows,), generator=rng)
        self.target[torch.rand(rows, generator=rng) >= live] = -100
        self.teacher = -8 * torch.rand(rows, generator=rng)
        self.share = torch.rand(rows, generator=rng)
        self.share[torch.rand(rows, generator=rng) < dead] = 0  # no advantage, hence no gradient

    def gradients(self, dtype: torch.dtype, backend: Backend, budget: int | None = BUDGET):
        operator = self.operator
        tensors = [x.to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        hidden, weight, bias = tensors
        options = {"bias": bias, "backend": backend, "memory_budget_bytes": budget}
        if operator is Operator.LOGPROB:
            loss = (linear_logprob(hidden, weight, self.target, **options).logprob * self.share)[
                self.target >= 0
            ].sum()
        elif operator is Operator.POLICY_LOSS:
            terms = {"advantage": self.share - 0.5 * (self.share > 0)}
            loss = linear_policy_loss(hidden, weight, self.target, **terms, **options).loss
        elif operator is Operator.DIVERGENCE:
            heads = (hidden, weight, hidden.detach(), self.other.to(dtype))
            share = {"token_weight": self.share, "beta": 0.5}
            loss = linear_divergence(*heads, **share, **options).divergence.sum()
        else:
            ids = torch.arange(4).repeat(len(hidden), 1)
            logprob = torch.full(ids.shape, -2.0)
            share = {"token_weight": self.share, "beta": 0.5}
            heads = (hidden, weight, ids, logprob)
            loss = linear_topk_divergence(*heads, **share, **options).divergence.sum()
        return torch.autograd.grad(loss, tensors)


OPERATORS = pytest.mark.parametrize("operator", list(Operator))


@OPERATORS
@pytest.mark.parametrize(
    ("rows", "live", "dead"),
    [(129, 1.0, 0.0), (190, 1.0, 0.5), (200, 0.9, 0.0), (215, 0.8, 0.3), (190, 1.0, 1.0)],
)
def test_gradients(operator: Operator, rows: int, live: float, dead: float) -> None:
    """Chunks of even and odd numbers of rows, masked rows, rows without a gradient."""
    assert Panel.of(work(operator, rows), BUDGET).is_kept(rows)
    problem = Problem(operator, rows, live, dead)
    truth = problem.gradients(torch.float64, Backend.REFERENCE, None)
    actual = problem.gradients(BF16, Backend.NATIVE)
    # d_logit is rounded to bf16, and the result; of the bias only that.
    for name, found, true in zip(("hidden", "weight", "bias"), actual, truth, strict=True):
        error = (found.double() - true).norm() / true.norm().clamp(min=1e-30)
        assert error < 3e-3 if dead < 1 else found.count_nonzero() == 0, name
    again = problem.gradients(BF16, Backend.NATIVE)
    assert all(one.equal(other) for one, other in zip(actual, again, strict=True))


@OPERATORS
def test_as_exact_as_with_a_sum_in_fp32(operator: Operator) -> None:
    """Against a budget that has no room for it: both errors are those of the roundings."""
    rows, budget = 200, 1_500_000
    assert not Panel.of(work(operator, rows), budget).is_kept(rows)
    problem = Problem(operator, rows)
    truth = problem.gradients(torch.float64, Backend.REFERENCE, None)[1]
    errors = [
        (problem.gradients(BF16, Backend.NATIVE, given)[1] - truth).norm()
        for given in (BUDGET, budget)
    ]
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize(("dim", "models"), [(512, 1), (1024, 1), (1024, 2), (2048, 2)])
def test_the_chunks_fit(dim: int, models: int) -> None:
    """d_logit of all rows before, and the logits, in the bytes of d_weight; none is left over."""
    operator = Operator.DIVERGENCE if models == 2 else Operator.POLICY_LOSS
    rows = Panel.of(work(operator, dim, dim, vocab_size=152_064), None).kept_rows
    panel = Panel.of(work(operator, rows, dim, vocab_size=152_064), None)
    assert panel.is_kept(rows) and 0.7 * dim < rows < dim
    kept, chunks = 0, 0
    while kept < rows:
        step = next_kept_rows(dim // 2, models, kept, rows - kept, panel.kept_step)
        assert step > 0 and 2 * kept + 4 * models * step <= 2 * dim
        kept, chunks = kept + step, chunks + 1
    assert kept == rows and 2 <= chunks <= rows / 64


def test_where_it_does_not_apply() -> None:
    """One chunk, too many rows, fp32 results, sparse gradients, other GEMMs."""
    policy = work(Operator.POLICY_LOSS, 200)
    assert Panel.of(policy, BUDGET).is_kept(200)
    assert not Panel.of(policy, BUDGET).is_kept(128)
    for other in (
        policy._replace(rows=256),
        policy._replace(adds_to_main_grad=True),
        policy._replace(is_sparse=True),
        policy._replace(dtype=torch.float16),
        policy._replace(dtype=torch.float32),
        policy._replace(dim=255),
    ):
        assert not Panel.of(other, BUDGET).is_kept(other.rows), other
    kept = memory_plan(policy, Backend.NATIVE, BUDGET)
    summed = memory_plan(policy._replace(is_sparse=True), Backend.NATIVE, BUDGET)
    assert kept.accumulator_bytes == 0 and summed.accumulator_bytes == 4 * VOCAB_SIZE * 256


@pytest.mark.parametrize("live", [200, 100])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_memory(case: Case, live: int) -> None:
    """As planned, also where the live rows are one chunk, and nothing as large as d_weight."""
    dim = dim_of(case.operator)
    planned = case.workload(200, VOCAB_SIZE, dim, BF16)
    assert Panel.of(planned, BUDGET).is_kept(planned.rows)
    sizes = measure(case, planned, Backend.NATIVE, live=live, budget=BUDGET)
    assert_planned(sizes, planned, Backend.NATIVE, BUDGET, least_share=0.6)
    assert max(sizes) == 2 * VOCAB_SIZE * dim
