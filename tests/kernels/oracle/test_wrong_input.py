"""Wrong input of every operator raises before any work and names the argument; nothing changes."""

import math

import pytest
import torch

from xopd_kernels import (
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    linear_topk_divergence,
    reverse_kl_advantage,
)

N, V, D, V_T, D_T, K = 3, 5, 4, 6, 2, 2
OPERATORS = {
    "logprob": linear_logprob,
    "policy": linear_policy_loss,
    "divergence": linear_divergence,
    "topk": linear_topk_divergence,
    "advantage": reverse_kl_advantage,
}
EVERY = tuple(OPERATORS)
STUDENT = {"hidden": torch.ones(N, D), "weight": torch.ones(V, D)}
TEACHER = {"teacher_hidden": torch.ones(N, D_T), "teacher_weight": torch.ones(V_T, D_T)}
TARGET = {"target": torch.tensor([0, 4, -100])}
ARGUMENTS = {
    "logprob": STUDENT | TARGET,
    "policy": STUDENT | TARGET | {"advantage": torch.ones(N)},
    "divergence": STUDENT | TEACHER,
    "topk": STUDENT
    | {
        "teacher_ids": torch.tensor([[0, 1], [4, 2], [3, 0]]),
        "teacher_logprob": torch.full((N, K), -1.5),
    },
    "advantage": STUDENT | TEACHER | TARGET,
}
HEADS = ("divergence", "advantage")  # operators of two heads
meta = {"device": "meta"}

