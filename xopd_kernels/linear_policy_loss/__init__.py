"""The clipped policy-gradient loss of a linear head, forward and gradients in one pass."""

from xopd_kernels.linear_policy_loss.api import linear_policy_loss

__all__ = ["linear_policy_loss"]
