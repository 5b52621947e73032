"""Bugs of other projects' fused heads, one regression test each: gradients and the policy loss."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from xopd_kernels import linear_logprob, linear_policy_loss
from xopd_kernels.testing import dense_logprob, make_head, make_inputs
from xopd_kernels.testing.cases import smallest_memory_budget


def grads_of(total, *leaves):
    return torch.autograd.grad(total, leaves, retain_graph=True)


def small(rows=9, vocab_size=7, dim=5, dtype=torch.float64, seed=0):
    """Inputs without ignored rows."""
    x = make_inputs(rows, vocab_size, dim, dtype, seed=seed)
    return x._replace(target=x.target.clamp(min=0))


def test_per_token_upstream_gradients():
    """Liger #968, PR1298: with reduction none, d_weight was scaled by grad_output[0] alone."""
    x = small()
    upstream = torch.linspace(-2, 3, 9, dtype=torch.float64)
    ours = linear_logprob(*x[:2], x.target).logprob
    dense = dense_logprob(x.hidden, make_head(x), x.target).logprob
    for a, b in zip(
        grads_of((ours * upstream).sum(), *x[:2]),
        grads_of((dense * upstream).sum(), *x[:2]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_strided_upstream_gradients():
    """verl PR6960: a strided or expanded upstream gradient was read as if contiguous."""
    x = small()
    logprob = linear_logprob(*x[:2], x.target).logprob
    wide = torch.arange(18, dtype=torch.float64).view(9, 2)
    for upstream in (wide[:, 1], torch.tensor(2.0, dtype=torch.float64).expand(9)):
        actual = torch.autograd.grad(logprob, x[:2], upstream, retain_graph=True)
        expected = torch.autograd.grad(logprob, x[:2], upstream.clone(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rows", [0, 4])
def test_no_live_token_gives_zero_with_a_graph(rows):
    """Liger #177 (0/0), TRL PR6859, prime-rl PR1961: no graph, so other ranks hang."""
    hidden = torch.randn(rows, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    target = torch.full((rows,), -100)
    loss = linear_policy_loss(hidden, weight, target, advantage=torch.ones(rows)).loss
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in grads_of(loss, hidden, weight))


def test_a_late_sparse_mask_keeps_its_gradient():
    """Unsloth #5230: zero gradients where only late tokens are live, in a later chunk."""
    x = small(rows=40)
    target = torch.full((40,), -100)
    target[37] = 3

    def call(**options):
        return linear_policy_loss(*x[:2], target, advantage=torch.ones(40).double(), **options)

    for options in ({}, {"memory_budget_bytes": smallest_memory_budget(call)}):
        d_hidden, d_weight = grads_of(call(**options).loss, *x[:2])
        one = linear_logprob(x.hidden[37:38], x.weight, target[37:38]).logprob.sum()
        expected = grads_of(-one, *x[:2])
        torch.testing.assert_close(d_hidden, expected[0])
        torch.testing.assert_close(d_weight, expected[1])
        assert d_hidden[37].norm() > 0


def test_a_first_chunk_without_gradient_leaves_no_garbage():
    """Found in design: the first chunk writes d_weight; here all of its rows are clipped."""
    x = small(rows=40)
    advantage = torch.zeros(40).double()
    advantage[30:] = 1.0

    def call(**options):
        return linear_policy_loss(*x[:2], x.target, advantage=advantage, **options)

    expected = grads_of(call().loss, x.weight)[0]
    torch.full((3_000_000,), torch.nan).sum()  # memory that an empty tensor may get
    actual = grads_of(call(memory_budget_bytes=smallest_memory_budget(call)).loss, x.weight)[0]
    torch.testing.assert_close(actual, expected)


def test_the_gradient_does_not_depend_on_the_micro_batches():
    """Liger #1082 (GRPO drift), TRL PR5890, verl #7200: normaliser and ratio for each part."""
    x = small(rows=12)
    rng = torch.Generator().manual_seed(1)
    advantage, shift = torch.randn(2, 12, generator=rng, dtype=torch.float64)
    old = linear_logprob(*x[:2], x.target).logprob.detach() + 0.3 * shift
    weight = torch.full((12,), 1 / 12, dtype=torch.float64)

    def loss(rows):
        return linear_policy_loss(
            x.hidden[rows],
            x.weight,
            x.target[rows],
            advantage=advantage[rows],
            old_logprob=old[rows],
            token_weight=weight[rows],
        ).loss

    whole = loss(slice(None))
    for cuts in ([0, 6, 12], [0, 1, 4, 12]):
        parts = sum(loss(slice(a, b)) for a, b in itertools.pairwise(cuts))
        torch.testing.assert_close(parts, whole)
        for a, b in zip(grads_of(parts, *x[:2]), grads_of(whole, *x[:2]), strict=True):
            torch.testing.assert_close(a, b)


def test_the_importance_ratio_is_used():
    """TRL PR5890: without the ratio a stale rollout gets the on-policy gradient."""
    x = small(rows=1)
    logprob = linear_logprob(*x[:2], x.target).logprob
    call = {"advantage": torch.ones(1).double(), "clip_high": 1.0}
    on_policy = linear_policy_loss(*x[:2], x.target, **call).loss
    stale = linear_policy_loss(*x[:2], x.target, old_logprob=logprob - math.log(1.5), **call).loss
    fresh, old = (grads_of(loss, x.weight)[0] for loss in (on_policy, stale))
    torch.testing.assert_close(old, 1.5 * fresh)


def test_a_lora_head_is_trained():
    """Unsloth #208, #4098, #9331: a LoRA on lm_head stays silently untrained."""
    x = small()
    base = x.weight.detach()
    rng = torch.Generator().manual_seed(0)
    down = torch.randn(2, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    up = torch.randn(7, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    loss = linear_policy_loss(
        x.hidden, base + up @ down, x.target, advantage=torch.ones(9).double()
    ).loss
    dense = dense_logprob(x.hidden, make_head(x._replace(weight=base + up @ down)), x.target)
    expected = grads_of(-dense.logprob.sum(), down, up)
    for a, b in zip(grads_of(loss, down, up), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_head_still_gives_d_hidden():
    """Unsloth #4098: a frozen head must not cut the graph; FLA PR1253: nor compute d_weight."""
    x = small()
    weight = x.weight.detach()
    out = linear_policy_loss(x.hidden, weight, x.target, advantage=torch.ones(9).double())
    assert grads_of(out.loss, x.hidden)[0].norm() > 0
    assert weight.grad is None


def test_unlikely_classes_keep_their_gradient():
    """CCE #14, #18: a block filter drops gradients below 2^-12; pre-training diverges."""
    hidden = torch.ones(1, 1, dtype=torch.float32)
    weight = torch.zeros(64, 1)
    weight[0] = 14.0
    bias = torch.zeros(64, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.tensor([0]), bias=bias)
    (grad,) = grads_of(out.logprob.sum(), bias)
    p = math.exp(-14) / (1 + 63 * math.exp(-14))
    torch.testing.assert_close(grad[1:], torch.full((63,), -p), rtol=1e-6, atol=0)


def test_the_inputs_keep_their_values():
    """Liger #272, PR1251: the gradient was stored into the input: wrong upstream."""
    x = small()
    source = x.hidden.detach().clone().requires_grad_()
    hidden = source * 2
    before = [t.detach().clone() for t in (hidden, x.weight, x.target)]
    loss = linear_policy_loss(hidden, x.weight, x.target, advantage=torch.ones(9).double()).loss
    (grad,) = grads_of(loss + hidden.square().sum(), source)
    for tensor, old in zip((hidden, x.weight, x.target), before, strict=True):
        assert torch.equal(tensor, old)
    alone = hidden.detach().requires_grad_()
    again = linear_policy_loss(alone, x.weight, x.target, advantage=torch.ones(9).double()).loss
    torch.testing.assert_close(grad, 2 * grads_of(again, alone)[0] + 4 * hidden)


@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_a_second_backward_gives_the_same(factor):
    """triton #4004: an in-place gradient hides that the second backward is wrong."""
    x = small()
    loss = linear_policy_loss(*x[:2], x.target, advantage=torch.ones(9).double()).loss * factor
    first, second = (grads_of(loss, *x[:2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_of_the_lse_is_p():
    """NeMo Automodel PR2428: the backward drops sum(p) of upstream gradients that are not 1."""
    x = small()
    lse = linear_logprob(*x[:2], x.target, bias=x.bias).lse
    (d_bias,) = grads_of(lse.sum(), x.bias)
    p = functional.linear(x.hidden, x.weight, x.bias).softmax(-1).sum(0)
    torch.testing.assert_close(d_bias, p)


def test_compiled_ignored_rows():
    """Liger PR1338: torch.compile was silently wrong at the rows of ignore_index."""
    x = make_inputs(16, 9, 5, torch.float32)
    assert (x.target == -100).any()

    def call(hidden, weight, target):
        return linear_logprob(hidden, weight, target).logprob

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*x[:2], x.target)
    eager = call(*x[:2], x.target)
    assert torch.equal(compiled, eager)
    for a, b in zip(grads_of(compiled.sum(), *x[:2]), grads_of(eager.sum(), *x[:2]), strict=True):
        assert torch.equal(a, b)


def test_masked_tokens_cannot_overflow():
    """slime PR2198, miles PR1363, prime-rl PR1329, AReaL PR1412: exp of a masked token * 0."""
    x = small()
    dead = torch.zeros(9, dtype=torch.bool)
    dead[::2] = True
    weight = (~dead).double()
    old = torch.where(dead, -1e30, -1.0)
    advantage = torch.where(dead, torch.nan, 1.0)
    out = linear_policy_loss(
        *x[:2], x.target, advantage=advantage, old_logprob=old, token_weight=weight
    )
    grads = grads_of(out.loss, *x[:2])
    assert all(t.isfinite().all() for t in (out.loss, *grads))
    assert (grads[0][dead] == 0).all()


def test_an_overflowing_clipped_ratio_has_no_gradient():
    """OpenRLHF PR1335: finite forward, 0 * inf backward, where the clip holds the ratio."""
    x = small()
    old = torch.full((9,), -1e4, dtype=torch.float64)
    out = linear_policy_loss(*x[:2], x.target, advantage=torch.ones(9).double(), old_logprob=old)
    assert out.is_clipped.all()
    torch.testing.assert_close(out.loss, torch.tensor(-1.2 * 9, dtype=torch.float64))
    assert all((grad == 0).all() for grad in grads_of(out.loss, *x[:2]))


def test_a_nan_is_not_hidden_by_the_clip():
    """Triton's maximum drops a NaN, so a clip turns a broken log-prob into a healthy ratio."""
    x = small()
    hidden = x.hidden.detach().clone()
    hidden[2] = torch.nan
    out = linear_policy_loss(
        hidden, x.weight, x.target, advantage=torch.ones(9), old_logprob=torch.zeros(9)
    )
    assert out.ratio[2].isnan()
    assert out.loss.isnan()
    assert out.ratio[[0, 1, 3]].isfinite().all()


def test_the_advantage_points_to_the_teacher():
    """slime PR2254: the direction of the KL. A step must raise what the teacher likes more."""
    x = small(rows=1)
    logprob = linear_logprob(*x[:2], x.target).logprob
    out = linear_policy_loss(*x[:2], x.target, teacher_logprob=logprob.detach() + 0.5)
    torch.testing.assert_close(out.advantage, torch.full((1,), 0.5, dtype=torch.float64))
    (step,) = grads_of(out.loss, x.weight)
    better = linear_logprob(x.hidden, x.weight - 0.01 * step, x.target).logprob
    assert better > logprob
