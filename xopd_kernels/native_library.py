"""The compiled CPU kernels: the shared object that is loaded, and how its functions are called.

One shared object for each instruction set (csrc/, built by setup.py), loaded on first use; the one
that fits is chosen by what torch says the CPU can do. The threads are torch's own: each call hands
over the address of `torch_parallel_for` of torch's stable C interface.
"""

import ctypes
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ABI_VERSION = 7  # of csrc/common/abi.h
_ROW_OUT_OF_RANGE = -1
_NO_MATMUL = -2
_ENTRY_OUT_OF_RANGE = -3

# The objects that a CPU can run, best first, by torch.backends.cpu.get_cpu_capability().
_INSTRUCTION_SETS = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}


class _Library(NamedTuple):
    """A loaded shared object, and the parallel loop that every call hands to it."""

    kernels: ctypes.CDLL
    parallel_for: ctypes.c_void_p

    @classmethod
    def open(cls, path: Path) -> "_Library":
        """Raises OSError, in words, if this process cannot use the file."""
        kernels = ctypes.CDLL(str(path))
        torch_cpu = ctypes.CDLL("libtorch_cpu.so")  # the one that is loaded
        try:
            version = kernels.xopd_abi_version()
            if version != ABI_VERSION:
                raise OSError(f"{path} has interface {version}, this package needs {ABI_VERSION}")
            parallel_for = ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)
        except AttributeError as error:
            raise OSError(f"a function is missing: {error}") from None
        return cls(kernels, parallel_for)


_given: _Library | None = None  # by load()


def load(path: Path | None) -> None:
    """Use the shared object at `path` from now on; None: again the installed one that fits.

    For a build with sanitizers, say. Raises OSError if the object cannot be used.
    """
    global _given
    _given = None if path is None else _Library.open(path)


def runnable_objects() -> list[Path]:
    """The installed shared objects that this CPU can run, best first."""
    paths = [Path(__file__).parent / f"_native_{name}.so" for name in _instruction_sets()]
    return [path for path in paths if path.is_file()]


def _instruction_sets() -> tuple[str, ...]:
    capability = torch.backends.cpu.get_cpu_capability()
    return _INSTRUCTION_SETS.get(capability, ("portable",))


def instruction_set() -> str:
    """That of the installed object that runs here, and what is amiss with it; "" without one."""
    objects, best = runnable_objects(), _instruction_sets()[0]
    if not objects:
        return ""
    name = objects[0].stem.removeprefix("_native_")
    missing = f", slower than the {best} object, which was not built: is the compiler too old?"
    return name if name == best else name + missing


def unavailable_reason() -> str | None:
    """Why the library cannot run here, and the remedy; None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def _library() -> _Library | str:
    return _installed() if _given is None else _given


@functools.cache
def _installed() -> _Library | str:
    """The installed library that fits this CPU, or why there is none."""
    if sys.platform != "linux":
        return f"the native library is built for Linux, this is {sys.platform}"
    folder, rebuild = Path(__file__).parent, "install a C++17 compiler (g++, or another one in CXX)"
    if (folder.parent / "setup.py").is_file():
        rebuild += f" and run `python setup.py build_ext --inplace` in {folder.parent}"
    else:
        rebuild += " and this package again, with pip's --force-reinstall --no-deps"
    objects = runnable_objects()
    if not objects:
        return f"the native library was not built (no _native_*.so in {folder}); {rebuild}"
    try:
        return _Library.open(objects[0])
    except OSError as error:
        return f"the native library does not load ({error}); {rebuild}"


def has(name: str) -> bool:
    """What the function `name`, which takes nothing, says; False without the library."""
    library = _library()
    return not isinstance(library, str) and bool(getattr(library.kernels, name)())


def call(name: str, arguments: ctypes.Structure) -> None:
    """Run an entry point; raises for what it reports."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    run = getattr(library.kernels, name)
    status = run(ctypes.byref(arguments), library.parallel_for)
    if status == _ROW_OUT_OF_RANGE:
        raise ValueError("rows must be row numbers of the logits or lists, got one out of range")
    if status == _ENTRY_OUT_OF_RANGE:
        raise ValueError(
            "ids must be class numbers of the vocabulary that ascend in a row, and counts, offsets "
            "and row numbers lie within their tensors; got one out of range"
        )
    if status == _NO_MATMUL:
        raise RuntimeError("this CPU has no bf16 dot products (AVX-512 BF16)")
    if status != 0:
        raise RuntimeError(f"torch's parallel loop failed in {name} (status {status})")


def pointers(*names: str) -> list[tuple[str, type[ctypes.c_void_p]]]:
    """Fields of a struct: addresses."""
    return [(name, ctypes.c_void_p) for name in names]


def sizes(*names: str) -> list[tuple[str, type[ctypes.c_int64]]]:
    """Fields of a struct: 64-bit integers."""
    return [(name, ctypes.c_int64) for name in names]


def address(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where the contiguous CPU tensor begins."""
    _check_sign(name, tensor)
    if tensor.dtype != dtype or not tensor.is_cpu:
        raise TypeError(f"{name} must be {dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return tensor.data_ptr()


def block(name: str, block: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Where the [rows, classes] CPU block begins, whose rows may lie apart."""
    _check_sign(name, block)
    if block.dtype != dtype or not block.is_cpu:
        raise TypeError(f"{name} must be {dtype} on the CPU, got {block.dtype} on {block.device}")
    if block.ndim != 2 or (block.stride(1) != 1 and block.shape[1] > 1):
        raise ValueError(
            f"{name} must be [rows, classes] with unit inner stride, got {list(block.shape)} with "
            f"strides {block.stride()}"
        )
    return block.data_ptr()


def _check_sign(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a view whose numbers are meant with the other sign."""
    if tensor.is_neg():
        raise ValueError(
            f"{name} must hold its numbers, not their negatives (a view such as x.conj().imag); "
            "pass tensor.resolve_neg()"
        )
