"""Arguments of the kernels of sparse gradients that do not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.native.formulas import linear
from xopd_kernels.native import Logits
from xopd_kernels.native_draw import Point, draw, insert
from xopd_kernels.native_sparse import (
    Bounds,
    Listed,
    Lists,
    add_to_lists,
    by_class,
    finish_lists,
    gather,
    scatter,
)

pytestmark = pytest.mark.usefixtures("library")

FAR = 80.0  # a reach that drops nothing
IDS = torch.zeros(2, 1, dtype=torch.int64)
BOUNDS = Bounds(4, FAR)
LISTS = Lists.empty(2, 30, 1, False, True)
ENTRIES = Listed(torch.tensor([[0, 4], [1, 2]]).int(), torch.ones(2, 2), torch.tensor([2, 2]))
STUDENT = linear(torch.zeros(2, 5))
POINT = Point.of(torch.arange(2), torch.zeros(2, dtype=torch.float64), False)


def add(
    logits: Logits = STUDENT, ids: Tensor = IDS, bounds: Bounds = BOUNDS, lists: Lists = LISTS
) -> None:
    add_to_lists(logits, 0, ids, bounds, lists)


def products(entries: Listed = ENTRIES, rows: Tensor = IDS[:, 0], classes: int = 5) -> None:
    gather(entries, classes, rows, torch.ones(classes, 3), 0, torch.zeros(2, 3))


def sums(hidden: Tensor, out: Tensor, adds: bool = False) -> None:
    scatter(by_class(ENTRIES, 5), slice(0, 5), hidden, out, None, adds)


HIDDEN, OUT = torch.ones(2, 3), torch.zeros(5, 3)
LATE = ENTRIES._replace(ids=torch.tensor([[0, 5], [1, 2]]).int())
NEGATIVE = ENTRIES._replace(ids=torch.tensor([[0, -1], [1, 2]]).int())
WRONG: list[tuple[str, type[Exception], Callable[[], None]]] = [
    ("ids", TypeError, lambda: add(ids=IDS.int())),
    ("ids", ValueError, lambda: add(ids=IDS[:, 0])),
    ("ids", ValueError, lambda: add(ids=IDS[:1])),
    ("bounds.limit", ValueError, lambda: add(bounds=Bounds(0, FAR))),
    ("bounds.limit", ValueError, lambda: add(bounds=Bounds(15, FAR))),
    ("bounds.reach", ValueError, lambda: add(bounds=Bounds(4, 0.0))),
    ("bounds.reach", ValueError, lambda: add(bounds=Bounds(4, math.nan))),
    ("lists.slope", ValueError, lambda: add(STUDENT._replace(cap=2.0))),
    ("lists.outside", TypeError, lambda: add(lists=LISTS._replace(outside=LISTS.maximum))),
    ("lists.ids", TypeError, lambda: add(lists=LISTS._replace(ids=LISTS.ids.long()))),
    ("lists.values", ValueError, lambda: add(lists=LISTS._replace(values=torch.zeros(2, 29)))),
    ("ids", ValueError, lambda: add(lists=LISTS._replace(counts=torch.tensor([31, 0])))),
    ("ids", ValueError, lambda: add(lists=LISTS._replace(counts=torch.tensor([0, -1])))),
    ("ids", ValueError, lambda: finish_ids(torch.tensor([[-1], [0]]))),
    ("ids", ValueError, lambda: finish_ids(torch.tensor([[1, 1], [0, 1]]))),
    ("ids", ValueError, lambda: finish_ids(torch.tensor([[2**40], [0]]))),
    ("ids", ValueError, lambda: products(LATE)),
    ("ids", ValueError, lambda: products(NEGATIVE)),
    ("ids", ValueError, lambda: products(ENTRIES._replace(counts=torch.tensor([3, 0])))),
    ("ids", ValueError, lambda: products(ENTRIES._replace(counts=torch.tensor([-1, 0])))),
    ("rows", ValueError, lambda: products(rows=torch.tensor([0, 2]))),
    ("rows", ValueError, lambda: products(rows=torch.tensor([-1, 0]))),
    ("ids", ValueError, lambda: ignored(by_class(LATE, 5))),
    ("ids", ValueError, lambda: sums(HIDDEN[:1], OUT)),
    ("hidden", TypeError, lambda: sums(HIDDEN.double(), OUT)),
    ("hidden", ValueError, lambda: sums(torch.ones(3, 2).t(), OUT)),
    ("out", TypeError, lambda: sums(HIDDEN, OUT.half())),
    ("out", TypeError, lambda: sums(HIDDEN, OUT.bfloat16(), adds=True)),
    ("out", ValueError, lambda: sums(HIDDEN, OUT[:4])),
    ("logits.x", ValueError, lambda: draw(linear(torch.zeros(3, 5)), 0, LISTS, 5, POINT)),
    ("rows", ValueError, lambda: drawn_rows(torch.tensor([0, 2]))),
    ("rows", ValueError, lambda: insert(ENTRIES, IDS[:, 0] + 2, IDS[:, 0], torch.ones(2))),
]


def ignored(_: object) -> None:
    pass


def finish_ids(ids: Tensor) -> None:
    lists = Lists.empty(2, 30, ids.shape[1], False, False)
    finish_lists(ids, BOUNDS, lists)


def drawn_rows(rows: Tensor) -> None:
    draw(STUDENT, 0, Lists.empty(2, 30, 1, False, False), 5, POINT._replace(rows=rows))


@pytest.mark.parametrize(("name", "error", "call"), WRONG)
def test_what_does_not_fit_is_named(
    name: str, error: type[Exception], call: Callable[[], None]
) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}"):
        call()
