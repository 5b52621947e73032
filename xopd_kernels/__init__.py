"""Fused kernels for the loss of a language-model head: per-token log-probs without the logits.

Needs torch only; Triton is imported when a Triton backend runs.
"""

from xopd_kernels.backend import Backend, BackendUnavailableError
from xopd_kernels.linear_divergence import linear_divergence, reverse_kl_advantage
from xopd_kernels.linear_logprob import linear_logprob
from xopd_kernels.linear_policy_loss import linear_policy_loss
from xopd_kernels.linear_topk_divergence import linear_topk_divergence
from xopd_kernels.memory import MemoryPlan, memory_plan
from xopd_kernels.records import (
    LinearDivergence,
    LinearLogprob,
    PolicyLoss,
    ReverseKLAdvantage,
    SparseDivergence,
    SparseLinearLogprob,
    SparsePolicyLoss,
    Wanted,
)
from xopd_kernels.workload import Operator, Workload

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "LinearDivergence",
    "LinearLogprob",
    "MemoryPlan",
    "Operator",
    "PolicyLoss",
    "ReverseKLAdvantage",
    "SparseDivergence",
    "SparseLinearLogprob",
    "SparsePolicyLoss",
    "Wanted",
    "Workload",
    "__version__",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "linear_topk_divergence",
    "memory_plan",
    "reverse_kl_advantage",
]
