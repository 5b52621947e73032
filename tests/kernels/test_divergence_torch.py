"""linear_divergence and linear_topk_divergence under autograd, compile, autocast, checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from xopd_kernels import (
    Backend,
    BackendUnavailableError,
    linear_divergence,
    linear_topk_divergence,
)
from xopd_kernels.linear_divergence import op as divergence_op
from xopd_kernels.linear_topk_divergence import op as topk_op
from xopd_kernels.linear_topk_divergence import reference as topk_reference
from xopd_kernels.testing.distillation import (
    D_TEACHER,
    D,
    N,
    V,
    full,
    make_distillation,
    make_top_k,
    top_k,
)

BOTH = pytest.mark.parametrize("call", [full, top_k])


@BOTH
@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_upstream_nan_of_an_ignored_token_stays_out(call, is_frozen):
    """sqrt has an infinite slope at the 0 of an ignored token; infinite times 0 is NaN."""
    (hidden, matrix, bias), teacher, weight = make_distillation()
    if is_frozen:
        matrix, bias = matrix.detach(), bias.detach()
    leaves = [x for x in (hidden, matrix, bias) if x.requires_grad]
    rows = call((hidden, matrix, bias), teacher, token_weight=weight, beta=0.5).sqrt()
    grads = torch.autograd.grad(rows[weight != 0].sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert (grads[0][weight == 0] == 0).all()


@pytest.mark.parametrize(
    "ids", [[3, 3], [3, 40], [-1, 3]], ids=["repeated", "beyond V", "negative"]
)
def test_wrong_ids_give_nan_where_nothing_may_raise(ids, monkeypatch):
    """As on a CUDA device, whose values are not read: the row is NaN, the others are not."""
    monkeypatch.setattr(topk_reference, "check_top_k", lambda *args: None)
    (hidden, matrix, bias), teacher, _ = make_distillation()
    top_ids, logprob = make_top_k(teacher)
    top_ids = top_ids.clone()
    top_ids[2, :2] = torch.tensor(ids)
    out = linear_topk_divergence(hidden, matrix, top_ids, logprob, bias=bias).divergence
    assert out[2].isnan()
    assert out[torch.arange(N) != 2].isfinite().all()


@BOTH
def test_double_backward_raises(call):
    leaves, teacher, _ = make_distillation()
    (grad, *_) = torch.autograd.grad(call(leaves, teacher).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="does not differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("upstream", ["common", "own"])
def test_opcheck(upstream):
    (hidden, matrix, bias), teacher, weight = make_distillation(torch.float32)
    weight, matrix = weight.float(), matrix.detach().requires_grad_()
    per_token = torch.ones(N) if upstream == "common" else torch.rand(N)
    wanted = (True, True, True)
    inputs = (hidden, matrix, bias, teacher[0], teacher[1][:V], None, weight)
    scalars = (0.3, 0.9, None, 4.0, 1.0, 1.0, None, "reference")
    torch.library.opcheck(divergence_op.linear_divergence_op, (*inputs, None, *scalars, *wanted))
    with torch.no_grad():
        out = divergence_op.linear_divergence_op(*inputs, None, *scalars, *wanted)
    frozen = [None if x is None else x.detach() for x in inputs]
    backward = divergence_op.linear_divergence_backward_op
    torch.library.opcheck(backward, (per_token, *out[3:], *frozen, *scalars, *wanted))
    inputs = (hidden, matrix, bias, *make_top_k(teacher), weight)
    scalars = (0.3, True, 0.9, None, 1.0, None, "reference")
    torch.library.opcheck(topk_op.linear_topk_divergence_op, (*inputs, None, *scalars, *wanted))
    with torch.no_grad():
        out = topk_op.linear_topk_divergence_op(*inputs, None, *scalars, *wanted)
    frozen = [None if x is None else x.detach() for x in inputs]
    backward = topk_op.linear_topk_divergence_backward_op
    torch.library.opcheck(backward, (per_token, *out[3:], *frozen, *scalars, *wanted))


@BOTH
def test_compiles_as_one_graph(call):
    leaves, teacher, weight = make_distillation(torch.float32)
    if call is top_k:
        ids, logprob = make_top_k(teacher)

    def run(hidden, matrix, bias, factor):
        if call is full:
            out = linear_divergence(hidden * 2, matrix, *teacher, bias=bias)
        else:
            out = linear_topk_divergence(hidden * 2, matrix, ids, logprob, bias=bias)
        return (out.divergence * factor).sum(), out.lse.mean()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for factor in (torch.ones(N), weight.float()):
        expected = torch.autograd.grad(run(*leaves, factor)[0], leaves)
        actual = torch.autograd.grad(compiled(*leaves, factor)[0], leaves)
        torch.testing.assert_close(actual, expected)


@BOTH
def test_autocast_and_checkpointing(call):
    leaves, teacher, _ = make_distillation(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(leaves, teacher) if call is full else None
    if out is not None:
        low = [x.detach().bfloat16() for x in (*leaves, *teacher)]
        assert torch.equal(out, full(low[:3], low[3:]))
        assert torch.autograd.grad(out.sum(), leaves[1])[0].dtype == torch.float32
    expected = torch.autograd.grad(call(leaves, teacher).sum(), leaves)
    again = checkpoint(lambda *x: call(x, teacher).sum(), *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, leaves), expected)


def test_leading_dimensions_come_back():
    (hidden, matrix, _), teacher, weight = make_distillation()
    rows = slice(0, 12)
    flat = linear_divergence(hidden[rows], matrix, teacher[0][rows], teacher[1])
    shaped = linear_divergence(
        hidden[rows].view(2, 3, 2, D),
        matrix,
        teacher[0][rows].view(2, 3, 2, D_TEACHER),
        teacher[1],
        token_weight=torch.ones_like(weight[rows]).view(2, 3, 2),
    )
    for one, other in zip(shaped, flat, strict=True):
        assert torch.equal(one, other.view(2, 3, 2))


def test_explicit_backends_never_fall_back():
    leaves, teacher, _ = make_distillation(torch.float64)
    for call in (full, top_k):
        with pytest.raises(BackendUnavailableError, match=r"NATIVE cannot run: .* float64"):
            call(leaves, teacher, backend=Backend.NATIVE)


@BOTH
def test_retained_graphs_give_the_same_gradient_again(call):
    leaves, teacher, _ = make_distillation()
    out = call(leaves, teacher)
    first = torch.autograd.grad(2.5 * out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(2.5 * out.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    last = torch.autograd.grad(5 * out.sum(), leaves)
    torch.testing.assert_close(last, tuple(2 * x for x in first))
