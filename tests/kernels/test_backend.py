"""The choice of a backend, its reasons, and what importing the library costs."""

import subprocess
import sys

import pytest
import torch

from xopd_kernels import Backend, BackendUnavailableError, backend, native_library
from xopd_kernels.backend import resolve, unavailable_reason

CPU = torch.device("cpu")


CUDA = torch.device("cuda")
META = torch.device("meta")


def test_auto_on_the_cpu_is_native():
    assert resolve("auto", CPU, torch.float32) is Backend.NATIVE
    assert resolve("auto", CPU, torch.float64) is Backend.REFERENCE
    assert resolve("auto", META, torch.float32) is Backend.REFERENCE


def test_auto_without_the_library_is_the_reference_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native_library, "unavailable_reason", lambda: "no C++ compiler was found")
    choose = backend._resolve_auto.__wrapped__  # without the cache
    assert choose(CPU, torch.float32) is Backend.REFERENCE
    assert "REFERENCE for torch.float32 on cpu (no C++ compiler was found)" in caplog.text


def test_reasons():
    assert unavailable_reason(Backend.REFERENCE, CPU, torch.float64) is None
    assert unavailable_reason(Backend.NATIVE, CPU, torch.float32) is None
    assert "float64" in unavailable_reason(Backend.TRITON, CPU, torch.float64)
    assert "float64" in unavailable_reason(Backend.NATIVE, CPU, torch.float64)
    assert "runs on CPUs" in unavailable_reason(Backend.NATIVE, CUDA, torch.float32)


def test_explicit_backend_raises_with_the_reason():
    with pytest.raises(BackendUnavailableError, match="backend NATIVE cannot run: its kernels"):
        resolve("native", CPU, torch.float64)


def test_import_needs_torch_only():
    code = "import sys, xopd_kernels; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
