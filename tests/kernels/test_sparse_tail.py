"""What the classes that a sparse gradient leaves out have in common: `chunk.sparse.Tail`."""

import pytest
import torch

from tests.kernels.sparse_cases import BACKENDS
from xopd_kernels import Operator, linear_logprob, linear_policy_loss, linear_topk_divergence

ROWS, CLASSES, DIM, TOP_K = 64, 4096, 32, 4
OPERATORS = [Operator.LOGPROB, Operator.POLICY_LOSS, Operator.TOPK_DIVERGENCE]
SPARSE = {"gradient": "sparse", "max_gradient_error": 0.1}


class Problem:
    """Logits in which every token leaves out many classes, and rows of a weight that share much."""

    def __init__(self, shared: str, rows: int = ROWS) -> None:
        rng = torch.Generator().manual_seed(3)
        self.hidden = 1.3 * torch.randn(rows, DIM, generator=rng)
        self.weight = torch.randn(CLASSES, DIM, generator=rng) / 2
        common = torch.randn(DIM, generator=rng)
        common *= 3 * self.weight.norm(dim=1).mean() / common.norm()
        # Orthogonal: it changes d_hidden alone, and no logit.
        self.hidden -= (self.hidden @ common)[:, None] * common / common.square().sum()
        every = {"by all": 1, "by each second": 2, "by each eighth": 8}[shared]
        self.weight[::every] += common
        logits = self.hidden @ self.weight.t()
        self.target = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
        self.factor = torch.linspace(-2.0, 2.0, rows)
        self.ids = logits.topk(TOP_K).indices
        self.teacher = torch.randn(rows, TOP_K, generator=rng).log_softmax(1) - 1.0

    def d_hidden(self, operator, **options):
        hidden = self.hidden.clone().requires_grad_()
        if operator is Operator.LOGPROB:
            out = linear_logprob(hidden, self.weight, self.target, **options)
            loss = (out.logprob * self.factor).sum()
        elif operator is Operator.POLICY_LOSS:
            options["advantage"] = self.factor
            loss = linear_policy_loss(hidden, self.weight, self.target, **options).loss
        else:
            options |= {"token_weight": self.factor.abs(), "beta": 0.0}
            given = (hidden, self.weight, self.ids, self.teacher)
            loss = linear_topk_divergence(*given, **options).divergence.sum()
        return torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda x: x.value)
@pytest.mark.parametrize("shared", ["by all", "by each second", "by each eighth"])
@pytest.mark.parametrize(
    "transform",
    [{}, {"softcap": 30.0}, {"temperature": 0.7, "softcap": 20.0, "logit_scale": 0.9}],
    ids=str,
)
def test_what_unlikely_classes_share_is_not_lost(backend, operator, shared, transform):
    """Without `Tail` 0.38 was lost; with evenly spaced classes, which have the period, 0.29."""
    problem = Problem(shared)
    exact = problem.d_hidden(operator, backend=backend, **transform)
    sparse = problem.d_hidden(operator, backend=backend, **transform, **SPARSE)
    error = (sparse - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.04
