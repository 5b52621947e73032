"""Finding, loading and refusing a shared object; arguments that do not fit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xopd_kernels import native, native_library
from xopd_kernels.native import GradientTerms, Logits, Running, Side

pytestmark = pytest.mark.skipif(
    not native_library.runnable_objects(), reason="the native library is not built"
)


@pytest.fixture
def uncached() -> Iterator[None]:
    """The installed library is looked for again, in the test and after it."""
    native_library._installed.cache_clear()
    yield
    native_library._installed.cache_clear()


def test_it_is_available() -> None:
    assert native_library.unavailable_reason() is None


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ("AVX512", ["avx512", "avx2", "portable"]),
        ("AVX2", ["avx2", "portable"]),
        ("DEFAULT", ["portable"]),
        ("SVE256", ["portable"]),
    ],
)
def test_the_cpu_chooses_the_object(
    capability: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native_library.py"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert native_library.runnable_objects() == []
    for name in ("avx512", "avx2", "portable"):
        (tmp_path / f"_native_{name}.so").touch()
    assert native_library.runnable_objects() == [tmp_path / f"_native_{name}.so" for name in names]


@pytest.mark.usefixtures("uncached")
def test_a_missing_object_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native_library.py"))
    reason = native_library.unavailable_reason()
    assert reason is not None
    assert str(tmp_path) in reason
    assert "C++17 compiler" in reason
    with pytest.raises(RuntimeError, match="was not built"):
        add_statistics()


@pytest.mark.usefixtures("uncached")
def test_a_broken_object_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native_library.py"))
    (tmp_path / "_native_portable.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    reason = native_library.unavailable_reason()
    assert reason is not None
    assert "does not load" in reason


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_another_platform_is_named(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    reason = native_library.unavailable_reason()
    assert reason is not None
    assert platform in reason


def test_an_object_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "ABI_VERSION", native_library.ABI_VERSION + 1)
    with pytest.raises(OSError, match="interface"):
        native_library.load(native_library.runnable_objects()[0])


def test_a_library_without_the_functions_is_refused() -> None:
    with pytest.raises(OSError, match="function is missing"):
        native_library.load(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


ROWS, CLASSES, K = 3, 5, 2
IDS = torch.tensor([[0, 4]] * ROWS)
STUDENT = Logits(torch.zeros(ROWS, CLASSES), None, 1.0, None)
RUNNING = Running(
    torch.full((ROWS,), -torch.inf),
    torch.zeros(ROWS, dtype=torch.float64),
    torch.zeros(ROWS, dtype=torch.float64),
    torch.zeros(ROWS, K),
)
TERMS = GradientTerms(torch.zeros(ROWS), torch.ones(ROWS), None, IDS, torch.zeros(ROWS, K))
NEGATIVE = torch.zeros(ROWS, CLASSES, dtype=torch.complex64).conj().imag  # has the negative bit
SIDE = Side(STUDENT, torch.zeros(ROWS), torch.zeros(ROWS))


def add_statistics(
    logits: Logits = STUDENT, first_class: int = 0, ids: Tensor = IDS, running: Running = RUNNING
) -> None:
    native.add_statistics(logits, first_class, ids, running)


def write_gradient(
    rows: Tensor | None = None, terms: GradientTerms = TERMS, out: Tensor | None = None
) -> None:
    native.write_gradient(
        STUDENT, 0, rows, terms, torch.empty(ROWS, CLASSES) if out is None else out
    )


def add_divergence(
    student: Side = SIDE, teacher: Side = SIDE, beta: float = 0.5, value: Tensor | None = None
) -> None:
    zeros = torch.zeros(3, ROWS, dtype=torch.float64)
    sums = native.DivergenceSums(torch.ones(ROWS), *zeros)
    sums = sums if value is None else sums._replace(value=value)
    native.add_divergence(student, teacher, beta, sums)


def write_divergence_gradient(weight: Tensor | None = None, out: Tensor | None = None) -> None:
    ones = torch.ones(4, ROWS)
    terms = native.DivergenceTerms(*ones, weight=ones[0] if weight is None else weight)
    out = torch.empty(ROWS, CLASSES) if out is None else out
    native.write_divergence_gradient(SIDE, SIDE, 0.5, terms, out)


def fewer(tensor: Tensor) -> Tensor:
    return tensor[:-1]


WRONG: list[tuple[str, type[Exception], Callable[[], None]]] = [
    ("logits.x", TypeError, lambda: add_statistics(STUDENT._replace(x=STUDENT.x.double()))),
    ("logits.x", TypeError, lambda: add_statistics(STUDENT._replace(x=STUDENT.x.to("meta")))),
    ("logits.x", ValueError, lambda: add_statistics(STUDENT._replace(x=torch.zeros(5)))),
    ("logits.x", ValueError, lambda: add_statistics(STUDENT._replace(x=torch.zeros(5, 3).t()))),
    ("logits.x must hold", ValueError, lambda: add_statistics(STUDENT._replace(x=NEGATIVE))),
    ("logits.bias", ValueError, lambda: add_statistics(STUDENT._replace(bias=torch.zeros(4)))),
    ("logits.cap", ValueError, lambda: add_statistics(STUDENT._replace(cap=0.0))),
    ("first_class", ValueError, lambda: add_statistics(first_class=-1)),
    ("ids", TypeError, lambda: add_statistics(ids=IDS.int())),
    ("ids", ValueError, lambda: add_statistics(ids=fewer(IDS))),
    ("ids", ValueError, lambda: add_statistics(ids=IDS[:, 0])),
    ("ids", ValueError, lambda: add_statistics(ids=torch.tensor(0))),
    ("ids", ValueError, lambda: add_statistics(ids=torch.zeros(K, ROWS).long().t())),
    (
        "running.maximum",
        ValueError,
        lambda: add_statistics(running=RUNNING._replace(maximum=fewer(RUNNING.maximum))),
    ),
    (
        "running.total",
        TypeError,
        lambda: add_statistics(running=RUNNING._replace(total=RUNNING.total.float())),
    ),
    (
        "running.moment",
        TypeError,
        lambda: add_statistics(running=RUNNING._replace(moment=RUNNING.total.float())),
    ),
    (
        "running.at_ids",
        ValueError,
        lambda: add_statistics(running=RUNNING._replace(at_ids=fewer(RUNNING.at_ids))),
    ),
    ("rows", TypeError, lambda: write_gradient(rows=torch.tensor([0, 1, 2]).int())),
    ("terms.maximum", ValueError, lambda: write_gradient(rows=torch.tensor([1, 2]))),
    ("terms.alpha", TypeError, lambda: write_gradient(terms=TERMS._replace(alpha=IDS[:, 0]))),
    (
        "terms.gamma",
        ValueError,
        lambda: write_gradient(terms=TERMS._replace(gamma=torch.zeros(1))),
    ),
    ("terms.ids", ValueError, lambda: write_gradient(terms=TERMS._replace(ids=fewer(IDS)))),
    (
        "terms.at_ids",
        ValueError,
        lambda: write_gradient(terms=TERMS._replace(at_ids=torch.zeros(ROWS, 1))),
    ),
    ("out", ValueError, lambda: write_gradient(out=torch.empty(ROWS, CLASSES + 1))),
    ("out", TypeError, lambda: write_gradient(out=torch.empty(ROWS, CLASSES).double())),
    ("out", ValueError, lambda: write_gradient(out=torch.empty(1, CLASSES).expand(ROWS, -1))),
    ("out must not overlap", ValueError, lambda: write_gradient(out=STUDENT.x)),
    ("beta", ValueError, lambda: add_divergence(beta=1.5)),
    ("sums.value", TypeError, lambda: add_divergence(value=torch.zeros(ROWS))),
    (
        "teacher.logits.x",
        ValueError,
        lambda: add_divergence(teacher=SIDE._replace(logits=STUDENT._replace(x=fewer(STUDENT.x)))),
    ),
    (
        "student.log_total",
        ValueError,
        lambda: add_divergence(student=SIDE._replace(log_total=torch.zeros(ROWS + 1))),
    ),
    ("terms.weight", ValueError, lambda: write_divergence_gradient(weight=torch.ones(ROWS + 1))),
    ("out must not overlap", ValueError, lambda: write_divergence_gradient(out=STUDENT.x)),
]


@pytest.mark.parametrize(("name", "error", "call"), WRONG)
def test_what_does_not_fit_is_named(
    name: str, error: type[Exception], call: Callable[[], None]
) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}"):
        call()
