"""linear_policy_loss: closed forms, gradients, clipping, masks, budget, validation, torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from xopd_kernels import Backend, BackendUnavailableError, linear_logprob, linear_policy_loss
from xopd_kernels.linear_policy_loss.op import linear_policy_loss_op
from xopd_kernels.records import PolicyTerms
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logprob,
    dense_policy_loss,
    make_head,
    make_inputs,
    make_terms,
)

TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "all": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8},
}
CLIP = {"clip_low": 0.1, "clip_high": 0.3, "advantage_clamp": 0.8}
FP64 = {"dtype": torch.float64}


def make_case(shape, dtype, distribution=Distribution.RANDOM, seed=0):
    inputs = make_inputs(*shape, dtype, distribution, seed=seed)
    row = dense_logprob(inputs.hidden, make_head(inputs), inputs.target)
    return inputs, make_terms(row.logprob, seed)


def count_gemms(monkeypatch):
    """The list that the matrix products of the operators are appended to."""
    gemms = []
    for owner, name in ((torch, "mm"), (torch.Tensor, "addmm_")):
        original = getattr(owner, name)

        def counted(*args, original=original, **options):
            gemms.append(original)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)
    return gemms


def policy_terms(terms):
    return PolicyTerms(terms.teacher_logprob, None, *terms[1:], *CLIP.values())


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs[:3], allow_unused=True)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("distribution", Distribution)
def test_equals_the_dense_formula_in_fp64(transform, has_bias, distribution):
    inputs, terms = make_case((37, 53, 11), torch.float64, distribution)
    head = make_head(inputs, has_bias, **transform)
    expected = dense_policy_loss(inputs.hidden, head, inputs.target, policy_terms(terms))
    actual = linear_policy_loss(
        *inputs[:2], inputs.target, **terms._asdict(), **CLIP, bias=head.bias, **transform
    )
    assert actual.is_clipped.any()
    assert (~actual.is_clipped).any()
    is_live = (inputs.target != -100) & (terms.token_weight != 0)
    for name, one, other in zip(actual._fields, actual, expected, strict=True):
        if name in ("logprob", "lse"):  # the dense version does not know token_weight there
            other = torch.where(is_live, other, 0.0)
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12, msg=name)
    grads = zip(gradients(actual.loss, inputs), gradients(expected.loss, inputs), strict=True)
    for one, other in grads:
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "is_clipped"),
    [
        (2.0, 1.0, -2.0, -2.0, False),
        (2.0, 1.5, -2.4, 0.0, True),
        (2.0, 0.5, -1.0, -1.0, False),
        (-2.0, 1.5, 3.0, 3.0, False),
        (-2.0, 0.5, 1.6, 0.0, True),
        (0.0, math.inf, 0.0, 0.0, False),
    ],
)
def test_clipped_surrogate_by_hand(advantage, ratio, loss, slope, is_clipped):
    """Two classes with equal logits: logprob = -log 2, d logprob / d z_0 = 1/2."""
    hidden = torch.zeros(1, 2, **FP64)
    bias = torch.zeros(2, **FP64, requires_grad=True)
    out = linear_policy_loss(
        hidden,
        torch.ones(2, 2, **FP64),
        torch.tensor([0]),
        bias=bias,
        advantage=torch.tensor([advantage], **FP64),
        old_logprob=torch.tensor([-math.log(2) - math.log(ratio)], **FP64),
    )
    (grad,) = torch.autograd.grad(out.loss, bias)
    assert out.loss.item() == pytest.approx(loss)
    assert grad[0].item() == pytest.approx(slope / 2)
    assert out.is_clipped.item() is is_clipped
    assert out.ratio.item() == pytest.approx(ratio)


def test_without_old_logprob_it_is_the_policy_gradient():
    inputs, terms = make_case((20, 15, 6), torch.float64)
    out = linear_policy_loss(*inputs[:2], inputs.target, advantage=terms.teacher_logprob)
    logprob = linear_logprob(*inputs[:2], inputs.target).logprob
    expected = torch.autograd.grad(-(terms.teacher_logprob * logprob).sum(), inputs[:2])
    for one, other in zip(torch.autograd.grad(out.loss, inputs[:2]), expected, strict=True):
        torch.testing.assert_close(one, other)
    is_live = inputs.target != -100
    assert torch.equal(out.ratio, is_live.double())
    assert not out.is_clipped.any()


def test_reverse_kl_gradient_is_zero_at_the_teacher():
    inputs, _ = make_case((20, 15, 6), torch.float64)
    teacher = linear_logprob(*inputs[:2], inputs.target).logprob.detach()
    out = linear_policy_loss(*inputs[:2], inputs.target, teacher_logprob=teacher)
    assert all((x == 0).all() for x in torch.autograd.grad(out.loss, inputs[:2]))


def test_only_the_loss_has_a_gradient():
    inputs, terms = make_case((9, 7, 5), torch.float32)
    out = linear_policy_loss(*inputs[:2], inputs.target, advantage=terms.teacher_logprob)
    assert out.loss.requires_grad
    assert out.loss.shape == ()
    assert not any(field.requires_grad for field in out[1:])
    with torch.no_grad():
        scored = linear_policy_loss(*inputs[:2], inputs.target, advantage=terms.teacher_logprob)
    assert not scored.loss.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(scored, out, strict=True))


def test_upstream_gradient_scales():
    inputs, terms = make_case((9, 7, 5), torch.float64)
    out = linear_policy_loss(*inputs[:2], inputs.target, advantage=terms.teacher_logprob)
    one = torch.autograd.grad(out.loss, inputs[:2], retain_graph=True)
    two = torch.autograd.grad(out.loss * -2.5, inputs[:2])
    for small, large in zip(one, two, strict=True):
        torch.testing.assert_close(large, small * -2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("shape", [(33, 70, 17), (64, 1000, 48)])
def test_error_budget(dtype, distribution, shape):
    inputs, terms = make_case(shape, dtype, distribution)
    # The advantages are given: with the teacher's they would differ with the log-prob.
    given = PolicyTerms(None, terms.teacher_logprob, None, terms.token_weight, 0.2, 0.2, 10.0)
    exact = inputs.to(torch.float64)
    actual = linear_policy_loss(
        *inputs[:2],
        inputs.target,
        bias=inputs.bias,
        advantage=given.advantage,
        token_weight=given.token_weight,
    )
    results = [[actual.logprob, *gradients(actual.loss, inputs)]]
    for x in (inputs, exact):
        out = dense_policy_loss(x.hidden, make_head(x, True), x.target, given)
        results.append([out.logprob * (given.token_weight != 0), *gradients(out.loss, x)])
    for name, *values in zip(("logprob", "hidden", "weight", "bias"), *results, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("offset", [-1024.0, 1024.0, 8192.0])
def test_error_budget_of_a_common_offset(offset):
    inputs = make_inputs(64, 1000, 48, torch.float32, offset=offset)
    advantage = torch.randn(64, generator=torch.Generator().manual_seed(1))
    given = PolicyTerms(None, advantage, None, None, 0.2, 0.2, 10.0)
    out = linear_policy_loss(*inputs[:2], inputs.target, bias=inputs.bias, advantage=advantage)
    results = [gradients(out.loss, inputs)]
    for x in (inputs, inputs.to(torch.float64)):
        loss = dense_policy_loss(x.hidden, make_head(x, True), x.target, given).loss
        results.append(gradients(loss, x))
    for name, *values in zip(("hidden", "weight", "bias"), *results, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("name", ["teacher_logprob", "advantage", "old_logprob", "token_weight"])
def test_the_per_token_inputs_are_constants(name):
    inputs, terms = make_case((9, 7, 5), torch.float32)
    call = {"advantage": terms.teacher_logprob}
    if name == "teacher_logprob":
        call = {}
    call[name] = terms.teacher_logprob.clone().requires_grad_()
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    assert not linear_policy_loss(hidden, weight, inputs.target, **call).loss.requires_grad


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    vocab_size=st.integers(1, 50),
    dim=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_masked_rows_change_nothing(rows, vocab_size, dim, seed):
    inputs, terms = make_case((rows, vocab_size, dim), torch.float64, seed=seed)
    out = linear_policy_loss(*inputs[:2], inputs.target, **terms._asdict())
    grads = torch.autograd.grad(out.loss, inputs[:2])
    is_live = (inputs.target != -100) & (terms.token_weight != 0)
    for field in out[1:]:
        assert (field[~is_live] == 0).all()
    assert (grads[0][~is_live] == 0).all()
    kept = [x[is_live] for x in (inputs.hidden, inputs.target, *terms)]
    few = linear_policy_loss(
        kept[0],
        inputs.weight,
        kept[1],
        teacher_logprob=kept[2],
        old_logprob=kept[3],
        token_weight=kept[4],
    )
    torch.testing.assert_close(few.loss, out.loss)
    torch.testing.assert_close(torch.autograd.grad(few.loss, inputs.weight)[0], grads[1])


def test_masked_infinities_stay_out():
    inputs, terms = make_case((16, 9, 5), torch.float32)
    dead = inputs.target == -100
    hidden = inputs.hidden.detach().clone().masked_fill_(dead[:, None], torch.nan)
    teacher = terms.teacher_logprob.masked_fill(dead, -torch.inf)
    out = linear_policy_loss(
        hidden.requires_grad_(), inputs.weight, inputs.target, teacher_logprob=teacher
    )
    grads = torch.autograd.grad(out.loss, (hidden, inputs.weight))
    assert all(x.isfinite().all() for x in (*out[:5], *grads))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_budget_does_not_change_the_result(dtype):
    inputs, terms = make_case((100, 40, 8), dtype)

    def run(budget):
        out = linear_policy_loss(
            *inputs[:2],
            inputs.target,
            bias=inputs.bias,
            softcap=5.0,
            memory_budget_bytes=budget,
            **terms._asdict(),
        )
        return [*out, *gradients(out.loss, inputs)]

    for one, other in zip(run(20_000), run(None), strict=True):
        eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        rtol = 1e-12 if one.dtype == torch.float64 else 2 * eps
        torch.testing.assert_close(one, other, rtol=rtol, atol=4 * rtol)


def test_rows_without_a_gradient_are_left_out_of_the_gradient_gemms(monkeypatch):
    """Clipped rows and rows of advantage 0: counted at the GEMM, which is what they would cost."""
    inputs, terms = make_case((64, 30, 8), torch.float32)
    advantage = terms.teacher_logprob.masked_fill(torch.arange(64) % 3 == 0, 0.0)
    call = {"advantage": advantage, "old_logprob": terms.old_logprob, "clip_high": 0.05}
    sizes = []
    original = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda *args: sizes.append(len(args[0])) or original(*args)
    )
    out = linear_policy_loss(*inputs[:2], inputs.target, **call)
    is_dead = (inputs.target == -100) | out.is_clipped | (out.advantage == 0)
    assert 0 < is_dead.sum() < 64
    assert sizes == [64 - is_dead.sum()]
    d_hidden, d_weight = gradients(out.loss, inputs)[:2]
    assert (d_hidden[is_dead] == 0).all()
    terms = PolicyTerms(None, advantage, terms.old_logprob, None, 0.2, 0.05, 10.0)
    dense = dense_policy_loss(inputs.hidden, make_head(inputs), inputs.target, terms)
    for one, other in zip((d_hidden, d_weight), gradients(dense.loss, inputs), strict=False):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_tensor_skips_its_gemm(frozen, monkeypatch):
    """Forward GEMM plus one: counted, because a skipped GEMM is a promise about cost."""
    inputs, terms = make_case((9, 7, 5), torch.float32)
    tensors = {"hidden": inputs.hidden, "weight": inputs.weight}
    tensors[frozen] = tensors[frozen].detach()
    gemms = count_gemms(monkeypatch)
    out = linear_policy_loss(**tensors, target=inputs.target, advantage=terms.teacher_logprob)
    assert len(gemms) == 2
    (other,) = (x for x in tensors.values() if x.requires_grad)
    assert torch.autograd.grad(out.loss, other)[0].abs().sum() > 0


def test_explicit_backends_never_fall_back():
    with pytest.raises(BackendUnavailableError, match=r"NATIVE cannot run: .* float64"):
        linear_policy_loss(
            torch.zeros(3, 4).double(),
            torch.zeros(5, 4).double(),
            torch.zeros(3).long(),
            advantage=torch.zeros(3),
            backend=Backend.NATIVE,
        )


def test_double_backward_raises():
    inputs, terms = make_case((4, 5, 3), torch.float32)
    out = linear_policy_loss(*inputs[:2], inputs.target, advantage=terms.teacher_logprob)
    (grad,) = torch.autograd.grad(out.loss, inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not differentiate twice"):
        grad.sum().backward()


def test_opcheck():
    x, terms = make_case((6, 9, 5), torch.float32)
    per_token = (terms.teacher_logprob, None, terms.old_logprob, terms.token_weight)
    scalars = (0.2, 0.2, 10.0, 0.9, 5.0, 1.0, "", -100, None, "reference", True, True, True)
    args = (x.hidden, x.weight, x.bias, x.target, *per_token, None, *scalars)
    torch.library.opcheck(linear_policy_loss_op, args)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_gradients_of_strided_inputs_are_what_the_fake_promises(which):
    x, terms = make_case((6, 9, 5), torch.float32)
    strided = getattr(x, which).detach().t().contiguous().t().requires_grad_()
    x = x._replace(**{which: strided, "target": x.target.clamp(min=0)})  # all rows live
    scalars = (0.2, 0.2, 10.0, 0.9, 5.0, 1.0, "", -100, None, "reference", True, True, True)
    args = (*x, terms.teacher_logprob, None, None, None, None, *scalars)
    torch.library.opcheck(linear_policy_loss_op, args)


def test_compiles_as_one_graph():
    inputs, terms = make_case((8, 9, 5), torch.float32)

    def call(hidden, weight, target, teacher):
        out = linear_policy_loss(hidden * 2, weight, target, teacher_logprob=teacher)
        return out.loss, out.ratio.mean()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    args = (*inputs[:2], inputs.target, terms.teacher_logprob)
    expected = torch.autograd.grad(call(*args)[0], inputs[:2])
    actual = torch.autograd.grad(compiled(*args)[0], inputs[:2])
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_compiles_for_any_number_of_tokens():
    inputs, terms = make_case((9, 7, 5), torch.float32)

    def call(hidden, target, teacher, temperature):
        out = linear_policy_loss(
            hidden, inputs.weight, target, teacher_logprob=teacher, temperature=temperature
        )
        return out.loss

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 6, 3):
        args = (
            inputs.hidden[:rows],
            inputs.target[:rows],
            terms.teacher_logprob[:rows],
            0.5 + rows,
        )
        assert torch.equal(compiled(*args), call(*args))


def test_autocast_leaves_the_per_token_inputs_alone():
    inputs, terms = make_case((8, 9, 5), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_policy_loss(*inputs[:2], inputs.target, **terms._asdict())
    low = inputs.to(torch.bfloat16)
    expected = linear_policy_loss(*low[:2], low.target, **terms._asdict())
    assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))
    assert torch.autograd.grad(out.loss, inputs.weight)[0].dtype == torch.float32


def test_activation_checkpointing():
    inputs, terms = make_case((8, 9, 5), torch.float32)

    def call(hidden):
        return linear_policy_loss(
            hidden, inputs.weight, inputs.target, advantage=terms.teacher_logprob
        ).loss

    (expected,) = torch.autograd.grad(call(inputs.hidden), inputs.hidden)
    rerun = checkpoint(call, inputs.hidden, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(rerun, inputs.hidden)[0], expected)
