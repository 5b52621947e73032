"""Fused kernels for the loss of a language-model head: per-token log-probs without the logits.

Needs torch only; Triton is imported when a Triton backend runs.
"""

from xopd_kernels.backend import Backend, BackendUnavailableError
from xopd_kernels.linear_logprob import linear_logprob
from xopd_kernels.linear_policy_loss import linear_policy_loss
from xopd_kernels.records import LinearLogprob, PolicyLoss

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "LinearLogprob",
    "PolicyLoss",
    "__version__",
    "linear_logprob",
    "linear_policy_loss",
]
