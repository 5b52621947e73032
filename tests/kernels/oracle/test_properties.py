"""Every operator against fp64 on drawn cases: results and every gradient.

fp64: as close as fp64 allows. fp32: the sums over all cases obey the error budget, and each case
does with one rounding of its logits on top. bf16, fp16: each case obeys the error budget.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xopd_kernels import (
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    reverse_kl_advantage,
)
from xopd_kernels.records import PolicyTerms
from xopd_kernels.testing import (
    ErrorPool,
    Inputs,
    assert_within_budget,
    dense_logits,
    split_non_finite,
)
from xopd_kernels.testing.cases import (
    Case,
    Conditioning,
    Layout,
    Masked,
    Targets,
    Teacher,
    Values,
    outcome_reach,
    smallest_memory_budget,
)
from xopd_kernels.testing.dense import (
    dense_reverse_kl_advantage,
    divergence_rows,
    policy_of,
    rows_of,
    topk_outcomes,
    topk_rows,
)

SIZES = [1, 2, 3, 5, 7, 13, 17, 31]
FP64_ROUNDINGS = 8.0  # of the logits; the sums over D and V are shorter than that
# fp32: so many that no single case in which plain torch is lucky decides the pool.
CASES = {torch.float64: 150, torch.float32: 400, torch.bfloat16: 100, torch.float16: 100}
SCALARS = {  # temperature, softcap, logit_scale
    Values.NORMAL: ([0.1, 0.3, 1.0, 2.5, 10.0], [None, None, 3.0, 30.0], [1.0, 0.25, 3.3]),
    Values.HUGE: ([1.0, 2.5, 10.0], [None, None, 50.0, 1e4], [1.0, 0.25]),
    Values.EXACT: ([0.125, 0.5, 1.0, 8.0], [None, None, 32.0, 16384.0], [1.0, 0.25, 2.0]),
}


class Problem(NamedTuple):
    """An operator on a case, and the dense version of it."""

    names: tuple[str, ...]  # of the results
    operator: Callable[[Inputs], list[Tensor]]
    dense: Callable[[Tensor], list[Tensor]]  # the results from all logits
    upstream: list[Tensor | None]  # gradient of each result; None: it has none
    parts: Callable[[Tensor], list[Tensor]]  # see Conditioning.of
    reach: list[float]  # 2-norm of what each result moves by if every logit moves by 1


@st.composite
def cases(draw, dtype):
    values = draw(st.sampled_from(Values))
    temperature, softcap, logit_scale = (draw(st.sampled_from(x)) for x in SCALARS[values])
    has_bias = draw(st.booleans())
    return Case(
        rows=draw(st.sampled_from([0, *SIZES])),
        vocab_size=draw(st.sampled_from([*SIZES, 67])),
        dim=draw(st.sampled_from(SIZES)),
        dtype=dtype,
        values=values,
        layout=draw(st.sampled_from(Layout)),
        masked=draw(st.sampled_from([Masked.NONE, Masked.SOME, Masked.SOME, Masked.ALL])),
        targets=draw(st.sampled_from(Targets)),
        has_bias=has_bias,
        has_minus_inf=has_bias and draw(st.booleans()),
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        seed=draw(st.integers(0, 10_000)),
    )


def sweep(dtype, make_problem):
    """Drawn cases, each within the budget, and their pool."""
    pool = ErrorPool()

    @settings(max_examples=CASES[dtype], deadline=None, derandomize=True, database=None)
    @given(case=cases(dtype))
    def run(case):
        inputs = case.inputs()
        # One leaf in six is frozen: its gradient must be absent, the others unchanged.
        inputs = inputs._replace(
            **{name: getattr(inputs, name).detach() for name in frozen(case.seed)}
        )
        compare(case, pool, inputs, make_problem(case, inputs))

    run()
    pool.check()


def frozen(seed):
    return [name for i, name in enumerate(("hidden", "weight", "bias")) if seed % 6 == i]


def compare(case, pool, inputs, problem):
    """Every result and every gradient of a case against the oracle."""
    exact = inputs.to(torch.float64)
    runs = [
        (inputs, problem.operator(inputs)),
        (inputs, problem.dense(dense_logits(inputs.hidden, case.head(inputs)))),
        (exact, problem.dense(dense_logits(exact.hidden, case.head(exact)))),
    ]
    results = [[*out, *gradients(out, x, problem.upstream)] for x, out in runs]
    scale = Conditioning.of(case, exact, problem.parts)
    sizes = [scale.logit * reach for reach in problem.reach] + list(scale[1:])
    names = [*problem.names, "d_hidden", "d_weight", "d_bias"]
    for name, size, actual, *others in zip(names, sizes, *results, strict=True):
        is_frozen = name[2:] in frozen(case.seed)
        assert (actual is None) == (is_frozen or others[1] is None), f"{name} of {case}"
        if actual is not None:
            assert actual.dtype == (case.dtype if name.startswith("d_") else case.arithmetic)
            check(case, pool, name, size, actual, *others)


def gradients(outputs, inputs, upstream):
    """d_hidden, d_weight, d_bias; None where the leaf is frozen or has no part in it."""
    pairs = [(x, up.to(x.dtype)) for x, up in zip(outputs, upstream, strict=True) if up is not None]
    leaves = [x for x in inputs[:3] if x.requires_grad]
    if not pairs:
        return [None] * 3
    values, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(values, leaves, grads, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs[:3]]


def check(case, pool, name, size, actual, baseline, oracle):
    """One result of one case."""
    label = f"{name} of {case}"
    finite = split_non_finite(label, actual, oracle)
    actual, baseline, oracle = actual[finite], baseline[finite], oracle[finite]
    if not baseline.isfinite().all():
        baseline = oracle  # where plain torch overflows it is no measure
    if case.dtype == torch.float64:
        assert_within_budget(label, actual, oracle, oracle, FP64_ROUNDINGS * size)
        return
    if case.dtype == torch.float32:
        pool.add(name, actual, baseline, oracle, size)
    assert_within_budget(label, actual, baseline, oracle, size)


def run(operator, case, x, *args, **options):
    """The operator: in one chunk for even seeds, else in chunks of a few rows."""
    head = case.head(x)
    scalars = {name: getattr(head, name) for name in ("temperature", "softcap", "logit_scale")}
    call = functools.partial(operator, *args, bias=head.bias, **scalars, **options)
    if case.seed % 2 == 0:
        return call()
    return call(memory_budget_bytes=2 * smallest_memory_budget(call))


def logprob_problem(case, inputs):
    rng = case.generator(1)
    ups = [torch.randn(case.rows, generator=rng) for _ in range(3)]
    needs_entropy = case.seed % 3 != 0

    def operator(x):
        out = run(linear_logprob, case, x, *x[:2], x.target, needs_entropy=needs_entropy)
        assert needs_entropy or out.entropy.shape == (0,)
        return list(out if needs_entropy else out[:2])

    def parts(logits):
        # A rounded p moves the gradient of the entropy as much as that of the lse.
        row = rows_of(logits, inputs.target)
        return [ups[0] * row.logprob, ups[1] * row.lse, ups[2] * row.entropy, ups[2] * row.lse]

    count = 3 if needs_entropy else 2
    root = math.sqrt(case.rows)
    return Problem(
        ("logprob", "lse", "entropy")[:count],
        operator,
        lambda logits: list(rows_of(logits, inputs.target))[:count],
        ups[:count],
        parts,
        [2 * root, root, root * (1 + math.log(case.vocab_size))][:count],
    )


@pytest.mark.parametrize("dtype", CASES)
def test_linear_logprob(dtype):
    sweep(dtype, logprob_problem)


def policy_problem(case, inputs):
    rng = case.generator(2)
    with torch.no_grad():
        exact = inputs.to(torch.float64)
        row = rows_of(dense_logits(exact.hidden, case.head(exact)), inputs.target)
    logprob = row.logprob.nan_to_num(neginf=-1e4)
    if not case.seed & 4:  # without old_logprob exp(-inf - -inf) makes the dense ratio NaN
        inputs.target[row.logprob == -torch.inf] = -100
    # Ratios far from where the clip starts: a rounded log-prob must not decide on the branch.
    ratio = torch.tensor([0.5, 0.97, 1.6])[torch.randint(3, (case.rows,), generator=rng)]
    advantage = 3 * torch.randn(case.rows, generator=rng)
    weight = torch.rand(case.rows, generator=rng) * (torch.rand(case.rows, generator=rng) < 0.8)
    has_teacher, has_old, has_weight = (bool(case.seed & bit) for bit in (2, 4, 8))
    terms = PolicyTerms(
        teacher_logprob=(logprob + advantage).float() if has_teacher else None,
        advantage=None if has_teacher else advantage,
        old_logprob=(logprob - ratio.log()).float() if has_old else None,
        token_weight=weight if has_weight else None,
        clip_low=0.2,
        clip_high=0.3,
        advantage_clamp=2.0,
    )
    size = (ratio if has_old else 1.0) * (weight if has_weight else 1.0)
    size = size * (advantage.abs() + has_teacher) * (inputs.target != -100)
    if case.values is Values.EXACT:  # the log-prob is rounded, even where no logit is
        size = size * (1 + logprob.abs())
    reach = 1 + float(logprob.norm()) + math.sqrt(case.rows)

    def dense(logits):
        out = policy_of(rows_of(logits, inputs.target), inputs.target, terms)
        is_live = (inputs.target != -100) & (weight != 0 if has_weight else True)
        return [out.loss, *(x * is_live for x in out[1:5])]

    def operator(x):
        return list(run(linear_policy_loss, case, x, *x[:2], x.target, **terms._asdict())[:5])

    return Problem(
        ("loss", "logprob", "lse", "advantage", "ratio"),
        operator,
        dense,
        [torch.tensor(1.5), None, None, None, None],
        lambda logits: [1.5 * size * rows_of(logits, inputs.target).logprob],
        [2 * float(size.sum()), *(2 * reach,) * 4],
    )


@pytest.mark.parametrize("dtype", CASES)
def test_linear_policy_loss(dtype):
    sweep(dtype, policy_problem)


BETAS = [0.0, 1.0, 0.5, 0.1]


def upstream_of(case):
    """All ones, for which the gradients are computed ahead, or one for each token."""
    if case.seed % 4 < 2:
        return torch.ones(case.rows)
    return torch.randn(case.rows, generator=case.generator(3))


def token_weight_of(case, target):
    """0 where the case masks a row."""
    return torch.rand(case.rows, generator=case.generator(4)).add(0.1) * (target != -100)


def divergence_problem(case, inputs):
    teacher = Teacher.of(case, inputs)
    beta = BETAS[case.seed // 4 % 4]
    weight, upstream = token_weight_of(case, inputs.target), upstream_of(case)
    exact = inputs.to(torch.float64)
    classes = min(case.vocab_size, teacher.case.vocab_size)
    student = dense_logits(exact.hidden, case.head(exact)).detach()[:, :classes]
    other = teacher.logits(torch.float64)[:, :classes]
    value = divergence_rows(student, other, beta).divergence
    reach = outcome_reach(student.log_softmax(-1), other.log_softmax(-1), value)
    # The teacher's logits are rounded, too; and each divergence is a sum of rounded terms.
    scale = 1 + teacher.rounding() / Conditioning.of(case, exact, lambda _: []).logit

    def operator(x):
        options = {"beta": beta, "token_weight": weight, **teacher.options()}
        return list(run(linear_divergence, case, x, *x[:2], *teacher.inputs[:2], **options))

    return Problem(
        ("divergence", "lse", "teacher_lse"),
        operator,
        lambda logits: list(divergence_rows(logits, teacher.logits(logits.dtype), beta, weight)),
        [upstream, None, None],
        lambda logits: [scale * (weight * upstream)[:, None] * reach * logits[:, :classes]],
        [2 * scale * float((weight * reach.sum(-1)).norm()), *(scale * math.sqrt(case.rows),) * 2],
    )


@pytest.mark.parametrize("dtype", CASES)
def test_linear_divergence(dtype):
    sweep(dtype, divergence_problem)


def topk_problem(case, inputs):
    rng = case.generator(5)
    count = max(1, min(case.vocab_size - 1, 1 + case.seed % 5))
    chances = torch.rand(case.rows, case.vocab_size, generator=rng)
    # A softcap makes a finite logit of -inf.
    is_cut = case.has_minus_inf and case.softcap is None
    possible = inputs.bias.detach().isfinite() | (not is_cut)
    ids = chances.masked_fill(~possible, -1.0).topk(count, -1).indices
    # The teacher excludes what the student does, and leaves mass for other classes.
    scores = torch.randn(case.rows, count + 1, generator=rng)
    scores[:, :count].masked_fill_(~possible[ids], -torch.inf)
    teacher = scores.log_softmax(-1)[:, :count]
    beta, has_bucket = BETAS[case.seed // 4 % 4], case.seed % 3 != 0
    has_bucket = has_bucket and bool(possible.sum() > count)  # else a rounded 0 / 0
    weight, upstream = token_weight_of(case, inputs.target), upstream_of(case)
    exact = inputs.to(torch.float64)
    student = dense_logits(exact.hidden, case.head(exact)).detach()
    value = topk_rows(student, ids, teacher, beta, has_bucket).divergence
    outcomes = outcome_reach(*topk_outcomes(student, ids, teacher, has_bucket), value)
    # A class of the tail has its share of what the tail moves by; all are normalised together.
    share = student.scatter(-1, ids, -torch.inf).softmax(-1).nan_to_num(0.0)
    tail_reach = outcomes[:, count:].sum(-1, keepdim=True)
    reach = (share * tail_reach).scatter(-1, ids, outcomes[:, :count])
    reach = reach + student.softmax(-1) * outcomes.sum(-1, keepdim=True)

    def operator(x):
        tail = "bucket" if has_bucket else "ignore"
        options = {"beta": beta, "token_weight": weight, "tail": tail}
        return list(run(linear_topk_divergence, case, x, *x[:2], ids, teacher, **options))

    root = math.sqrt(case.rows)
    return Problem(
        ("divergence", "lse", "teacher_lse"),
        operator,
        lambda logits: list(topk_rows(logits, ids, teacher, beta, has_bucket, weight)),
        [upstream, None, None],
        lambda logits: [2 * (weight * upstream)[:, None] * reach * logits],
        [2 * float((weight * reach.sum(-1)).norm()), root, root],
    )


@pytest.mark.parametrize("dtype", CASES)
def test_linear_topk_divergence(dtype):
    sweep(dtype, topk_problem)


def advantage_problem(case, inputs):
    teacher = Teacher.of(case, inputs)
    classes = min(case.vocab_size, teacher.case.vocab_size)
    target = torch.where(inputs.target < classes, inputs.target, classes - 1)
    exact = inputs.to(torch.float64)
    student = dense_logits(exact.hidden, case.head(exact))
    rows = dense_reverse_kl_advantage(student, teacher.logits(torch.float64), target)
    # A log-prob of thousands is rounded, too, and the advantage is a difference of two.
    size = sum(float(x.nan_to_num(0.0, 0.0, 0.0).norm()) for x in rows[1:])
    scale = teacher.rounding() / Conditioning.of(case, exact, lambda _: []).logit

    def operator(x):
        arguments = (*x[:2], *teacher.inputs[:2], target)
        return list(run(reverse_kl_advantage, case, x, *arguments, **teacher.options()))

    root = 2 * math.sqrt(case.rows)
    return Problem(
        ("advantage", "logprob", "teacher_logprob"),
        operator,
        lambda logits: list(
            dense_reverse_kl_advantage(logits, teacher.logits(logits.dtype), target)
        ),
        [None, None, None],
        lambda logits: [],
        [root * (1 + scale) + size, root, root * scale],
    )


@pytest.mark.parametrize("dtype", CASES)
def test_reverse_kl_advantage(dtype):
    sweep(dtype, advantage_problem)
