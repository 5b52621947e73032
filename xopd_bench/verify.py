"""Whether results are right: against fp64, with plain torch's own error as the yardstick.

With all results on a fraction of the vocabulary. At full size: the per-token values of every
token, the loss, some rows of d_weight (each is a sum over all tokens), and d_hidden of some tokens;
ours row by row too, as the gradient of a token that is nearly certain is lost in the norm of the
others.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_bench.cell import Job
from xopd_bench.problem import Problem, Results, solve, solve_by_rows
from xopd_bench.providers.provider import Budget, Provider

# Tokens whose d_hidden, and classes whose d_weight, are verified at the full vocabulary.
_ROWS, _CLASSES = 32, 64
# What has one number for each token.
_PER_TOKEN = ("logprob", "divergence", "advantage")


class WrongError(Exception):
    """Results beyond their budget, or not all there; says where and by how much."""


class Check(NamedTuple):
    """How far results are from fp64."""

    relative_error: float = 0.0  # of the worst result, in the 2-norm
    budget_used: float = 0.0  # the worst result's error / what it may be
    torch_ratio: float = 0.0  # the worst gradient's error / that of plain torch
    logprob_error: float = 0.0  # the largest, in nats

    def worst(self, other: "Check") -> "Check":
        """Of two checks the worse, field by field."""
        return Check(*(max(pair) for pair in zip(self, other, strict=True)))


class Truth(NamedTuple):
    """What is right, and what plain torch makes of it."""

    small: tuple[Results, Results]  # all results on a fraction of the vocabulary
    rows: Tensor  # the tokens whose d_hidden is verified at full size
    classes: Tensor  # the classes whose d_weight is
    full: tuple[Results, Results]

    @classmethod
    def of(cls, problems: tuple[Problem, Problem, Problem]) -> "Truth":
        """Solve the small problem, and parts of the full one."""
        _, small, full = problems
        live = full.is_live.nonzero().squeeze(1)
        rows = live[_spread(len(live), _ROWS, live.device)]
        classes = _classes(full)
        both = (True, False)
        part = full.of_rows(rows)
        found = []
        for is_exact in both:
            results = solve(part, is_exact, has_d_weight=False)
            if full.job.has_d_weight:
                whole = solve_by_rows(full, is_exact, classes)
                results = whole | {"d_hidden": results["d_hidden"]}
            found.append(results)
        exact, plain = (solve(small, is_exact) for is_exact in both)
        return cls((exact, plain), rows, classes, (found[0], found[1]))

    def check_small(self, results: Results, provider: Provider, problem: Problem) -> Check:
        """All results; raises WrongError."""
        return _checked(results, self.small, provider, problem, "on a fraction of the vocabulary")

    def check_full(self, results: Results, provider: Provider, problem: Problem) -> Check:
        """Of the parts that are known; raises WrongError."""
        d_hidden = results.get("d_hidden")
        if d_hidden is not None and bool(d_hidden[~problem.is_live].any()):
            raise WrongError("at full size: ignored tokens have a gradient")
        values = dict(results)
        if d_hidden is not None:
            values["d_hidden"] = d_hidden[self.rows]
        if "d_weight" in values:
            values["d_weight"] = values["d_weight"][self.classes]
        else:  # then only some tokens are known
            values |= {x: values[x][self.rows] for x in _PER_TOKEN if x in values}
            values.pop("loss", None)
        return _checked(values, self.full, provider, problem, "at full size")


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """At most so many of `count` indices, evenly, the first and the last among them."""
    places = torch.linspace(0, count - 1, min(count, wanted), device=device)
    return places.round().long()


def _classes(problem: Problem) -> Tensor:
    """Targets of some tokens, whose d_weight is large, and as many others."""
    device = problem.weight.device
    targets = problem.target[problem.is_live]
    targets = targets[_spread(len(targets), _CLASSES // 2, device)]
    others = _spread(len(problem.weight), _CLASSES // 2, device)
    classes: Tensor = torch.cat((targets, others)).unique()
    return classes


def _checked(
    results: Results,
    truths: tuple[Results, Results],
    provider: Provider,
    problem: Problem,
    where: str,
) -> Check:
    """The worst of all results; WrongError if one is missing, of another shape or wrong."""
    truth, plain = truths
    if provider.is_mean:
        count = int(problem.is_live.sum())
        truth, plain = (_divided(x, count) for x in truths)
    missing = _required(problem.job) - results.keys()
    if missing:
        raise WrongError(f"{where}: returns no {', '.join(sorted(missing))}")
    worst = Check()
    for name, value in results.items():
        if value.shape != truth[name].shape:
            shapes = f"{list(value.shape)}, not {list(truth[name].shape)}"
            raise WrongError(f"{where}: {name} is {shapes}")
        found = _check(name, value, truth, plain, provider.budget)
        if not found.budget_used <= 1.0:
            error = f"relative error {found.relative_error:.1e}"
            raise WrongError(f"{where}: {name}: {error}, {found.budget_used:.1f} x its budget")
        worst = worst.worst(found)
    return worst


def _required(job: Job) -> set[str]:
    if not job.has_gradient:
        return {"advantage" if job is Job.ADVANTAGE else "logprob"}
    return {"d_hidden", "d_weight"} if job.has_d_weight else {"d_hidden"}


def _divided(results: Results, count: int) -> Results:
    """Results of the sum over tokens as those of the mean."""
    summed = ("loss", "d_hidden", "d_weight")
    return {name: x / count if name in summed else x for name, x in results.items()}


def _check(name: str, value: Tensor, truths: Results, plain: Results, budget: Budget) -> Check:
    """One result. Allowed is the budget and one rounding of the result.

    A loss is one number, in which plain torch's errors may cancel by luck: there they are the sum
    of their sizes.
    """
    truth = truths[name]
    off, plain_off = value.detach().double() - truth, plain[name].double() - truth
    error, size = off.norm().item(), max(truth.norm().item(), torch.finfo(torch.float64).tiny)
    if not math.isfinite(error):  # a NaN would lose every comparison
        return Check(math.inf, math.inf, math.inf, math.inf)
    slack = budget.slack + torch.finfo(value.dtype).eps
    plain_error = plain_off.norm().item()
    if name == "loss":
        plain_error = (plain["logprob"].double() - truths["logprob"]).abs().sum().item()
    used = error / (budget.factor * plain_error + slack * size)
    found = Check(error / size, used)
    if name == "logprob":
        return found._replace(logprob_error=off.abs().max().item() if off.numel() else 0.0)
    if not name.startswith("d_"):
        return found
    if name == "d_hidden" and budget.row_error is not None:
        allowed = budget.row_error, budget.factor
        used = max(used, _row_budget_used(off, plain_off, truth, *allowed))
    ratio = error / plain_error if plain_error else 0.0
    return found._replace(budget_used=used, torch_ratio=ratio)


def _row_budget_used(
    off: Tensor, plain_off: Tensor, truth: Tensor, row_error: float, factor: float
) -> float:
    """The worst row's relative error as a share of `row_error`, or of plain torch's worst row."""
    sizes = truth.norm(dim=1)
    is_known = sizes > 0
    if not bool(is_known.any()):
        return 0.0
    errors, plain = (x.norm(dim=1)[is_known] / sizes[is_known] for x in (off, plain_off))
    worst, of_torch = errors.max().item(), plain.max().item()
    return float(worst / max(row_error, factor * of_torch))
