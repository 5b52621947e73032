"""Forward KL, reverse KL and Jensen-Shannon divergence of two linear heads."""

from xopd_kernels.linear_divergence.advantage import reverse_kl_advantage
from xopd_kernels.linear_divergence.api import linear_divergence

__all__ = ["linear_divergence", "reverse_kl_advantage"]
