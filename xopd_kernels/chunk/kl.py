"""Kullback-Leibler terms of log-probabilities that are never negative and do not cancel."""

from typing import NamedTuple

import torch
from torch import Tensor


def kl_terms(log_ratio: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Terms >= 0 whose sum over the classes is KL(a || b), for normalised a and b.

    ``a (e^r - 1 - r)`` with ``r = log_ratio = log(b / a)``: the sum of ``-a r`` cancels where b is
    close to a, this one differs from it by ``sum b - sum a = 0``. A class of probability 0 in a
    counts b; one of probability 0 in b alone counts inf.
    """
    r = log_ratio
    # (e^r - 1 - r) / r^2 as a series where the difference would cancel.
    series = torch.full_like(r, 1 / 479001600)  # 1/12!
    for factorial in (39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2):
        series.mul_(r).add_(1 / factorial)
    small = series.mul_(r).mul_(r)
    excess = torch.where(r.abs() < 0.25, small, r.expm1() - r).mul_(a)
    terms = torch.where(r.abs() < 1, excess, b - a - a * r)
    return torch.where(a == 0, b, terms)


def open_terms(log_ratio: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Terms of sum a log(a / b) over some classes only: they do not sum to 1."""
    return torch.where(a == 0, 0.0, -a * log_ratio)


def mixture_ratio(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log(m / p), log(m / q)) of m = (1 - beta) p + beta q, with log_ratio = log(q / p).

    m is the larger of p and q times 1 - share * (1 - smaller / larger): a difference of log m and
    log p would lose the digits of small ratios.
    """
    p_is_larger = log_ratio <= 0
    share = torch.where(p_is_larger, log_ratio.new_full((), beta), log_ratio.new_full((), 1 - beta))
    over_larger = log_ratio.abs().neg_().expm1_().mul_(share).log1p_()
    over_p = torch.where(p_is_larger, over_larger, over_larger + log_ratio)
    over_q = torch.where(p_is_larger, over_larger - log_ratio, over_larger)
    return over_p, over_q


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
    p, q = log_p.exp(), log_q.exp()
    # Both are -inf where neither has mass.
    ratio = torch.where(log_p == log_q, 0.0, log_q - log_p)
    if beta == 0.0:
        return Divergence(terms(-ratio, q, p).sum(1), q.neg_())
    if beta == 1.0:
        value = terms(ratio, p, q).sum(1)
        slope = -ratio if is_normalised else 1 - ratio
        return Divergence(value, torch.where(p == 0, 0.0, slope.mul_(p)))
    over_p, over_q = mixture_ratio(ratio, beta)
    m = p * (1 - beta) + q * beta
    value = beta * terms(over_q, q, m).sum(1) + (1 - beta) * terms(over_p, p, m).sum(1)
    return Divergence(value, torch.where(p == 0, 0.0, over_p.mul_(p).mul_(beta - 1)))
