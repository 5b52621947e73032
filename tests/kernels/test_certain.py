"""Tokens whose probability is nearly 1 (NATIVE, REFERENCE): their gradient is made of the others'.

log p = -log(1 + rest): a sum that holds the 1 in fp32 knows the rest to 1e-7, which is a tenth of
it at p = 1 - 1e-6. Logits of 20 in fp32 are off by 2e-6; that, and not 0.1, is what shows here.
"""

import math

import pytest
import torch
from torch import Tensor

from xopd_kernels import (
    Backend,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
)

ROWS, DIM, VOCAB_SIZE = 48, 64, 4000
# Of a row: d_logit and d_hidden in bf16 are off by 2^-9 each; logits of 20 in fp32 by 2e-6.
ROUNDING = {torch.bfloat16: 8e-3, torch.float32: 2e-5}
EACH_BACKEND = pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.REFERENCE])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, target) with 1 - p of the targets from about 1e-8 to 1e-3."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB_SIZE, DIM, generator=rng) / math.sqrt(DIM)
    target = torch.randint(VOCAB_SIZE, (ROWS,), generator=rng)
    own = weight[target]
    height = torch.linspace(18.0, 34.0, ROWS)[:, None]
    hidden = height * own / own.square().sum(1, keepdim=True)
    hidden += 0.3 * torch.randn(ROWS, DIM, generator=rng)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def errors_of_rows(actual: Tensor, truth: Tensor) -> Tensor:
    """The relative error of each row, in the 2-norm."""
    return (actual.double() - truth).norm(dim=1) / truth.norm(dim=1)


def true_logprob(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.double() @ weight.double().T).log_softmax(1)


@EACH_BACKEND
@EACH_DTYPE
@pytest.mark.parametrize("has_entropy", [False, True])
def test_the_logprob_is_right_relative_to_itself(
    backend: Backend, dtype: torch.dtype, has_entropy: bool
) -> None:
    hidden, weight, target = problem(dtype)
    log_p = true_logprob(hidden.detach(), weight.detach())
    truth = log_p.gather(1, target[:, None])[:, 0]
    assert (-truth).min() < 1e-7 and (-truth).median() < 1e-5
    out = linear_logprob(hidden, weight, target, needs_entropy=has_entropy, backend=backend)
    assert ((out.logprob.double() - truth).abs() <= 2e-5 * truth.abs()).all()
    if has_entropy:
        entropy = -(log_p.exp() * log_p).sum(1)
        assert ((out.entropy.double() - entropy).abs() <= 2e-5 * entropy).all()


@EACH_BACKEND
@EACH_DTYPE
@pytest.mark.parametrize("is_policy", [False, True])
def test_the_gradient_of_each_row_is_right(
    backend: Backend, dtype: torch.dtype, is_policy: bool
) -> None:
    hidden, weight, target = problem(dtype)
    if is_policy:
        advantage = torch.ones(ROWS)
        loss = linear_policy_loss(hidden, weight, target, advantage=advantage, backend=backend).loss
    else:
        loss = linear_logprob(hidden, weight, target, backend=backend).logprob.sum()
    loss.backward()
    wide = hidden.detach().double().requires_grad_()
    logprob = true_logprob(wide, weight.detach()).gather(1, target[:, None])
    logprob.sum().backward()
    assert hidden.grad is not None and wide.grad is not None
    truth = -wide.grad if is_policy else wide.grad
    assert errors_of_rows(hidden.grad, truth).max() <= ROUNDING[dtype]


def true_divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """[rows] of normalised log-probs in float64."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        return (q * (log_q - log_p)).sum(1)
    if beta == 1.0:
        return (p * (log_p - log_q)).sum(1)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(1)


def teacher_of(hidden: Tensor, weight: Tensor, is_alike: bool) -> tuple[Tensor, Tensor]:
    """Certain of the same classes as the student, or of others."""
    if not is_alike:
        hidden, weight, _ = problem(hidden.dtype, seed=1)
        return hidden.detach(), weight.detach()
    rng = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.randn(hidden.shape, generator=rng)
    return (1.02 * hidden.detach().float() + noise).to(hidden.dtype), weight.detach()


@EACH_BACKEND
@EACH_DTYPE
@pytest.mark.parametrize("is_alike", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("top_k", [None, 32])
def test_the_gradient_of_a_divergence_is_right(
    backend: Backend, dtype: torch.dtype, is_alike: bool, beta: float, top_k: int | None
) -> None:
    hidden, weight, _ = problem(dtype)
    teacher = teacher_of(hidden, weight, is_alike)
    wide = hidden.detach().double().requires_grad_()
    log_p, log_q = true_logprob(wide, weight.detach()), true_logprob(*teacher)
    if top_k is None:
        out = linear_divergence(hidden, weight, *teacher, beta=beta, backend=backend)
    else:
        kept, ids = log_q.topk(top_k)
        given = kept.float()
        out = linear_topk_divergence(hidden, weight, ids, given, beta=beta, backend=backend)
        rest = (-given.double().logsumexp(1, keepdim=True).expm1()).clamp(min=2.0**-24).log()
        log_q = torch.cat((given.double(), rest), 1)
        others = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        log_p = torch.cat((log_p.gather(1, ids), others), 1)
    out.divergence.sum().backward()
    true_divergence(log_p, log_q, beta).sum().backward()
    assert hidden.grad is not None and wide.grad is not None
    # Autograd in fp64, the truth here, subtracts from 1 what leaves less than 1e-10.
    is_exact = -log_p.detach().amax(1).expm1() > 1e-10
    assert int(is_exact.sum()) > ROWS // 3
    # Differences of logits, alike or at the one class that both have a share of, lose a digit.
    bound = ROUNDING[dtype] if dtype == torch.bfloat16 or not (is_alike or beta == 0.5) else 1e-4
    assert errors_of_rows(hidden.grad, wide.grad)[is_exact].max() <= bound
