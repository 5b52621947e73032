"""Bugs of other projects' fused heads, one regression test each; the docstring names the bug.

Here: values. Gradients and divergences have files of their own.
"""

import math

import pytest
import torch
from torch.nn import functional

from xopd_kernels import Backend, linear_logprob, linear_policy_loss
from xopd_kernels.testing import (
    Distribution,
    assert_within_budget,
    dense_logprob,
    make_head,
    make_inputs,
)
from xopd_kernels.testing.cases import rounding_of_factors, smallest_memory_budget

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


def grads_of(total, *leaves):
    return torch.autograd.grad(total, leaves, retain_graph=True)


def small(rows=9, vocab_size=7, dim=5, dtype=torch.float64, seed=0):
    """Inputs without ignored rows."""
    x = make_inputs(rows, vocab_size, dim, dtype, seed=seed)
    return x._replace(target=x.target.clamp(min=0))


@pytest.mark.parametrize("which", [0, 1], ids=["d_hidden", "d_weight"])
def test_bf16_sums_do_not_drift_with_the_number_of_chunks(which):
    """Liger #512, #827, #1391: d_weight summed in bf16; verl: d_hidden += in bf16 over slices."""
    x = make_inputs(400, 300, 16, torch.bfloat16)
    exact = x.to(torch.float64)
    rows = dense_logprob(exact.hidden, make_head(exact), x.target)
    truth = grads_of(rows.logprob.sum(), exact.hidden, exact.weight)[which]

    def call(**options):
        return linear_logprob(x.hidden, x.weight, x.target, **options)

    errors = []
    for options in ({}, {"memory_budget_bytes": smallest_memory_budget(call)}):
        loss = call(**options).logprob.sum()
        errors.append(relative_error(grads_of(loss, x.hidden, x.weight)[which], truth))
    assert errors[1] <= 1.05 * errors[0]
    # One rounding of the result and, where the GEMMs take bf16, one of the gradient by the logits.
    p = (exact.hidden @ exact.weight.T).softmax(1).detach()
    one = functional.one_hot(x.target.clamp(min=0), 300)
    d_logit = (one - p) * (x.target >= 0)[:, None]
    if rounding_of_factors(torch.bfloat16, 16):
        d_logit = d_logit.bfloat16().double()
    factors = (d_logit @ exact.weight, d_logit.T @ exact.hidden)[which].detach()
    assert errors[1] <= 1.05 * relative_error(factors.bfloat16(), truth)


