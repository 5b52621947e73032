"""The CPU suite as pytest-benchmark groups, for its own histories and comparisons.

    python -m pytest benchmarks/test_cpu.py --benchmark-autosave
    python -m pytest benchmarks/test_cpu.py --benchmark-compare --benchmark-compare-fail=median:10%
    pytest-benchmark compare                        # the runs that were saved

A group is one job in one dtype; in it are the bare GEMMs, everything that is installed, and ours.
It times, and verifies nothing: ``xopd bench`` does both, and knows the memory.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from xopd_bench.cell import Job
from xopd_bench.cli import CPU_JOBS, parse_shape
from xopd_bench.problem import Drawn
from xopd_bench.providers import providers
from xopd_bench.providers.provider import Where
from xopd_kernels.testing import Distribution

_CPU = torch.device("cpu")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# With a bf16 GEMM of torch a pass takes minutes where the CPU has no instructions for it.
_FP32_GEMMS = ("torch.mm fp32", "ours native", "TRL chunked")
_CASES = [
    (job, dtype, provider.name)
    for job in CPU_JOBS
    for dtype in _DTYPES
    for provider in providers(job, Where(_CPU, _DTYPES[dtype], is_interpreted=False))
    if dtype == "float32" or provider.name in _FP32_GEMMS
]


@pytest.fixture(scope="module")
def drawn(request: pytest.FixtureRequest) -> dict[str, Drawn]:
    """Inputs of both dtypes."""
    shape = parse_shape(request.config.getoption("--bench-shape"))
    return {
        name: Drawn.of(shape, dtype, Distribution.RANDOM, _CPU, has_teacher=True)
        for name, dtype in _DTYPES.items()
    }


@pytest.mark.parametrize(("job", "dtype", "name"), _CASES)
def test_pass(
    benchmark: BenchmarkFixture, drawn: dict[str, Drawn], job: Job, dtype: str, name: str
) -> None:
    """One pass with every token live."""
    where = Where(_CPU, _DTYPES[dtype], is_interpreted=False)
    (provider,) = (x for x in providers(job, where) if x.name == name)
    if provider.prepare is None:
        pytest.skip(provider.absent)
    run = provider.prepare(drawn[dtype].problem(job, 0))
    benchmark.group = f"{job.value} {dtype}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
