"""What a result may not depend on: the run, the memory budget, the other rows of the batch."""

import functools
import itertools

import pytest
import torch

from xopd_kernels import (
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    reverse_kl_advantage,
)
from xopd_kernels.testing import assert_within_budget, make_inputs
from xopd_kernels.testing.cases import smallest_memory_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, CLASSES, DIM = 50, 130, 24


def logprob(x, rows, **options):
    call = {"bias": x.bias, "needs_entropy": True, "softcap": 9.0}
    out = linear_logprob(x.hidden[rows], x.weight, x.target[rows], **call, **options)
    return out, out.logprob.sum() + out.entropy.sum()


def policy(x, rows, **options):
    advantage = torch.linspace(-2, 2, ROWS)
    old = torch.linspace(-6, -4, ROWS)
    call = {"advantage": advantage[rows], "old_logprob": old[rows], "bias": x.bias, "softcap": 9.0}
    out = linear_policy_loss(x.hidden[rows], x.weight, x.target[rows], **call, **options)
    return out[1:], out.loss


@functools.cache
def teacher_head(dtype):
    other = make_inputs(ROWS, CLASSES + 6, DIM + 3, dtype, seed=9)
    return other.hidden.detach(), other.weight.detach()


def teacher(x, rows):
    hidden, weight = teacher_head(x.hidden.dtype)
    return hidden[rows], weight


def divergence(x, rows, beta=1.0, **options):
    call = {"beta": beta, "bias": x.bias, "token_weight": token_weight(x)[rows]}
    out = linear_divergence(x.hidden[rows], x.weight, *teacher(x, rows), **call, **options)
    return out, out.divergence.sum()


def topk(x, rows, **options):
    rng = torch.Generator().manual_seed(4)
    ids = torch.rand(ROWS, CLASSES, generator=rng).topk(7, -1).indices
    scores = torch.randn(ROWS, 8, generator=rng).log_softmax(-1)[:, :7]
    call = {"bias": x.bias, "token_weight": token_weight(x)[rows]}
    out = linear_topk_divergence(
        x.hidden[rows], x.weight, ids[rows], scores[rows], **call, **options
    )
    return out, out.divergence.sum()


def advantage(x, rows, **options):
    call = (x.hidden[rows], x.weight, *teacher(x, rows), x.target[rows])
    return reverse_kl_advantage(*call, bias=x.bias, **options), None


def token_weight(x):
    return torch.linspace(0.1, 2, ROWS) * (x.target != -100)


RUNS = {
    "logprob": logprob,
    "policy": policy,
    "reverse_kl": divergence,
    "forward_kl": functools.partial(divergence, beta=0.0),
    "jsd": functools.partial(divergence, beta=0.4),
    "topk": topk,
    "advantage": advantage,
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ALL = slice(None)


def inputs(dtype):
    return make_inputs(ROWS, CLASSES, DIM, dtype)


def flat(lists):
    return [value for values in lists for value in values]


def results(run, x, rows=ALL, **options):
    """Every field, then every gradient of a total over all rows."""
    fields, total = run(x, rows, **options)
    grads = () if total is None else torch.autograd.grad(total, x[:3])
    return [field.detach() for field in fields], list(grads)


@every_run
@every_dtype
def test_runs_are_bitwise_equal(run, dtype):
    x = inputs(dtype)
    first = flat(results(run, x))
    for _ in range(3):
        again = flat(results(run, x))
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@every_run
@every_dtype
@pytest.mark.parametrize("factor", [1, 2, 7])
def test_the_memory_budget_changes_nothing_beyond_the_error_budget(run, dtype, factor):
    """Also: whatever budget the forward pass accepts is enough for the backward pass."""
    x, exact = inputs(dtype), inputs(dtype).to(torch.float64)
    least = smallest_memory_budget(functools.partial(run, x, ALL))
    truth = flat(results(run, exact))
    whole = flat(results(run, x))
    cut = flat(results(run, x, memory_budget_bytes=factor * least))
    for number, values in enumerate(zip(cut, whole, truth, strict=True)):
        if values[0].dtype == torch.bool:
            assert torch.equal(values[0], values[1])
        else:
            assert_within_budget(f"result {number}", *values)


@every_run
@every_dtype
def test_a_row_depends_on_no_other_row(run, dtype):
    """Neighbours of other values, in a batch of the same size: bitwise, result and d_hidden.

    Within one GEMM shape torch.mm sums every row in the same order.
    """
    x = inputs(dtype)
    kept = torch.arange(ROWS) % 3 == 0
    other = make_inputs(ROWS, CLASSES, DIM, dtype, seed=5).hidden.detach()
    hidden = torch.where(kept[:, None], x.hidden.detach(), other).requires_grad_()
    target = torch.where(kept | (x.target == -100), x.target, (x.target + 1) % CLASSES)
    expected, grads = results(run, x)
    actual, moved = results(run, x._replace(hidden=hidden, target=target))
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one[kept], two[kept])
    if grads:
        assert torch.equal(moved[0][kept], grads[0][kept])


