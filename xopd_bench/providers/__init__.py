"""Who is compared. Everything gets the same tensors and returns what it computes of the results.

The policy loss has advantage 1 and ratio 1: its gradient is then that of the summed negative
log-likelihood, which is all that some of them can compute.
"""

from xopd_bench.cell import Job
from xopd_bench.providers import cross_entropy, liger, ours, plain, trl, verl
from xopd_bench.providers.provider import Provider, Where


def providers(job: Job, where: Where) -> list[Provider]:
    """All of them, also those that cannot run here, with the reason."""
    modules = (plain, trl, liger, verl, cross_entropy, ours)
    return [provider for module in modules for provider in module.providers(job, where)]
