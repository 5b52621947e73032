"""What tests and benchmarks share: inputs, the operators in dense plain torch, the error budget.

The dense versions hold all logits and know nothing of the kernels. With fp64 inputs they are the
oracle; with the inputs of a test they are the baseline that the error budget compares with.
"""

from xopd_kernels.testing.budget import (
    BUDGET_FACTOR,
    ErrorPool,
    assert_within_budget,
    split_non_finite,
)
from xopd_kernels.testing.dense import (
    dense_divergence,
    dense_logits,
    dense_logprob,
    dense_policy_loss,
    dense_reverse_kl_advantage,
    dense_topk_divergence,
)
from xopd_kernels.testing.inputs import (
    Distribution,
    Inputs,
    Terms,
    make_head,
    make_inputs,
    make_terms,
)

__all__ = [
    "BUDGET_FACTOR",
    "Distribution",
    "ErrorPool",
    "Inputs",
    "Terms",
    "assert_within_budget",
    "dense_divergence",
    "dense_logits",
    "dense_logprob",
    "dense_policy_loss",
    "dense_reverse_kl_advantage",
    "dense_topk_divergence",
    "make_head",
    "make_inputs",
    "make_terms",
    "split_non_finite",
]