def check_many_rows(device, backend):
    hidden = torch.randn(70_000, 1, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.tensor([[1.0], [-1.0]], device=device)
    target = torch.zeros(70_000, dtype=torch.int64, device=device)
    out = linear_logprob(hidden, weight, target, backend=backend)
    torch.testing.assert_close(out.logprob, functional.logsigmoid(2 * hidden[:, 0]))


def test_more_than_65535_rows():
    """Liger #1294: rows in grid.y crash from 65,536 tokens on."""
    check_many_rows("cpu", Backend.REFERENCE)


@pytest.mark.parametrize("backend", [pytest.param(Backend.TRITON, marks=gpu)])
def test_more_than_65535_rows_on_a_gpu(backend):
    """Liger #1294, in the kernels where it happened."""
    check_many_rows("cuda", backend)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_offsets_beyond_2_to_the_31(which):
    """Liger #803, #1246, TRL PR7266: a row's offset in 32 bits. The pages between are untouched."""
    x = make_inputs(3, 3, 4, torch.bfloat16)
    memory = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    far = memory.as_strided((3, 4), (2**30, 1)).copy_(getattr(x, which).detach())
    assert far.stride(0) * 2 == 2**31
    tensors = {name: getattr(x, name).detach() for name in ("hidden", "weight", "target")}
    expected = linear_logprob(**tensors)
    actual = linear_logprob(**(tensors | {which: far}))
    assert torch.equal(actual.logprob, expected.logprob)


@pytest.mark.parametrize("rows", [pytest.param(15_000, marks=gpu)])
def test_more_logits_than_2_to_the_31(rows):
    """Liger #803: row * V in 32 bits, from 14,135 rows of 151,936 classes on."""
    weight = torch.randn(151_936, 64, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16) / 8
    target = torch.randint(len(weight), (rows,), device="cuda")
    out = linear_logprob(hidden, weight, target, backend=Backend.TRITON)
    few = linear_logprob(hidden[-64:], weight, target[-64:], backend=Backend.REFERENCE)
    torch.testing.assert_close(out.logprob[-64:], few.logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [257, 1000, 1025])
def test_padding_takes_no_probability(vocab_size):
    """verl #2656, #2899 (log-probs up to +123 from padding), Unsloth PR10616 (under softcap)."""
    x = make_inputs(1, vocab_size, 8, torch.float32)
    every = torch.arange(vocab_size)
    hidden = x.hidden.detach().expand(vocab_size, 8)
    for softcap in (None, 5.0):
        logprob = linear_logprob(hidden, x.weight, every, softcap=softcap).logprob
        assert (logprob <= 0).all()
        torch.testing.assert_close(logprob.exp().sum(), torch.tensor(1.0))


def test_bf16_logits_do_not_round_a_logprob():
    """verl, TRL, mlx PR4520: log-probs of logits rounded to bf16, off by 0.06 and positive."""
    x = make_inputs(256, 500, 64, torch.bfloat16, Distribution.PEAKED)
    x = x._replace(target=x.target.clamp(min=0))
    exact = x.to(torch.float64)
    logprob = linear_logprob(x.hidden, x.weight, x.target, bias=x.bias).logprob
    truth = dense_logprob(exact.hidden, make_head(exact, True), x.target).logprob
    assert (logprob <= 0).all()
    assert (logprob - truth).abs().max() <= 1e-4
    rounded = functional.linear(x.hidden, x.weight, x.bias).float().log_softmax(-1)
    worst = (rounded.gather(1, x.target[:, None])[:, 0] - truth).abs().max()
    assert worst > 1e-2  # the case is one where the bug would show


@pytest.mark.parametrize("level", [-5000.0, -300.0, 8192.0])
def test_all_logits_far_from_zero(level):
    """verl kernels.py, SkyRL: the running maximum starts at 0; torch PR195829: large offsets."""
    x = small(dtype=torch.float32)
    bias = torch.full((7,), level)
    out = linear_logprob(x.hidden, x.weight, x.target, bias=bias, needs_entropy=True)
    exact = x.to(torch.float64)
    truth = dense_logprob(exact.hidden, make_head(exact), x.target)
    rounding = 2 * torch.finfo(torch.float32).eps * abs(level)
    torch.testing.assert_close(out.logprob.double(), truth.logprob, rtol=0, atol=rounding)
    torch.testing.assert_close(out.entropy.double(), truth.entropy, rtol=0, atol=rounding)


def test_order_of_scale_softcap_temperature():
    """TRL #6629, Megatron-Bridge #4665: softcap before the scale, or after the temperature."""
    hidden = torch.tensor([[2.0]], dtype=torch.float64)
    weight = torch.tensor([[3.0], [-1.0], [0.5]], dtype=torch.float64)
    out = linear_logprob(
        hidden, weight, torch.tensor([0]), temperature=0.5, softcap=4.0, logit_scale=0.25
    )
    capped = [4 * math.tanh(0.25 * 2 * w / 4) / 0.5 for w in (3.0, -1.0, 0.5)]
    expected = capped[0] - math.log(sum(math.exp(z) for z in capped))
    assert out.logprob.item() == pytest.approx(expected, rel=1e-12)


def test_temperature_divides_the_logits():
    """TRL PR3029, #4159: log-probs of raw logits against a policy that samples at T."""
    x = small(dtype=torch.float32)
    hot = linear_logprob(*x[:2], x.target, temperature=2.0)
    halved = linear_logprob(x.hidden / 2, x.weight, x.target)
    assert torch.equal(hot.logprob, halved.logprob)


def test_the_bias_counts_once():
    """CCE #52: the target's logit got its bias several times; negative losses."""
    x = small(dtype=torch.float32)
    bias = torch.linspace(-20, 20, 7)
    logprob = linear_logprob(x.hidden, x.weight, x.target, bias=bias).logprob
    dense = functional.linear(x.hidden, x.weight, bias).log_softmax(-1)
    expected = dense.gather(1, x.target[:, None])[:, 0]
    torch.testing.assert_close(logprob, expected)
    assert (logprob <= 0).all()


def test_a_first_block_of_minus_inf():
    """flash-attn #1930, Liger 0.8.5 (V = 70,000): NaN where a whole block is -inf."""
    hidden, weight = torch.randn(2, 4), torch.randn(70_000, 4)
    bias = torch.zeros(70_000)
    bias[:69_000] = -torch.inf
    out = linear_logprob(hidden, weight, torch.tensor([69_001, 0]), bias=bias, needs_entropy=True)
    few = linear_logprob(hidden, weight[69_000:], torch.tensor([1, 1]), needs_entropy=True)
    torch.testing.assert_close(out.entropy, few.entropy)
    torch.testing.assert_close(out.logprob[0], few.logprob[0])
    assert out.logprob[1] == -torch.inf


def test_results_do_not_share_memory():
    """Liger #507, PR508: an aliased output pointer gave a loss of 0."""
    x = small()
    with torch.no_grad():
        out = linear_logprob(*x[:2], x.target, needs_entropy=True)
        expected = out.lse.clone(), out.entropy.clone()
        out.logprob.zero_()
    assert torch.equal(out.lse, expected[0])
    assert torch.equal(out.entropy, expected[1])


@pytest.mark.parametrize("label", [-1, 7])
@pytest.mark.parametrize("operator", ["logprob", "policy"])
def test_a_label_that_is_no_class_raises(label, operator):
    """Liger 0.8.5: label == V and label == -1 gave a plausible loss without a word."""
    x = small()
    target = x.target.clone()
    target[4] = label
    with pytest.raises(ValueError, match=r"target must lie in \[0, 7\)"):
        if operator == "logprob":
            linear_logprob(*x[:2], target)
        else:
            linear_policy_loss(*x[:2], target, advantage=torch.ones(9))


def test_entropy_lies_between_0_and_log_v():
    """verl: entropy as lse - sum p z cancels; here >= 0, with its digits."""
    gaps = torch.tensor([0.0, 1.0, 8.0, 30.0, 200.0])[:, None]
    weight = torch.zeros(50, 1)
    weight[3] = 1.0
    out = linear_logprob(gaps, weight, torch.zeros(5, dtype=torch.int64), needs_entropy=True)
    exact = (gaps.double() @ weight.double().t()).log_softmax(-1)
    truth = -(exact.exp() * exact).sum(-1)
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(50) * (1 + 1e-6)).all()
    assert_within_budget("entropy", out.entropy, truth, truth)
