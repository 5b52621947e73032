"""The compiled CPU kernels that draw a class for those that have no entry in a list.

The structs are those of csrc/sparse/sparse.h.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.native import CLogits, Logits, c_logits
from xopd_kernels.native_library import address, call, pointers, sizes
from xopd_kernels.native_sparse import (
    EntriesOfLists,
    Listed,
    Lists,
    entries_of,
    list_addresses,
)


class Point(NamedTuple):
    """Where the drawing of a class stands, row by row."""

    rows: Tensor  # [n] int64 rows of the lists
    point: Tensor  # [n] fp64 on the sum of exp(z - maximum) over the classes without an entry
    running: Tensor  # [n] fp64, starts at 0
    drawn: Tensor  # [n] int64, -1: not yet
    last: Tensor  # [n] int64 last class so far that has any mass, -1: none
    slope: Tensor | None  # [n] fp32 dz/dx; with a cap

    @classmethod
    def of(cls, rows: Tensor, point: Tensor, has_cap: bool) -> "Point":
        """At the first class."""
        nothing = torch.full_like(rows, -1)
        slope = torch.zeros(len(rows), dtype=torch.float32) if has_cap else None
        return cls(rows, point, torch.zeros_like(point), nothing, nothing.clone(), slope)

    def ids(self) -> Tensor:
        """[n] int64 classes; -1 where none has any mass."""
        return torch.where(self.drawn >= 0, self.drawn, self.last)


class _Insert(ctypes.Structure):
    _fields_ = (
        *pointers("ids", "values", "count"),
        *sizes("list_rows", "row_stride", "rows"),
        *pointers("row_of", "classes", "added"),
    )


class _Draw(ctypes.Structure):
    _fields_ = (
        ("logits", CLogits),
        *sizes("classes", "first_class"),
        ("kept", EntriesOfLists),
        *pointers("maximum"),
        *sizes("rows"),
        *pointers("row_of", "point", "running", "drawn", "last", "slope"),
    )


def insert(lists: Listed, rows: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add to each of the lists `rows` [n] the entry of class `ids` [n], none where that is < 0.

    Where the class has an entry, it takes the value. Raises ValueError where a list is full.
    """
    (count,), (list_rows, capacity) = rows.shape, lists.ids.shape
    arguments = _Insert(
        *list_addresses(lists),
        list_rows,
        capacity,
        count,
        address("rows", rows, torch.int64, (count,)),
        address("ids", ids, torch.int64, (count,)),
        address("values", values, torch.float32, (count,)),
    )
    call("xopd_insert_entries", arguments)


def draw(logits: Logits, first_class: int, lists: Lists, classes: int, point: Point) -> None:
    """Go on with a tile of classes in drawing a class for each of some rows, in place.

    Drawn is the first class of the vocabulary at which the sum of exp(z - maximum) over the classes
    without an entry, or with one of value 0, is above `point.point`. Raises TypeError/ValueError
    for what does not fit, RuntimeError if the library is unavailable.
    """
    (count,), rows = point.rows.shape, len(lists.ids)
    if len(logits.x) != rows:
        raise ValueError(f"logits.x must have {rows} rows, those of the lists, got {len(logits.x)}")
    slope = point.slope
    if (slope is None) != (logits.cap is None):
        raise ValueError("point.slope must be given with a cap, and not without")
    arguments = _Draw(
        c_logits("logits", logits, first_class),
        logits.x.shape[1],
        first_class,
        entries_of(lists.entries, classes),
        address("lists.maximum", lists.maximum, torch.float32, (rows,)),
        count,
        address("point.rows", point.rows, torch.int64, (count,)),
        address("point.point", point.point, torch.float64, (count,)),
        address("point.running", point.running, torch.float64, (count,)),
        address("point.drawn", point.drawn, torch.int64, (count,)),
        address("point.last", point.last, torch.int64, (count,)),
        None if slope is None else address("point.slope", slope, torch.float32, (count,)),
    )
    call("xopd_draw_entries", arguments)
