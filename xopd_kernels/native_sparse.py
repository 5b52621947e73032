"""The compiled CPU kernels of sparse gradients: lists of the largest logits, their products.

Loading, threads and checks are those of `xopd_kernels.native_library`; the structs are those of
csrc/sparse/sparse.h. A list is a row of a [rows, capacity] block: `count` entries in the order of
their class numbers.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.native import CLogits, Logits, c_logits
from xopd_kernels.native_library import address, call, pointers, sizes

LANES = 16  # what a list has room for beside its entries, at least
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Listed(NamedTuple):
    """Lists of entries. Those of value 0 are none."""

    ids: Tensor  # [rows, capacity] int32 class numbers, ascending in a row
    values: Tensor  # [rows, capacity] fp32
    counts: Tensor  # [rows] int64 entries


class Lists(NamedTuple):
    """For each row the largest logits but those of its ids, and the sums over all others."""

    maximum: Tensor  # [rows] fp32 over all classes but the ids
    outside: Tensor  # [rows] fp64 sum exp(z - maximum) of the classes that are not on the list
    moment: Tensor | None  # [rows] fp64 the same of exp(z - maximum) (z - maximum)
    at_ids: Tensor  # [rows, k] fp32 z of the ids
    id_slope: Tensor | None  # [rows, k] fp32 dz/dx of them; with a cap
    counts: Tensor  # [rows] int64 entries
    cutoff: Tensor  # [rows] fp32
    ids: Tensor  # [rows, capacity] int32 class numbers
    values: Tensor  # [rows, capacity] fp32 z; from `finish_lists` on exp(z - maximum)
    slope: Tensor | None  # [rows, capacity] fp32 dz/dx; with a cap

    @classmethod
    def empty(
        cls, rows: int, capacity: int, id_count: int, has_cap: bool, has_moment: bool
    ) -> "Lists":
        """Lists that nothing was added to."""
        sums, block = torch.zeros(rows, dtype=torch.float64), (rows, capacity)
        return cls(
            torch.full((rows,), -torch.inf, dtype=torch.float32),
            sums,
            torch.zeros_like(sums) if has_moment else None,
            torch.zeros(rows, id_count, dtype=torch.float32),
            torch.zeros(rows, id_count, dtype=torch.float32) if has_cap else None,
            torch.zeros(rows, dtype=torch.int64),
            torch.full((rows,), -torch.inf, dtype=torch.float32),
            torch.empty(block, dtype=torch.int32),
            torch.empty(block, dtype=torch.float32),
            torch.empty(block, dtype=torch.float32) if has_cap else None,
        )

    @property
    def entries(self) -> Listed:
        """What is listed."""
        return Listed(self.ids, self.values, self.counts)


class Bounds(NamedTuple):
    """What comes on a list."""

    limit: int  # entries at most
    reach: float  # > 0: logits <= maximum - reach do not


class Inside(NamedTuple):
    """What is on the finished lists."""

    total: Tensor  # [rows] fp64 sum exp(z - maximum), without the ids
    moment: Tensor | None  # [rows] fp64
    places: Tensor  # [rows, k] int64 where the ids stand in the list


class ByClass(NamedTuple):
    """Entries in the order of their classes, those of a class in the order of rows."""

    offsets: Tensor  # [V + 1] int64: class v has the entries [offsets[v], offsets[v + 1])
    rows: Tensor  # [entries] int32
    values: Tensor  # [entries] fp32


class _Shortlist(ctypes.Structure):
    _fields_ = (
        ("logits", CLogits),
        *sizes("rows", "classes", "first_class"),
        *pointers("ids"),
        *sizes("id_count", "limit", "capacity"),
        ("reach", ctypes.c_float),
        *pointers("maximum", "outside", "moment", "at_ids", "id_slope"),
        *pointers("count", "cutoff", "listed", "z", "slope"),
    )


class _Finish(ctypes.Structure):
    _fields_ = (("lists", _Shortlist), *pointers("inside", "inside_moment", "places"))


class EntriesOfLists(ctypes.Structure):
    """The lists, as C++ reads them."""

    _fields_ = (*pointers("ids", "values", "count"), *sizes("rows", "row_stride", "classes"))


class _Matrix(ctypes.Structure):
    _fields_ = (*pointers("data"), *sizes("dtype", "row_stride", "first_row", "rows"))


class _Compact(ctypes.Structure):
    _fields_ = (
        ("entries", EntriesOfLists),
        *pointers("places"),
        *sizes("place_count"),
        *pointers("row_of"),
        *sizes("out_rows", "out_width"),
        *pointers("out_ids", "out_values"),
    )


class _Gather(ctypes.Structure):
    _fields_ = (
        ("entries", EntriesOfLists),
        *pointers("row_of"),
        *sizes("rows"),
        ("weight", _Matrix),
        *sizes("dim"),
        *pointers("out"),
    )


class _Sort(ctypes.Structure):
    _fields_ = (
        ("entries", EntriesOfLists),
        *pointers("offsets"),
        *sizes("capacity"),
        *pointers("rows", "values"),
    )


class _Scatter(ctypes.Structure):
    _fields_ = (
        *pointers("offsets", "rows", "values"),
        *sizes("entry_count", "classes"),
        ("hidden", _Matrix),
        *sizes("dim"),
        *pointers("out"),
        *sizes("out_dtype", "adds"),
        *pointers("bias"),
    )


def add_to_lists(
    logits: Logits, first_class: int, ids: Tensor, bounds: Bounds, lists: Lists
) -> None:
    """Fold a tile of classes into `lists`, in place.

    The tile holds the classes [first_class, first_class + classes); the tiles come in order. `ids`
    [rows, k] int64, ascending in a row, are neither listed nor summed. Of equal logits the first
    ones are listed. A -inf logit adds nothing and is not listed. A NaN makes `outside` NaN; so does
    +inf, of the list or outside. Raises TypeError/ValueError for a tensor that does not fit,
    RuntimeError if the library is unavailable.
    """
    call("xopd_add_shortlist", _shortlist(logits, first_class, ids, bounds, lists))


def finish_lists(ids: Tensor, bounds: Bounds, lists: Lists) -> Inside:
    """Cut `lists` to their limit, in place, and put the ids among their entries, with value 0.

    The values become exp(z - maximum). Behind the entries, ids are -1 and values 0. Raises as
    `add_to_lists`; ValueError if ids do not ascend.
    """
    rows, id_count = ids.shape
    inside = Inside(
        torch.zeros_like(lists.outside),
        None if lists.moment is None else torch.zeros_like(lists.moment),
        torch.zeros_like(ids),
    )
    has_cap = None if lists.slope is None else 1.0
    nothing = Logits(torch.zeros(rows, 0, dtype=torch.float32), None, 1.0, has_cap)
    arguments = _Finish(
        _shortlist(nothing, 0, ids, bounds, lists),
        address("inside.total", inside.total, torch.float64, (rows,)),
        None if inside.moment is None else inside.moment.data_ptr(),
        address("inside.places", inside.places, torch.int64, (rows, id_count)),
    )
    call("xopd_finish_shortlist", arguments)
    return inside


def compact(
    lists: Listed, classes: int, places: Tensor, rows: Tensor, ids: Tensor, values: Tensor
) -> None:
    """Write the entries that are not 0, and those at `places` [lists, k], to `rows` [lists] of out.

    `ids` [N, K] int64 and `values` [N, K] fp32: -1 and 0 behind a row's entries; the other rows
    stay. Raises TypeError/ValueError for what does not fit, also where a row has more than K.
    """
    count, place_count = places.shape
    arguments = _Compact(
        entries_of(lists, classes),
        address("places", places, torch.int64, (len(lists.ids), place_count)),
        place_count,
        address("rows", rows, torch.int64, (count,)),
        *ids.shape,
        address("ids", ids, torch.int64, ids.shape),
        address("values", values, torch.float32, ids.shape),
    )
    call("xopd_compact_entries", arguments)


def gather(
    lists: Listed, classes: int, rows: Tensor, weight: Tensor, first_class: int, out: Tensor
) -> None:
    """Add ``sum value * weight[class]`` over the entries of the lists `rows` [n] to `out` [n, D].

    `weight` [T, D] fp32, bf16 or fp16 holds the classes from `first_class` on, of `classes` in all;
    entries of other classes are passed over. `out` fp32; sums in fp32, in the order of classes.
    Raises TypeError/ValueError for what does not fit, RuntimeError if the library is unavailable.
    """
    count, dim = rows.numel(), weight.shape[1]
    arguments = _Gather(
        entries_of(lists, classes),
        address("rows", rows, torch.int64, (count,)),
        count,
        _matrix("weight", weight, first_class),
        dim,
        address("out", out, torch.float32, (count, dim)),
    )
    call("xopd_gather_entries", arguments)


def by_class(lists: Listed, classes: int) -> ByClass:
    """The entries of all lists whose value is not 0, sorted by class; ValueError for a wrong id."""
    entries = int(lists.values.count_nonzero())
    offsets = torch.empty(classes + 2, dtype=torch.int64)
    rows = torch.empty(entries, dtype=torch.int32)
    values = torch.empty(entries, dtype=torch.float32)
    arguments = _Sort(
        entries_of(lists, classes), offsets.data_ptr(), entries, rows.data_ptr(), values.data_ptr()
    )
    call("xopd_sort_entries", arguments)
    return ByClass(offsets[:-1], rows, values)


def scatter(
    entries: ByClass,
    tile: slice,
    hidden: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    adds: bool,
) -> None:
    """Write or add ``sum value * hidden[row]`` of the classes `tile` to `out` [T, D].

    `hidden` [rows, D] fp32, bf16 or fp16. `out` fp32, or bf16, rounded once, unless `adds`: then
    fp32, to which the sums are added. Else the classes without entries are set to 0. The sums of
    the values are added to `bias` [T] fp32. Sums in fp32, in the order of rows. Raises
    TypeError/ValueError for what does not fit, RuntimeError if the library is unavailable.
    """
    classes, dim = tile.stop - tile.start, hidden.shape[1]
    dtype = torch.float32 if out is None or adds else out.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"out must be fp32 or bf16, got {dtype}")
    offsets, count = entries.offsets[tile.start : tile.stop + 1], entries.rows.numel()
    arguments = _Scatter(
        address("entries.offsets", offsets, torch.int64, (classes + 1,)),
        address("entries.rows", entries.rows, torch.int32, (count,)),
        address("entries.values", entries.values, torch.float32, (count,)),
        count,
        classes,
        _matrix("hidden", hidden, 0),
        dim,
        None if out is None else address("out", out, dtype, (classes, dim)),
        _DTYPES[dtype],
        adds,
        None if bias is None else address("bias", bias, torch.float32, (classes,)),
    )
    call("xopd_scatter_entries", arguments)


def _shortlist(
    logits: Logits, first_class: int, ids: Tensor, bounds: Bounds, lists: Lists
) -> _Shortlist:
    head = c_logits("logits", logits, first_class)
    rows, classes = logits.x.shape
    if ids.ndim != 2:
        raise ValueError(f"ids must be [{rows}, k], got {list(ids.shape)}")
    block, id_count = (rows, lists.ids.shape[1]), ids.shape[1]
    if (lists.slope is None) != (logits.cap is None):
        raise ValueError("lists.slope must be given with a cap, and not without")
    if not 0 < bounds.limit <= block[1] - max(LANES, id_count):
        raise ValueError(
            f"bounds.limit must lie in [1, capacity - {max(LANES, id_count)}], got {bounds.limit} "
            f"for a capacity of {block[1]}"
        )
    if not bounds.reach > 0:
        raise ValueError(f"bounds.reach must be > 0, got {bounds.reach}")

    def optional(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int | None:
        dtype = torch.float64 if name == "moment" else torch.float32
        return None if tensor is None else address(f"lists.{name}", tensor, dtype, shape)

    return _Shortlist(
        head,
        rows,
        classes,
        first_class,
        address("ids", ids, torch.int64, (rows, id_count)),
        id_count,
        bounds.limit,
        block[1],
        bounds.reach,
        address("lists.maximum", lists.maximum, torch.float32, (rows,)),
        address("lists.outside", lists.outside, torch.float64, (rows,)),
        optional("moment", lists.moment, (rows,)),
        address("lists.at_ids", lists.at_ids, torch.float32, (rows, id_count)),
        optional("id_slope", lists.id_slope, (rows, id_count)),
        address("lists.counts", lists.counts, torch.int64, (rows,)),
        address("lists.cutoff", lists.cutoff, torch.float32, (rows,)),
        address("lists.ids", lists.ids, torch.int32, block),
        address("lists.values", lists.values, torch.float32, block),
        optional("slope", lists.slope, block),
    )


def list_addresses(lists: Listed) -> tuple[int, int, int]:
    """Where ids, values and count begin."""
    return (
        address("lists.ids", lists.ids, torch.int32, lists.ids.shape),
        address("lists.values", lists.values, torch.float32, lists.ids.shape),
        address("lists.counts", lists.counts, torch.int64, lists.ids.shape[:1]),
    )


def entries_of(lists: Listed, classes: int) -> EntriesOfLists:
    """Finished lists of a vocabulary of `classes`."""
    return EntriesOfLists(*list_addresses(lists), *lists.ids.shape, classes)


def _matrix(name: str, matrix: Tensor, first_row: int) -> _Matrix:
    if matrix.dtype not in _DTYPES or not matrix.is_cpu:
        raise TypeError(
            f"{name} must be fp32, bf16 or fp16 on the CPU, got {matrix.dtype} on {matrix.device}"
        )
    if matrix.ndim != 2 or (matrix.stride(1) != 1 and matrix.shape[1] > 1):
        raise ValueError(
            f"{name} must be [rows, D] with unit inner stride, got {list(matrix.shape)} with "
            f"strides {matrix.stride()}"
        )
    rows = len(matrix)
    return _Matrix(matrix.data_ptr(), _DTYPES[matrix.dtype], matrix.stride(0), first_row, rows)
