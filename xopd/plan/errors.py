"""The error of a plan that cannot be made."""

from __future__ import annotations

from xopd.errors import UserError


class PlanError(UserError):
    """A plan that cannot be made as asked; the message names the argument and the remedy."""
