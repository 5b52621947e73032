"""The compiled CPU kernels: element-wise passes over blocks of logits, which GEMMs fill.

Arguments are checked here, because C++ cannot: dtype, shape, strides. Every row's result depends on
that row alone, to the bit: not on the threads, on other rows, or on how many there are.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.native_library import address, block, call, pointers, sizes


class Logits(NamedTuple):
    """A block of one model's linear outputs, and what makes logits of them.

    ``z = scale (x + bias)``, with a cap ``z = cap tanh(scale (x + bias))``.
    """

    x: Tensor  # [rows, classes] fp32, unit inner stride
    bias: Tensor | None  # [classes] fp32
    scale: float
    cap: float | None  # > 0


class Running(NamedTuple):
    """Row statistics, folded in tile by tile."""

    maximum: Tensor  # [rows] fp32, starts at -inf
    total: Tensor  # [rows] fp64: sum exp(z - maximum), starts at 0
    moment: Tensor | None  # [rows] fp64: sum exp(z - maximum) (z - maximum); None: not asked for
    at_ids: Tensor  # [rows, K] fp32: z of the ids, written when their tile comes


class GradientTerms(NamedTuple):
    """What the gradient by the logits is made of, row by row."""

    maximum: Tensor  # [out_rows] fp32, finite (the caller maps -inf to 0)
    alpha: Tensor  # [out_rows] fp32
    gamma: Tensor | None  # [out_rows] fp32
    ids: Tensor  # [out_rows, K] int64, ascending in a row
    at_ids: Tensor  # [out_rows, K] fp32: d_z of the ids, stands for the formula


class Rounded(NamedTuple):
    """d(loss)/d(linear output) [rows, classes] of a tile in bf16, as its two products read it.

    Contiguous; None: not wanted. A row of an odd length has a 0 behind it.
    """

    straight: Tensor | None  # [rows, classes + classes % 2] bf16
    transposed: Tensor | None  # [classes, rows + rows % 2] bf16
    sums: Tensor | None  # [ceil(rows / 32), classes] fp32: of 32 rows, before they are rounded


SUMMED_ROWS = 32  # of `Rounded.sums`


class Side(NamedTuple):
    """One model of a divergence: ``log p = (z - maximum) - log_total``."""

    logits: Logits
    maximum: Tensor  # [rows] fp32
    log_total: Tensor  # [rows] fp32


class DivergenceSums(NamedTuple):
    """A divergence and its derivative, folded in tile by tile.

    A class of p above the row's bound stands apart; there is at most one.
    """

    bound: Tensor  # [rows] fp32
    value: Tensor  # [rows] fp64
    slope_top: Tensor  # [rows] fp64: u of that class
    slope_others: Tensor  # [rows] fp64: sum of u over all others


class DivergenceTerms(NamedTuple):
    """What the gradient of a divergence is made of, row by row; [rows] fp32."""

    bound: Tensor
    slope_sum: Tensor  # of u over all classes
    slope_others: Tensor
    rest: Tensor  # 1 - p of the class above the bound
    weight: Tensor


# The structs of csrc/common/logits.h, csrc/matmul/rounding.h, csrc/softmax/softmax.h and
# csrc/divergence/divergence.h.
class CLogits(ctypes.Structure):
    _fields_ = (
        *pointers("x", "bias"),
        *sizes("row_stride"),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


class _Statistics(ctypes.Structure):
    _fields_ = (
        ("logits", CLogits),
        *sizes("rows", "classes", "first_class"),
        *pointers("ids"),
        *sizes("id_count"),
        *pointers("maximum", "total", "moment", "at_ids"),
    )


class _DLogit(ctypes.Structure):
    _fields_ = (
        *pointers("out"),
        *sizes("out_row_stride"),
        *pointers("straight", "transposed", "sums"),
    )


class _Gradient(ctypes.Structure):
    _fields_ = (
        ("logits", CLogits),
        *sizes("logit_rows", "rows", "classes", "first_class"),
        *pointers("row_of", "maximum", "alpha", "gamma", "ids"),
        *sizes("id_count"),
        *pointers("at_ids"),
        ("d_logit", _DLogit),
    )


class _Side(ctypes.Structure):
    _fields_ = (("logits", CLogits), *pointers("maximum", "log_total"))


class _Divergence(ctypes.Structure):
    _fields_ = (
        ("student", _Side),
        ("teacher", _Side),
        *sizes("rows", "classes"),
        ("beta", ctypes.c_double),
        *pointers("bound", "value", "slope_top", "slope_others"),
    )


class _DivergenceGradient(ctypes.Structure):
    _fields_ = (
        ("student", _Side),
        ("teacher", _Side),
        *sizes("rows", "classes"),
        ("beta", ctypes.c_double),
        *pointers("bound", "slope_sum", "slope_others", "rest", "weight"),
        ("d_logit", _DLogit),
    )


def add_statistics(logits: Logits, first_class: int, ids: Tensor, running: Running) -> None:
    """Fold a tile of classes into the row statistics `running`, in place.

    The tile holds the classes [first_class, first_class + classes) of the vocabulary. `ids`
    [rows, K] int64, ascending in a row, are classes of the whole vocabulary: those of other tiles
    are passed over, negative ones never match. They take no part in maximum, total and moment. A
    -inf logit adds nothing; a row of them keeps maximum -inf and total 0. A NaN or +inf makes total
    NaN (the maximum passes over a NaN). Raises TypeError/ValueError for a tensor that does not fit,
    RuntimeError if the library is unavailable.
    """
    head = c_logits("logits", logits, first_class)
    rows, classes = logits.x.shape
    id_count = _columns(ids)
    moment = running.moment
    arguments = _Statistics(
        head,
        rows,
        classes,
        first_class,
        address("ids", ids, torch.int64, (rows, id_count)),
        id_count,
        address("running.maximum", running.maximum, torch.float32, (rows,)),
        address("running.total", running.total, torch.float64, (rows,)),
        None if moment is None else address("running.moment", moment, torch.float64, (rows,)),
        address("running.at_ids", running.at_ids, torch.float32, (rows, id_count)),
    )
    call("xopd_add_statistics", arguments)


def write_gradient(
    logits: Logits,
    first_class: int,
    rows: Tensor | None,
    terms: GradientTerms,
    out: Tensor | Rounded,
) -> None:
    """Write a tile of the gradient by the linear outputs to `out` [out_rows, classes] fp32 or bf16.

    ``slope(x) (alpha e + gamma e max(z - maximum, -1000))``, ``e = exp(z - maximum)``; at the
    ids of the tile ``slope(x) at_ids``. ``slope(x) = scale``, with a cap
    ``scale cap 4 e' / (1 + e')^2``, ``e' = exp(-2 |scale (x + bias)|)``. `rows` [out_rows] int64
    are the rows of `logits.x` that are meant, None: all. `out` may not overlap `logits.x`. Raises
    TypeError/ValueError for a tensor that does not fit, RuntimeError if the library is unavailable.
    """
    head = c_logits("logits", logits, first_class)
    logit_rows, classes = logits.x.shape
    count = logit_rows if rows is None else rows.numel()
    id_count = _columns(terms.ids)
    gamma = terms.gamma
    arguments = _Gradient(
        head,
        logit_rows,
        count,
        classes,
        first_class,
        None if rows is None else address("rows", rows, torch.int64, (count,)),
        address("terms.maximum", terms.maximum, torch.float32, (count,)),
        address("terms.alpha", terms.alpha, torch.float32, (count,)),
        None if gamma is None else address("terms.gamma", gamma, torch.float32, (count,)),
        address("terms.ids", terms.ids, torch.int64, (count, id_count)),
        id_count,
        address("terms.at_ids", terms.at_ids, torch.float32, (count, id_count)),
        _d_logit(out, (count, classes), logits.x),
    )
    call("xopd_write_gradient", arguments)


def add_divergence(student: Side, teacher: Side, beta: float, sums: DivergenceSums) -> None:
    """Add a tile's terms of a divergence and of its derivative to `sums`, in place.

    ``D_beta`` and ``u = dD / dlog p`` of `xopd_kernels.chunk.kl.row_divergence` with normalised
    p (student) and q (teacher). Raises TypeError/ValueError for a tensor that does not fit,
    RuntimeError if the library is unavailable.
    """
    rows = student.maximum.shape
    arguments = _Divergence(
        _side("student", student, student.logits.x.shape),
        _side("teacher", teacher, student.logits.x.shape),
        *student.logits.x.shape,
        _beta(beta),
        address("sums.bound", sums.bound, torch.float32, rows),
        address("sums.value", sums.value, torch.float64, rows),
        address("sums.slope_top", sums.slope_top, torch.float64, rows),
        address("sums.slope_others", sums.slope_others, torch.float64, rows),
    )
    call("xopd_add_divergence", arguments)


def write_divergence_gradient(
    student: Side, teacher: Side, beta: float, terms: DivergenceTerms, out: Tensor | Rounded
) -> None:
    """Write a tile of the gradient by the student's outputs to `out` [rows, classes] fp32 or bf16.

    ``slope(x) weight (u - p slope_sum)`` with the u of `add_divergence`; for the class of p above
    the bound ``slope(x) weight (u rest - p slope_others)``, which is the same number without a
    difference of two near 1. `out` overlaps neither x. Raises TypeError/ValueError for a tensor
    that does not fit, RuntimeError if the library is unavailable.
    """
    shape, named = student.logits.x.shape, terms._asdict().items()
    arguments = _DivergenceGradient(
        _side("student", student, shape),
        _side("teacher", teacher, shape),
        *shape,
        _beta(beta),
        *(address(f"terms.{name}", x, torch.float32, shape[:1]) for name, x in named),
        _d_logit(out, shape, student.logits.x, teacher.logits.x),
    )
    call("xopd_write_divergence_gradient", arguments)


def _d_logit(out: Tensor | Rounded, shape: tuple[int, ...], *inputs: Tensor) -> _DLogit:
    """Where d(loss)/d(linear output) of `shape` goes, apart from the `inputs`."""
    if isinstance(out, Tensor):
        begin = block("out", out)
        if out.shape != shape:
            raise ValueError(f"out must be {list(shape)}, got {list(out.shape)}")
        if shape[0] > 1 and out.stride(0) < shape[1]:
            raise ValueError(f"out must have rows that lie apart, got strides {out.stride()}")
        _check_apart("out", out, inputs)
        return _DLogit(begin, out.stride(0), None, None, None)
    rows, classes = shape
    places = {
        "straight": (rows, classes + classes % 2),
        "transposed": (classes, rows + rows % 2),
        "sums": (-(-rows // SUMMED_ROWS), classes),
    }
    addresses = []
    for (name, size), to in zip(places.items(), out, strict=True):
        dtype = torch.float32 if name == "sums" else torch.bfloat16
        addresses.append(None if to is None else address(f"out.{name}", to, dtype, size))
        if to is not None:
            _check_apart(f"out.{name}", to, inputs)
    return _DLogit(None, 0, *addresses)


def _check_apart(name: str, out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    for x in inputs:
        if out.data_ptr() < _end(x) and x.data_ptr() < _end(out):
            raise ValueError(f"{name} must not overlap the x that it is computed from")


def _end(block: Tensor) -> int:
    """One past the last byte of a block; its beginning if it is empty."""
    rows, classes = block.shape
    elements = (rows - 1) * block.stride(0) + classes if rows and classes else 0
    return block.data_ptr() + block.element_size() * elements


def c_logits(name: str, logits: Logits, first_class: int = 0) -> CLogits:
    x, bias = logits.x, logits.bias
    check_first_class(first_class)
    return CLogits(
        block(f"{name}.x", x),
        None if bias is None else address(f"{name}.bias", bias, torch.float32, (x.shape[1],)),
        x.stride(0),
        logits.scale,
        c_cap(f"{name}.cap", logits.cap),
    )


def c_cap(name: str, cap: float | None) -> float:
    """A cap as C++ takes it: 0 for none."""
    if cap is not None and not ctypes.c_float(cap).value > 0:
        raise ValueError(f"{name} must be > 0 in fp32 or None, got {cap}")
    return cap or 0.0


def check_first_class(first_class: int) -> None:
    """Raise ValueError for what is no class number, or one whose sums would overflow."""
    if not 0 <= first_class < 2**62:
        raise ValueError(f"first_class must be a class number >= 0, got {first_class}")


def _side(name: str, side: Side, shape: tuple[int, ...]) -> _Side:
    head = c_logits(f"{name}.logits", side.logits)
    if side.logits.x.shape != shape:
        raise ValueError(f"{name}.logits.x must be {list(shape)}, got {list(side.logits.x.shape)}")
    return _Side(
        head,
        address(f"{name}.maximum", side.maximum, torch.float32, shape[:1]),
        address(f"{name}.log_total", side.log_total, torch.float32, shape[:1]),
    )


def _columns(ids: Tensor) -> int:
    """K of ids [rows, K]; another shape is refused where its address is taken."""
    return ids.shape[1] if ids.ndim == 2 else 0


def _beta(beta: float) -> float:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    return beta
