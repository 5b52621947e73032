"""Every kernel with every tile, compiled ahead of time for each architecture: no GPU needed."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="the interpreter compiles nothing: unset TRITON_INTERPRET",
    ),
]

from xopd_kernels import inspect  # noqa: E402
from xopd_kernels.chunk import config  # noqa: E402

JOBS = [job for arch in config.ARCHITECTURES for job in inspect.jobs(arch)]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"sm_{job.arch} {job.name}")
def test_no_spills_tensor_cores_and_no_atomics(job):
    assert inspect.compile_job(job).problems() == []
