"""linear_logprob: closed forms, gradients, identities, error budget, validation, torch features."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from xopd_kernels import (
    Backend,
    BackendUnavailableError,
    Operator,
    Workload,
    linear_logprob,
    memory_plan,
)
from xopd_kernels.linear_logprob.op import linear_logprob_backward_op, linear_logprob_op
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logprob,
    make_head,
    make_inputs,
)

TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "all": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8},
}
FP64 = {"dtype": torch.float64}


def gradients(rows, inputs, seed=1):
    """Gradients of a random projection of every field."""
    rng = torch.Generator().manual_seed(seed)
    total = sum((x * torch.randn(x.shape, generator=rng)).sum() for x in rows)
    return torch.autograd.grad(total, inputs[:3], retain_graph=True, allow_unused=True)


def test_uniform_logits_give_minus_log_v():
    out = linear_logprob(
        torch.zeros(2, 3), torch.zeros(8, 3), torch.tensor([0, 7]), needs_entropy=True
    )
    torch.testing.assert_close(out.logprob, torch.full((2,), -math.log(8)))
    torch.testing.assert_close(out.lse, torch.full((2,), math.log(8)))
    torch.testing.assert_close(out.entropy, torch.full((2,), math.log(8)))


def test_two_classes_give_log_sigmoid():
    hidden = torch.tensor([[1.5]], **FP64)
    weight = torch.tensor([[1.0], [-1.0]], **FP64)
    out = linear_logprob(hidden, weight, torch.tensor([0]))
    torch.testing.assert_close(out.logprob, torch.nn.functional.logsigmoid(2 * hidden[:, 0]))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("distribution", Distribution)
def test_equals_the_dense_formula_in_fp64(transform, has_bias, distribution):
    inputs = make_inputs(37, 53, 11, torch.float64, distribution)
    head = make_head(inputs, has_bias, **transform)
    expected = dense_logprob(inputs.hidden, head, inputs.target)
    actual = linear_logprob(
        *inputs[:2], inputs.target, bias=head.bias, needs_entropy=True, **transform
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    inputs = make_inputs(5, 7, 3, torch.float64)

    def call(hidden, weight, bias):
        return tuple(
            linear_logprob(
                hidden, weight, inputs.target, bias=bias, needs_entropy=True, softcap=3.0
            )
        )

    assert torch.autograd.gradcheck(call, inputs[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 70, 17), (64, 1000, 48)])
def test_error_budget(dtype, distribution, shape):
    inputs = make_inputs(*shape, dtype, distribution)
    exact = inputs.to(torch.float64)
    results = []
    for x, call in ((inputs, linear_logprob), (inputs, None), (exact, None)):
        if call is None:
            rows = dense_logprob(x.hidden, make_head(x, True), x.target)
        else:
            rows = call(x.hidden, x.weight, x.target, bias=x.bias, needs_entropy=True)
        results.append([*rows, *gradients(rows, x)])
    names = ("logprob", "lse", "entropy", "d_hidden", "d_weight", "d_bias")
    for name, *values in zip(names, *results, strict=True):
        assert_within_budget(name, *values)
    assert results[0][0].dtype == torch.float32
    assert results[0][3].dtype == dtype


@pytest.mark.parametrize("offset", [-1024.0, 1024.0, 8192.0])
def test_error_budget_of_a_common_offset(offset):
    """lse rounds to ulp(offset): gradients by way of exp(z - lse) would be off by as much."""
    inputs = make_inputs(64, 1000, 48, torch.float32, offset=offset)
    results = []
    for x in (inputs, inputs.to(torch.float64)):
        rows = dense_logprob(x.hidden, make_head(x, True), x.target)
        results.append(gradients(rows, x))
    rows = linear_logprob(*inputs[:2], inputs.target, bias=inputs.bias, needs_entropy=True)
    names = ("d_hidden", "d_weight", "d_bias")
    for name, *values in zip(names, gradients(rows, inputs), *results, strict=True):
        assert_within_budget(name, *values)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    vocab_size=st.integers(1, 60),
    dim=st.integers(1, 20),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_identities(rows, vocab_size, dim, temperature, seed):
    inputs = make_inputs(rows, vocab_size, dim, torch.float64, seed=seed)
    hidden, weight, bias, target = (x.detach() for x in inputs)

    def call(weight, bias, target):
        out = linear_logprob(
            hidden, weight, target, bias=bias, temperature=temperature, needs_entropy=True
        )
        return out

    out = call(weight, bias, target)
    assert (out.logprob <= 1e-12).all()
    assert (out.entropy >= -1e-12).all()
    assert (out.entropy <= math.log(vocab_size) + 1e-12).all()
    is_live = target != -100
    for field in out:
        assert (field[~is_live] == 0).all()
    # Adding a constant to all logits moves the lse by it and nothing else.
    shifted = call(weight, bias + 2.5, target)
    torch.testing.assert_close(shifted.logprob, out.logprob)
    torch.testing.assert_close(shifted.lse, out.lse + 2.5 / temperature * is_live)
    # The order of the classes does not matter.
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    position = order.argsort()
    renamed = torch.where(is_live, position[target.where(is_live, 0)], -100)
    permuted = call(weight[order], bias[order], renamed)
    torch.testing.assert_close(permuted.logprob, out.logprob)
    torch.testing.assert_close(permuted.entropy, out.entropy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_budget_does_not_change_the_result(dtype):
    inputs = make_inputs(100, 40, 8, dtype)
    work = Workload(Operator.LOGPROB, 100, 40, 8, dtype, needs_entropy=True)

    def run(budget):
        rows = linear_logprob(
            *inputs[:2],
            inputs.target,
            bias=inputs.bias,
            needs_entropy=True,
            memory_budget_bytes=budget,
        )
        return [*rows, *gradients(rows, inputs)]

    plan = memory_plan(work, Backend.REFERENCE, 20_000)
    assert 1 < plan.chunk_rows < 40  # several chunks
    assert dtype == torch.float64 or plan.tile_bytes == 40 * 8 * 4
    for one, other in zip(run(20_000), run(None), strict=True):
        rtol = 1e-12 if one.dtype == torch.float64 else 2 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


def test_weight_tiles_do_not_change_the_result():
    inputs = make_inputs(20, 400, 8, torch.bfloat16)
    work = Workload(Operator.LOGPROB, 20, 400, 8, torch.bfloat16)
    assert memory_plan(work, Backend.REFERENCE, 30_000).tile_bytes < 400 * 8 * 4
    whole = linear_logprob(*inputs[:2], inputs.target).logprob
    tiled = linear_logprob(*inputs[:2], inputs.target, memory_budget_bytes=30_000).logprob
    torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=1e-6)


def test_repeats_bitwise():
    inputs = make_inputs(64, 300, 32, torch.float32)

    def run():
        rows = linear_logprob(*inputs[:2], inputs.target, bias=inputs.bias, needs_entropy=True)
        return [*rows, *gradients(rows, inputs)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_leading_dimensions_come_back():
    inputs = make_inputs(12, 9, 5, torch.float32)
    flat = linear_logprob(*inputs[:2], inputs.target, needs_entropy=True)
    shaped = linear_logprob(
        inputs.hidden.view(2, 3, 2, 5),
        inputs.weight,
        inputs.target.view(2, 3, 2),
        needs_entropy=True,
    )
    for one, other in zip(shaped, flat, strict=True):
        assert torch.equal(one, other.view(2, 3, 2))


def test_entropy_is_empty_unless_asked_for():
    inputs = make_inputs(4, 9, 5, torch.float32)
    assert linear_logprob(*inputs[:2], inputs.target).entropy.shape == (0,)


def test_no_rows_and_all_rows_ignored():
    weight = torch.randn(5, 3, requires_grad=True)
    for rows in (0, 4):
        hidden = torch.randn(rows, 3, requires_grad=True)
        out = linear_logprob(hidden, weight, torch.full((rows,), -100))
        assert torch.equal(out.logprob, torch.zeros(rows))
        d_hidden, d_weight = torch.autograd.grad(out.logprob.sum(), (hidden, weight))
        assert torch.equal(d_hidden, torch.zeros(rows, 3))
        assert torch.equal(d_weight, torch.zeros(5, 3))


def test_ignored_rows_are_not_read():
    inputs = make_inputs(16, 9, 5, torch.float32)
    hidden = inputs.hidden.detach().clone()
    hidden[inputs.target == -100] = torch.nan
    out = linear_logprob(hidden.requires_grad_(), inputs.weight, inputs.target)
    grads = torch.autograd.grad(out.logprob.sum(), (hidden, inputs.weight))
    assert all(x.isfinite().all() for x in (out.logprob, *grads))


def test_minus_inf_logits_have_probability_zero():
    hidden = torch.randn(3, 4, requires_grad=True)
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.zeros(6)
    bias[:3] = -torch.inf
    target = torch.tensor([0, 4, 5])
    out = linear_logprob(hidden, weight, target, bias=bias, needs_entropy=True)
    small = linear_logprob(hidden, weight[3:], target - 3, ignore_index=-3, needs_entropy=True)
    torch.testing.assert_close(out.logprob[1:], small.logprob[1:])
    torch.testing.assert_close(out.entropy[1:], small.entropy[1:])
    assert out.logprob[0] == -torch.inf
    total = out.logprob[1:].sum() + out.entropy.sum()
    grads = torch.autograd.grad(total, (hidden, weight))
    assert all(x.isfinite().all() for x in grads)


def test_large_common_offset_far_below_zero():
    hidden, weight = torch.ones(1, 1, **FP64), torch.tensor([[-5000.0], [-5001.0]], **FP64)
    out = linear_logprob(hidden, weight, torch.tensor([0]))
    torch.testing.assert_close(out.logprob, torch.tensor([-math.log1p(math.exp(-1))], **FP64))


def test_target_gradient_keeps_its_digits_near_probability_one():
    hidden = torch.tensor([[20.0]], **FP64, requires_grad=True)
    out = linear_logprob(hidden, torch.tensor([[1.0], [0.0]], **FP64), torch.tensor([0]))
    (grad,) = torch.autograd.grad(out.logprob, hidden)
    assert grad.item() == pytest.approx(math.exp(-20), rel=1e-6)


def test_frozen_tensors_get_no_gradient():
    inputs = make_inputs(8, 9, 5, torch.float32)
    out = linear_logprob(inputs.hidden, inputs.weight.detach(), inputs.target)
    assert torch.autograd.grad(out.logprob.sum(), inputs.hidden)[0].abs().sum() > 0
    out = linear_logprob(inputs.hidden.detach(), inputs.weight, inputs.target)
    assert torch.autograd.grad(out.logprob.sum(), inputs.weight)[0].abs().sum() > 0


def test_explicit_backends_never_fall_back():
    exact = torch.zeros(3, 4).double(), torch.zeros(5, 4).double()
    with pytest.raises(BackendUnavailableError, match=r"NATIVE cannot run: .* float64"):
        linear_logprob(*exact, torch.zeros(3).long(), backend=Backend.NATIVE)
    with pytest.raises(
        BackendUnavailableError, match=r"TRITON_INTERPRET=1|triton is not installed"
    ):
        linear_logprob(
            torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long(), backend=Backend.TRITON
        )


def test_double_backward_raises():
    inputs = make_inputs(4, 5, 3, torch.float32)
    out = linear_logprob(*inputs[:2], inputs.target)
    (grad,) = torch.autograd.grad(out.logprob.sum(), inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("needs_entropy", [False, True])
def test_opcheck(needs_entropy):
    x = make_inputs(6, 9, 5, torch.float32)
    scalars = (0.9, None, 1.0, "", -100)
    args = (
        x.hidden,
        x.weight,
        x.bias,
        x.target,
        None,
        *scalars,
        needs_entropy,
        True,
        None,
        "reference",
    )
    torch.library.opcheck(linear_logprob_op, args)
    rows = [row.detach() for row in linear_logprob_op(*args)]
    wanted = (True, False, True)
    args = (*rows, rows[2], *(t.detach() for t in x), *scalars, *wanted, None, "reference")
    torch.library.opcheck(linear_logprob_backward_op, args)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_gradients_of_strided_inputs_are_what_the_fake_promises(which):
    x = make_inputs(6, 9, 5, torch.float32)
    strided = x._replace(**{which: getattr(x, which).detach().t().contiguous().t()})
    target = x.target.clamp(min=0)  # all rows live: nothing is gathered into a fresh tensor
    scalars = (0.9, None, 1.0, "", -100)
    args = (
        *(t.detach() for t in strided[:3]),
        target,
        None,
        *scalars,
        False,
        True,
        None,
        "reference",
    )
    rows = linear_logprob_op(*args)
    args = (*rows, rows[2], *args[:4], *scalars, True, True, True, None, "reference")
    torch.library.opcheck(linear_logprob_backward_op, args)


def test_compiles_as_one_graph():
    inputs = make_inputs(8, 9, 5, torch.float32)

    def call(hidden, weight, target):
        out = linear_logprob(hidden * 2, weight, target, needs_entropy=True)
        return out.logprob.sum() + out.entropy.mean()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    args = (*inputs[:2], inputs.target)
    expected = torch.autograd.grad(call(*args), inputs[:2])
    for one, other in zip(torch.autograd.grad(compiled(*args), inputs[:2]), expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_casts_as_linear_does():
    inputs = make_inputs(8, 9, 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprob(*inputs[:2], inputs.target)
    low = inputs.to(torch.bfloat16)
    assert torch.equal(out.logprob, linear_logprob(*low[:2], low.target).logprob)
    (grad,) = torch.autograd.grad(out.logprob.sum(), inputs.weight)
    assert grad.dtype == torch.float32


def test_activation_checkpointing():
    inputs = make_inputs(8, 9, 5, torch.float32)

    def call(hidden):
        return linear_logprob(hidden, inputs.weight, inputs.target).logprob.sum()

    (expected,) = torch.autograd.grad(call(inputs.hidden), inputs.hidden)
    rerun = checkpoint(call, inputs.hidden, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(rerun, inputs.hidden)[0], expected)
