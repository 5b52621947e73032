"""Wrong input to the operators: the error names the argument, what it got, and the remedy."""

import math

import pytest
import torch

from xopd_kernels import (
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
)


def logprob_arguments(**changes):
    base = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "target": torch.zeros(3, dtype=torch.int64),
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 4).half()}, TypeError, r"weight must have the dtype of hidden"),
        ({"hidden": torch.zeros(3, 4).int()}, TypeError, r"hidden must be bf16.*torch.int32"),
        ({"hidden": [1.0]}, TypeError, r"hidden must be a torch.Tensor, got list"),
        ({"hidden": torch.zeros(3, 6)}, ValueError, r"hidden \[3, 6\] and weight \[5, 4\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight must have V >= 1"),
        ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, r"weight is on meta"),
        ({"target": torch.zeros(3)}, TypeError, r"target must be int64"),
        ({"target": torch.zeros(4).long()}, ValueError, r"target must have .* \[3\], got \[4\]"),
        ({"target": torch.tensor([0, 5, 1])}, ValueError, r"target must lie in \[0, 5\).* 0 to 5"),
        ({"target": torch.tensor([0, -1, 1])}, ValueError, r"from -1 to 1"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\], got \[4\]"),
        ({"bias": torch.zeros(5).half()}, TypeError, r"bias must have the dtype of weight"),
        ({"temperature": math.nan}, ValueError, r"temperature must be finite and > 0, got nan"),
        ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0, got 0"),
        ({"softcap": -1.0}, ValueError, r"softcap must be"),
        ({"logit_scale": math.inf}, ValueError, r"logit_scale must be finite"),
        ({"backend": "cuda"}, ValueError, r'backend must be "auto", Back.*cuda'),
    ],
)
def test_wrong_input_of_linear_logprob(changes, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(**logprob_arguments(**changes))


def policy_loss_arguments(**changes):
    base = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "target": torch.zeros(3, dtype=torch.int64),
        "advantage": torch.zeros(3),
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"advantage": None}, ValueError, r"exactly one of .*, got neither"),
        ({"teacher_logprob": torch.zeros(3)}, ValueError, r"exactly one of .*, got both"),
        ({"advantage": torch.zeros(3).long()}, TypeError, r"advantage must be floating point"),
        ({"advantage": torch.zeros(2)}, ValueError, r"advantage must have .* \[3\], got \[2\]"),
        ({"old_logprob": torch.zeros(3, 1)}, ValueError, r"old_logprob must have .* \[3, 1\]"),
        ({"token_weight": 1.0}, TypeError, r"token_weight must be a torch.Tensor, got float"),
        ({"token_weight": torch.zeros(3, device="meta")}, ValueError, r"token_weight is on meta"),
        ({"clip_low": -0.1}, ValueError, r"clip_low must be >= 0, got -0.1"),
        ({"clip_high": math.nan}, ValueError, r"clip_high must be >= 0, got nan"),
        ({"advantage_clamp": 0.0}, ValueError, r"advantage_clamp must be > 0, got 0.0"),
        ({"gradient": "dense"}, ValueError, 'gradient must be "exact" or "sparse"'),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"hidden \[3, 4\] and weight \[5, 3\]"),
        ({"target": torch.tensor([0, 5, 1])}, ValueError, r"target must lie in \[0, 5\)"),
        ({"temperature": math.nan}, ValueError, r"temperature must be finite and > 0"),
    ],
)
def test_wrong_input_of_linear_policy_loss(changes, error, message):
    with pytest.raises(error, match=message):
        linear_policy_loss(**policy_loss_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": "1"}, TypeError, r"temperature must be a number of Python, got str: '1'"),
        (
            {"temperature": torch.ones(5)},
            TypeError,
            r"temperature must be .*, got Tensor.* use float",
        ),
        ({"temperature": 10**400}, ValueError, r"temperature must fit a float, got an int of 1329"),
        ({"temperature": 1e-320}, ValueError, r"logit_scale / temperature must fit float32"),
        ({"softcap": (30, 50)}, TypeError, r"softcap must be a number of Python, got tuple"),
        ({"logit_scale": None}, TypeError, r"logit_scale must be a number of Python, got NoneType"),
        ({"ignore_index": None}, TypeError, r"ignore_index must be an int, got NoneType"),
        ({"ignore_index": 2**70}, ValueError, r"ignore_index must fit 64 bits"),
        ({"needs_entropy": "yes"}, TypeError, r"needs_entropy must be a bool, got 'yes'"),
        ({"vocab_group": "world"}, TypeError, r"vocab_group must be .*, got str: 'world'"),
        ({"memory_budget_bytes": "64MB"}, TypeError, r"int of bytes, got str: '64MB'; 64 MB are"),
        ({"hidden": torch.zeros(3, 4).to_sparse()}, TypeError, r"hidden must be a dense tensor"),
        ({"backend": "triton"}, ValueError, r'"auto", Backend.NATIVE, .*, got \'triton\''),
    ],
)
def test_wrong_kinds_of_argument_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(**logprob_arguments(**changes))


@pytest.mark.parametrize("name", ["clip_low", "clip_high", "advantage_clamp"])
@pytest.mark.parametrize("value", ["0.2", None, torch.ones(2)])
def test_wrong_kinds_of_clip_are_named(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        linear_policy_loss(**policy_loss_arguments(**{name: value}))


def test_wrong_kinds_of_beta_are_named():
    heads = (torch.zeros(3, 4), torch.zeros(5, 4))
    with pytest.raises(TypeError, match="beta must be a number of Python, got str"):
        linear_divergence(*heads, *heads, beta="0.5")


@pytest.mark.parametrize("wrong", ["probabilities", "negated", "zeros"])
def test_a_teacher_of_more_mass_than_one_is_refused(wrong):
    """The likeliest mistakes: probabilities, or a loss in place of log-probs."""
    logprob = torch.tensor([[0.6, 0.3], [0.5, 0.4]]).log()
    given = {"probabilities": logprob.exp(), "negated": -logprob, "zeros": torch.zeros(2, 2)}
    ids = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"teacher_logprob must be log-probs .* > 1"):
        linear_topk_divergence(torch.zeros(2, 4), torch.zeros(5, 4), ids, given[wrong])