@every_run
@every_dtype
def test_a_row_alone_is_the_row_in_the_batch(run, dtype):
    """Another number of rows is another GEMM shape, for which the CPU's BLAS may sum otherwise.

    So within the error budget here, not bitwise.
    """
    ends, found = (0, 1, 2, 5, 12, 25, ROWS), []
    for seed in range(16):  # rows enough that plain torch's luck with some of them averages out
        x = make_inputs(ROWS, CLASSES, DIM, dtype, seed=seed)
        parts = [results(run, x, slice(*pair))[0] for pair in itertools.pairwise(ends)]
        together = [torch.cat(field) for field in zip(*parts, strict=True)]
        found.append((together, results(run, x)[0], results(run, x.to(torch.float64))[0]))
    for number in range(len(found[0][0])):
        one, two, three = (torch.cat([x[i][number] for x in found]) for i in range(3))
        if one.dtype == torch.bool:
            assert torch.equal(one, two)
        else:
            assert_within_budget(f"field {number}", one, two, three)


@every_run
def test_the_order_of_the_rows_is_the_order_of_the_results(run):
    """Bitwise: a permutation of the tokens permutes the results."""
    x = inputs(torch.float32)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    fields, shuffled = results(run, x)[0], results(run, x, order)[0]
    assert all(torch.equal(two, one[order]) for one, two in zip(fields, shuffled, strict=True))


@every_run
@pytest.mark.parametrize("dims", [(5, 10), (50, 1), (5, 2, 5)], ids=str)
def test_leading_dimensions_change_nothing(run, dims):
    x = inputs(torch.float32)
    fields = results(run, x)[0]
    index = torch.arange(ROWS).view(dims)
    shaped = results(run, x, index)[0]
    assert all(torch.equal(two, one.view(dims)) for one, two in zip(fields, shaped, strict=True))


@every_run
def test_forward_mode_is_refused(run):
    """A silent zero tangent would be a wrong derivative."""
    x = inputs(torch.float32)

    def call(hidden):
        return run(x._replace(hidden=hidden), ALL)[0][0]

    hidden = x.hidden.detach()
    call(hidden)  # makes the teacher, outside of the transform
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp|forward AD"):
        torch.func.jvp(call, (hidden,), (torch.ones_like(hidden),))


@every_run
def test_vmap_is_the_loop_or_is_refused(run):
    x = inputs(torch.float32)
    stacked = torch.stack([x.hidden.detach(), 2 * x.hidden.detach()])

    def call(hidden):
        return run(x._replace(hidden=hidden), ALL)[0][0]

    try:
        actual = torch.func.vmap(call)(stacked)
    except (NotImplementedError, RuntimeError) as error:
        assert "vmap" in str(error) or "batch" in str(error)
        return
    expected = torch.stack([call(hidden) for hidden in stacked])
    assert torch.equal(actual, expected)
