"""Divergence of a linear head from the top-k log-probs of a teacher."""

from xopd_kernels.linear_topk_divergence.api import linear_topk_divergence

__all__ = ["linear_topk_divergence"]
