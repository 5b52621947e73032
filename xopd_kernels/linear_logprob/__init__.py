"""Per-token log-probability, log-sum-exp and entropy of a linear head."""

from xopd_kernels.linear_logprob.api import linear_logprob

__all__ = ["linear_logprob"]
