"""The choice of a backend, its reasons, and what importing the library costs."""

import subprocess
import sys

import pytest
import torch

from xopd_kernels import Backend, BackendUnavailableError
from xopd_kernels.backend import resolve, unavailable_reason

CPU = torch.device("cpu")


def test_auto_on_the_cpu_is_the_reference():
    assert resolve("auto", CPU, torch.float32) is Backend.REFERENCE


def test_reasons():
    assert unavailable_reason(Backend.REFERENCE, CPU, torch.float64) is None
    assert "float64" in unavailable_reason(Backend.TRITON, CPU, torch.float64)
    assert "not part of this release" in unavailable_reason(Backend.NATIVE, CPU, torch.float32)


def test_explicit_backend_raises_with_the_reason():
    with pytest.raises(BackendUnavailableError, match="backend NATIVE cannot run: the native"):
        resolve("native", CPU, torch.float32)


def test_import_needs_torch_only():
    code = "import sys, xopd_kernels; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
