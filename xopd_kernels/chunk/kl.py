"""Kullback-Leibler terms of log-probabilities that are never negative and do not cancel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Terms >= 0 whose sum over the classes is KL(a || b), for normalised a and b.

    ``a (e^r - 1 - r)`` with ``r = log b - log a``: the sum of ``-a r`` cancels where b is close
    to a, this one differs from it by ``sum b - sum a = 0``. A class of probability 0 in a counts
    b; one of probability 0 in b alone counts inf.
    """
    a, r = log_a.exp(), log_b - log_a
    near = (r.expm1() - r).mul_(a)
    far = log_b.exp()
    terms = torch.where(r.abs() < 1, near, far - a - a * r)
    return torch.where(a == 0, far, terms)


def open_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Terms of sum a (log a - log b) over some classes only: they do not sum to 1."""
    return torch.where(log_a == -torch.inf, 0.0, log_a.exp() * (log_a - log_b))


class Divergence(NamedTuple):
    """A divergence of rows and its derivative."""

    value: Tensor  # [rows]
    slope: Tensor  # [rows, K] d value / d log p, up to c * p for any c if p is normalised


def row_divergence(
    log_p: Tensor, log_q: Tensor, beta: float, is_normalised: bool = True
) -> Divergence:
    """KL(q || p) for beta 0, KL(p || q) for beta 1, else the generalised Jensen-Shannon one.

    ``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = (1 - beta) p + beta q``; p [rows, K] is
    the student, q the teacher. Without `is_normalised` they hold a part of the classes, and the
    plain sums over that part are taken.
    """
    terms = kl_terms if is_normalised else open_terms
    if beta == 0.0:
        return Divergence(terms(log_q, log_p).sum(1), log_q.exp().neg_())
    p = log_p.exp()
    if beta == 1.0:
        log_ratio = log_p - log_q if is_normalised else log_p - log_q + 1
        return Divergence(terms(log_p, log_q).sum(1), torch.where(p == 0, 0.0, log_ratio.mul_(p)))
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    value = beta * terms(log_q, log_m).sum(1) + (1 - beta) * terms(log_p, log_m).sum(1)
    slope = torch.where(p == 0, 0.0, (log_p - log_m).mul_(p).mul_(1 - beta))
    return Divergence(value, slope)