# operators, changed arguments, error, what its message holds
WRONG = [
    (EVERY, {"hidden": None}, TypeError, r"hidden must be a torch.Tensor, got NoneType"),
    (EVERY, {"hidden": torch.ones(D)}, ValueError, r"hidden \[4\]"),
    (EVERY, {"hidden": torch.ones(N, D + 1)}, ValueError, r"hidden \[3, 5\]"),
    (EVERY, {"hidden": torch.ones(N, D, dtype=torch.complex64)}, TypeError, r"hidden .*complex64"),
    (EVERY, {"weight": torch.ones(V, D, 1)}, ValueError, r"weight \[5, 4, 1\]"),
    (EVERY, {"weight": torch.ones(V, D).double()}, TypeError, r"weight .*float64"),
    (EVERY, {"weight": torch.ones(0, D)}, ValueError, r"weight must have V >= 1"),
    (EVERY, {"weight": "lm_head"}, TypeError, r"weight must be a torch.Tensor, got str"),
    (EVERY, {"weight": torch.ones(V, D, **meta)}, ValueError, r"weight is on meta"),
    (EVERY, {"bias": torch.ones(V, 1)}, ValueError, r"bias must be \[5\], got \[5, 1\]"),
    (EVERY, {"bias": torch.ones(V).bfloat16()}, TypeError, r"bias must have .*bfloat16"),
    (EVERY, {"bias": 0.0}, TypeError, r"bias must be a torch.Tensor, got float"),
    (EVERY, {"temperature": -1.0}, ValueError, r"temperature must be .*got -1"),
    (EVERY, {"temperature": math.inf}, ValueError, r"temperature must be .*got inf"),
    (EVERY, {"softcap": 0.0}, ValueError, r"softcap must be .*got 0"),
    (EVERY, {"softcap": math.nan}, ValueError, r"softcap must be .*got nan"),
    (EVERY, {"logit_scale": math.nan}, ValueError, r"logit_scale must be .*got nan"),
    (EVERY, {"backend": "triton"}, ValueError, r"backend must be .*got 'triton'"),
    (EVERY, {"backend": None}, ValueError, r"backend must be .*got None"),
    (EVERY, {"memory_budget_bytes": 0}, ValueError, r"memory_budget_bytes must be .*got 0"),
    (EVERY, {"memory_budget_bytes": -5}, ValueError, r"memory_budget_bytes must be .*got -5"),
    (EVERY, {"memory_budget_bytes": 1}, ValueError, r"memory_budget_bytes must be at least \d+"),
    (("policy",), {"target": None}, TypeError, r"target must be a torch.Tensor, got NoneType"),
    (
        ("logprob", "policy", "advantage"),
        {"target": torch.ones(N).int()},
        TypeError,
        r"target .*32",
    ),
    (
        ("policy", "advantage"),
        {"target": torch.zeros(N, 1).long()},
        ValueError,
        r"target .*\[3, 1\]",
    ),
    (("policy",), {"target": torch.tensor([0, -7, 1])}, ValueError, r"target must lie .*-7 to 1"),
    (
        ("advantage",),
        {"target": torch.tensor([0, 5, 1])},
        ValueError,
        r"target must lie in \[0, 5\)",
    ),
    (("policy",), {"advantage": torch.ones(1)}, ValueError, r"advantage .*\[3\], got \[1\]"),
    (("policy",), {"advantage": torch.ones(N).bool()}, TypeError, r"advantage .*torch.bool"),
    (("policy",), {"old_logprob": torch.ones(N).long()}, TypeError, r"old_logprob .*torch.int64"),
    (("policy",), {"clip_high": -1.0}, ValueError, r"clip_high must be >= 0, got -1"),
    (("policy",), {"clip_low": math.nan}, ValueError, r"clip_low must be >= 0, got nan"),
    (("policy", "advantage"), {"advantage_clamp": -1.0}, ValueError, r"advantage_clamp .*got -1"),
    (("advantage",), {"advantage_clamp": math.nan}, ValueError, r"advantage_clamp .*got nan"),
    (("policy",), {"gradient": "fast"}, ValueError, r"gradient must be .*got 'fast'"),
    (("policy", "divergence", "topk"), {"token_weight": 1.0}, TypeError, r"token_weight .*float"),
    (("divergence", "topk"), {"token_weight": torch.ones(2)}, ValueError, r"token_weight .*\[2\]"),
    (
        ("divergence", "topk"),
        {"token_weight": torch.ones(N).int()},
        TypeError,
        r"token_weight .*32",
    ),
    (("divergence", "topk"), {"beta": 1.5}, ValueError, r"beta must lie in \[0, 1\], got 1.5"),
    (("divergence", "topk"), {"beta": -0.1}, ValueError, r"beta must lie .*got -0.1"),
    (("divergence", "topk"), {"beta": math.nan}, ValueError, r"beta must lie .*got nan"),
    (
        HEADS,
        {"teacher_hidden": torch.ones(2, D_T)},
        ValueError,
        r"teacher_hidden .*\[3\], got \[2\]",
    ),
    (HEADS, {"teacher_hidden": torch.ones(N, 3)}, ValueError, r"teacher_hidden \[3, 3\]"),
    (HEADS, {"teacher_hidden": torch.ones(N, D_T).int()}, TypeError, r"teacher_hidden .*int32"),
    (
        HEADS,
        {"teacher_hidden": torch.ones(N, D_T, **meta)},
        ValueError,
        r"teacher_hidden is on meta",
    ),
    (
        HEADS,
        {"teacher_weight": torch.ones(V_T, D_T).half()},
        TypeError,
        r"teacher_weight .*float16",
    ),
    (HEADS, {"teacher_weight": torch.ones(0, D_T)}, ValueError, r"teacher_weight must have V >= 1"),
    (HEADS, {"teacher_weight": None}, TypeError, r"teacher_weight must be .*NoneType"),
    (HEADS, {"teacher_bias": torch.ones(V)}, ValueError, r"teacher_bias must be \[6\], got \[5\]"),
    (
        HEADS,
        {"teacher_bias": torch.ones(V_T).half()},
        TypeError,
        r"teacher_bias must have the dtype",
    ),
    (HEADS, {"teacher_softcap": -2.0}, ValueError, r"teacher_softcap must be .*got -2"),
    (HEADS, {"teacher_logit_scale": math.inf}, ValueError, r"teacher_logit_scale must be finite"),
    (
        HEADS,
        {
            "teacher_hidden": torch.ones(N, D_T).double(),
            "teacher_weight": torch.ones(V_T, D_T).double(),
        },
        TypeError,
        r"fp64.*float32 and torch.float64",
    ),
    (("topk",), {"teacher_ids": torch.zeros(N, K)}, TypeError, r"teacher_ids must be int64"),
    (("topk",), {"teacher_ids": torch.zeros(N).long()}, ValueError, r"teacher_ids must be .*\[3\]"),
    (("topk",), {"teacher_ids": torch.zeros(2, K).long()}, ValueError, r"teacher_ids .*\[2, 2\]"),
    (("topk",), {"teacher_ids": torch.tensor([[0, 5]] * N)}, ValueError, r"teacher_ids .*0 to 5"),
    (("topk",), {"teacher_ids": torch.tensor([[-1, 2]] * N)}, ValueError, r"teacher_ids .*-1 to 2"),
    (("topk",), {"teacher_ids": torch.tensor([[2, 2]] * N)}, ValueError, r"teacher_ids .*distinct"),
    (
        ("topk",),
        {"teacher_logprob": torch.zeros(N, K).int()},
        TypeError,
        r"teacher_logprob .*int32",
    ),
    (("topk",), {"teacher_logprob": torch.zeros(N, 3)}, ValueError, r"teacher_logprob .*\[3, 3\]"),
    (("topk",), {"tail": "drop"}, ValueError, r"tail must be .*got 'drop'"),
    (
        ("topk",),
        {"teacher_ids": torch.zeros(N, 6).long(), "teacher_logprob": torch.zeros(N, 6)},
        ValueError,
        r"teacher_ids must hold .*V = 5.*K = 6",
    ),
    (
        ("topk",),
        {"teacher_ids": torch.zeros(N, 0).long(), "teacher_logprob": torch.zeros(N, 0)},
        ValueError,
        r"teacher_ids must hold .*K = 0",
    ),
]
CASES = [
    pytest.param(name, *rest, id=f"{name}-{'-'.join(rest[0])}-{number}")
    for number, (names, *rest) in enumerate(WRONG)
    for name in names
]


@pytest.mark.parametrize(("operator", "changes", "error", "message"), CASES)
def test_wrong_input_is_named_and_changes_nothing(operator, changes, error, message):
    arguments = ARGUMENTS[operator] | changes
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    tensors = [x for x in tensors if x.device.type == "cpu"]
    before = [x.clone() for x in tensors]
    with pytest.raises(error, match=message):
        OPERATORS[operator](**arguments)
    assert all(torch.equal(x, old) for x, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_arguments_without_the_change_are_right(operator):
    """Else a test above would pass for another reason than it says."""
    for value in OPERATORS[operator](**ARGUMENTS[operator]):
        assert value.isfinite().all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_unknown_keyword_is_refused(operator):
    with pytest.raises(TypeError, match="unexpected keyword argument 'reduction'"):
        OPERATORS[operator](**ARGUMENTS[operator], reduction="mean")
