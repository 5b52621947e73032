"""Which entries of a chunk's logit gradient are left out: one rule for all backends.

A row's gradient is ``dz_v = f * p_v`` with a row factor f, but for the few classes that are kept
always (the target; a teacher's ids). A *list* names the row's likeliest other classes. Left out
are, with a bound on the sum of what is missing: whole rows, the classes outside of a row's list,
and small entries of a list. What is missing is never underestimated, and no value is read on the
host: the functions run on a CPU and on a CUDA device, and give one result for one input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.records import Head, Sparsity
from xopd_kernels.workload import TAIL_BYTES, TAIL_CLASSES

WHOLE_SHARE, OUTSIDE_SHARE, SPARED_SHARE = 1 / 16, 14 / 16, 1 / 16  # of the allowance
LADDER_STEPS = 16  # thresholds for the entries of a list, each twice the one before
LADDER_BASE = 2.0**-13  # the lowest, of what a row may lose: it fits for lists of 8192 classes
LEAST_SCALE = 2.0**-100  # of a row that is listed: products below it lose their digits
_TAIL_COPY = 64  # rows of the weight that are copied at a time
_UNIT_BITS = 40  # sums that decide are of integers in units of allowance * 2^-40


def rounding_of(dtype: torch.dtype) -> float:
    """Relative error of a probability or of a sum of them, generously: 2^-18 in fp32."""
    return 32 * torch.finfo(dtype).eps


def raised_mass(mass: Tensor, whole: Tensor | float, dtype: torch.dtype) -> Tensor:
    """fp64 `mass` that is not below the true one, computed in `dtype` with an error as of `whole`.

    `whole` is `mass` itself if that was summed over its classes, and the minuend (1) if it is a
    difference, as its error is that of what cancels.
    """
    return mass.double() + rounding_of(dtype) * torch.as_tensor(whole).double()


class RowMass(NamedTuple):
    """What the rule reads of the rows of a chunk; ignored rows are not among them, or all 0."""

    scale: Tensor  # [rows] |f|: the gradient of class v is f * p_v where it is not kept always
    norm: Tensor  # [rows] ||dz_i||_1; of c (1[y] - p): 2 |c| (1 - p_y)
    rest: Tensor  # [rows] mass that a row left out whole lacks: 1 - p_y
    outside: Tensor  # [rows] fp64 mass outside of the list, not below the true one: raised_mass
    # [rows, K] p of the listed classes, and 0 for those that are kept always and for padding.
    listed: Tensor


class Choice(NamedTuple):
    """What is left out of a chunk. A row that is neither whole nor sparse is dense: all is kept."""

    is_whole: Tensor  # [rows] bool: no gradient at all
    is_sparse: Tensor  # [rows] bool: the list alone, without entries up to the threshold
    # [] (of choose_row_entries: [rows]) in the dtype of RowMass.listed: listed entries of a sparse
    # row with scale * p <= threshold are left out, too; compare in that dtype: `is_spared`.
    threshold: Tensor
    dropped_mass: Tensor  # [rows] fp64 mass of the classes left out; 0 if dense or without gradient
    error: Tensor  # [] fp64 sum of ||dz_i - dz'_i||_1, not below the true one
    norm: Tensor  # [] fp64 sum of ||dz_i||_1, not above the true one

    def is_spared(self, rows: RowMass) -> Tensor:
        """[rows, K] bool: the entries of the lists that are left out, in rows that are sparse.

        Only where `rows.listed` is no padding and not kept always does it mean anything.
        """
        limit = self.threshold if self.threshold.ndim == 0 else self.threshold[:, None]
        return (_entries(rows) <= limit) & self.is_sparse[:, None]

    def missing(self, factor: Tensor) -> Tensor:
        """[rows] sum of dz over what sparse rows lack, for `Tail`, of the `factor` [rows] f."""
        amount = torch.where(self.is_sparse, factor * self.dropped_mass, 0.0)
        return amount.to(self.threshold.dtype)


def choose_rows(rows: RowMass, sparsity: Sparsity) -> Choice:
    r"""What is left out of a chunk whose row factors are known.

    With e = `sparsity.max_error` and the allowance ``B = e * sum_i ||dz_i||_1`` over the rows:

    1. *Rows left out whole* in ascending order of ``||dz_i||_1`` while their sum is <= B/16.
    2. *Sparse rows* in ascending order of ``scale_i * outside_i`` while the sum is <= 14/16 B.
    3. *Spared entries*: listed ones of sparse rows with ``scale_i * p <= t``, t the largest of
       `LADDER_STEPS` thresholds from ``B / (16 rows) * 2^-13`` on, each twice the one before, such
       that their sum is <= B/16.

    Ties go to the lower row. Hence ``sum ||dz - dz'||_1 <= e * sum ||dz||_1`` over the chunk, and
    over all chunks. Sums in fp64; those that decide 1 and 2 are of integers, rounded up, so that
    their order does not matter. e = 0 leaves out nothing but zeros.

    "unbiased": a class v that is drawn with ``p_v / dropped`` stands for those left out, with the
    entry ``f * dropped``. The row is then off by ``2 scale (dropped - p_v)``: everything counts
    twice, and the bound holds for every draw. No row is left out whole, but for those without a
    gradient.

    Rows whose norm is not finite are dense, and do not count. So are, unless left out whole, those
    of a factor below 2^-100.

    Args:
        rows: [rows] and [rows, K]; floating point, any mix of dtypes.
        sparsity: the mode and e.
    """
    listed = rows.listed
    rounding = rounding_of(listed.dtype)
    scale, norm = rows.scale.double(), rows.norm.double()
    is_finite = norm.isfinite() & rows.outside.isfinite()
    total = (norm.where(is_finite, 0.0) * (1 - rounding)).sum()
    allowance = bound_in_fp32(sparsity.max_error) * total
    times = 2.0 if sparsity.is_unbiased else 1.0
    whole_error = norm * (1 + rounding)
    is_whole = is_finite & (norm == 0)
    if not sparsity.is_unbiased:
        is_whole = _cheapest(whole_error.where(is_finite, torch.inf), allowance, WHOLE_SHARE)
    outside_error = times * scale * rows.outside
    is_candidate = is_finite & ~is_whole & (scale >= LEAST_SCALE)
    is_sparse = _cheapest(outside_error.where(is_candidate, torch.inf), allowance, OUTSIDE_SHARE)
    limit = allowance * (SPARED_SHARE / times / (1 + rounding))
    values = _entries(rows) * is_sparse[:, None]  # of other rows 0: they add nothing
    threshold, _ = _climb(values, limit, limit / max(1, len(listed)))
    spared = listed.where(values <= threshold, 0.0).sum(1).double() * (1 + rounding)
    dropped = torch.where(is_sparse, rows.outside + spared, 0.0)
    error = (times * scale * dropped + whole_error.where(is_whole, 0.0)).where(is_finite, 0.0)
    dropped = torch.where(is_whole & (norm > 0), rows.rest.double(), dropped)
    return Choice(is_whole, is_sparse, threshold, dropped, error.sum(), total)


def choose_row_entries(rows: RowMass, sparsity: Sparsity) -> Choice:
    """What is left out of rows whose factor only the backward pass knows: each row by itself.

    `rows` are those of factor 1: ``norm = 2 (1 - p_y)``. A row is sparse if its mass outside is
    <= 15/16 e ||dz_i||_1; listed entries are spared for the last 16th, as in `choose_rows`, with a
    threshold for each row. No row is left out whole. Then ``||dz_i - dz'_i||_1 <= e ||dz_i||_1``
    for every row and any upstream gradient. `error` and `norm` belong to the worst row, so that
    their quotient is the largest of all.
    """
    listed = rows.listed
    rounding = rounding_of(listed.dtype)
    norm = rows.norm.double() * (1 - rounding)
    allowance = bound_in_fp32(sparsity.max_error) * norm
    is_sparse = norm.isfinite() & (rows.outside <= (1 - SPARED_SHARE) * allowance)
    limit = torch.where(is_sparse, allowance * (SPARED_SHARE / (1 + rounding)), 0.0)
    threshold, spared = _climb(listed, limit, limit)
    dropped = torch.where(is_sparse, rows.outside + spared * (1 + rounding), 0.0)
    quotient = torch.where(dropped > 0, dropped / norm, 0.0)
    error = quotient.amax() if len(quotient) else quotient.sum()
    nothing = torch.zeros_like(is_sparse)
    return Choice(nothing, is_sparse, threshold, dropped, error, torch.ones_like(error))


def gradient_error(error: Tensor, norm: Tensor, sparsity: Sparsity) -> Tensor:
    """``error / norm`` [] fp32, of the sums over all chunks: not below the true one, and <= e."""
    quotient = torch.where(error > 0, error / norm, 0.0)
    rounded = quotient.float()
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded < quotient, up, rounded).clamp(max=bound_in_fp32(sparsity.max_error))


def bound_in_fp32(max_error: float) -> float:
    """The largest fp32 number that is not above `max_error`."""
    bound = torch.tensor(max_error, dtype=torch.float32)
    if bound.item() > max_error:
        bound = torch.nextafter(bound, torch.zeros(()))
    return float(bound.item())


class Tail(NamedTuple):
    """Some classes that stand for all that the rows of a sparse gradient leave out.

    A row of d_hidden is ``sum_v dz_v s_v W_v`` with the slopes s = d(logit)/d(linear output) and
    the rows W_v of the weight. The classes left out are unlikely, but what their rows of W have in
    common adds up: ``dz_v = f p_v`` has one sign. In its place comes ``sum dz_v`` over them, which
    is known, times u_i, their mean of ``s_v W_v`` weighted with p, over those of about
    `TAIL_CLASSES` that row i leaves out. The row of d_hidden is then off by at most
    ``||dz_i - dz'_i||_1 max_v ||s_v W_v - u_i||``. A class that is drawn for those left out
    ("unbiased") has their sum already. An entry whose slope is 0 in fp32 counts as left out.
    """

    classes: Tensor  # [S] int64, one of so many in a row
    place: Tensor  # [V] int64 their numbers among the S; S for all others
    weight: Tensor  # [S, D] their rows of the weight, in the dtype of the arithmetic
    bias: Tensor | None  # [S]
    head: Head

    @classmethod
    def of(cls, head: Head, dtype: torch.dtype) -> "Tail":
        """The same classes for any head of as many.

        Each at a hashed place: evenly spaced ones have all or none of what has their period.
        """
        count, device = len(head.weight), head.weight.device
        step = -(-count // TAIL_CLASSES)
        first = torch.arange(0, count, step, device=device)
        width = (count - first).clamp(max=step)
        classes = first + (row_uniform(0, first) * width).long()
        place = first.new_full((count,), len(first))
        place[classes] = torch.arange(len(first), device=device)
        weight = head.weight.new_empty(len(first), head.weight.shape[1], dtype=dtype)
        for begin in range(0, len(first), _TAIL_COPY):  # indexing makes a copy of its own
            part = slice(begin, begin + _TAIL_COPY)
            weight[part] = head.weight[classes[part]]
        bias = None if head.bias is None else head.bias[classes].to(dtype)
        return cls(classes, place, weight, bias, head)

    def listed(self, ids: Tensor, is_entry: Tensor) -> Tensor:
        """[rows, S] bool: which of them are entries: `ids` [rows, K] where `is_entry` [rows, K]."""
        count = len(self.classes)
        # Behind the entries ids may be anything.
        place = self.place[ids.where(is_entry, 0)].masked_fill_(~is_entry, count)
        found = ids.new_zeros(len(ids), count + 1, dtype=torch.bool)
        return found.scatter_(1, place, True)[:, :count]

    def means(self, hidden: Tensor, listed: Tensor) -> Tensor:
        """u [rows, D] for `hidden` [rows, D], over the classes that are not `listed` [rows, S]."""
        # With out, autocast leaves the dtypes alone.
        z = self.weight.new_empty(len(hidden), len(self.weight))
        torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=z)
        if self.bias is not None:
            z += self.bias
        scale, cap = self.head.scale_and_cap
        z.mul_(scale)
        slope = None
        if cap is not None:
            slope = z.tanh_().square().neg_().add_(1.0)
            z.mul_(cap)
        share = z.masked_fill_(listed, -torch.inf).softmax(1)
        # Where all of them are entries, or a logit is not finite: any u is right.
        share = share.nan_to_num_(1 / len(self.weight)).mul_(self.head.slope)
        if slope is not None:
            share.mul_(slope.nan_to_num_(0.0))
        means = self.weight.new_empty(hidden.shape)
        return torch.mm(share, self.weight, out=means)

    def rows_at_once(self, more: int = 0) -> int:
        """Rows for which `means`, and `more` bytes of each row, take TAIL_BYTES."""
        row_bytes = more + self.weight.element_size() * (5 * len(self.weight))
        return max(1, TAIL_BYTES // (row_bytes + 2 * self.weight[0].nbytes))

    def add_to(
        self, d_hidden: Tensor, hidden: Tensor, ids: Tensor, is_entry: Tensor, missing: Tensor
    ) -> None:
        """Add ``missing_i u_i`` to `d_hidden` [rows, D], some rows at a time.

        `hidden` [rows, D]; the classes `ids` [rows, K] are entries where `is_entry`; `missing`
        [rows]: the sum of dz over all others.
        """
        step = self.rows_at_once(18 * ids.shape[1])
        for begin in range(0, len(hidden), step):
            part = slice(begin, begin + step)
            listed = self.listed(ids[part], is_entry[part])
            d_hidden[part] += missing[part, None] * self.means(hidden[part], listed)


class Missing(NamedTuple):
    """What the rows of a chunk lack, of a gradient among zeros."""

    tail: Tail
    amount: Tensor  # [rows] sum of dz over the classes left out

    def take(self, alive: Tensor | None) -> "Missing":
        """Of the rows `alive`; all of them if None."""
        return self if alive is None else Missing(self.tail, self.amount[alive])

    def add_to(self, d_hidden: Tensor, hidden: Tensor, d_logit: Tensor) -> None:
        """As `Tail.add_to`; the entries of `d_logit` [rows, V] are what is not 0."""
        step = self.tail.rows_at_once()
        for begin in range(0, len(hidden), step):
            part = slice(begin, begin + step)
            means = self.tail.means(hidden[part], d_logit[part, self.tail.classes] != 0)
            d_hidden[part] += self.amount[part, None] * means


def row_uniform(seed: int, rows: Tensor) -> Tensor:
    """A number in [0, 1) for each row number `rows` [n] int64, among all N rows: fp64.

    The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of seed and row number, its
    upper 53 bits: it depends on nothing else, and is the same on every device. The class of a row
    is drawn by it in the order of the class numbers: the first at which the sum of the masses left
    out is greater than the number times their whole sum.
    """
    # Arithmetic modulo 2^64, in the two's complement of int64.
    state = _mixed(torch.full_like(rows, _signed(seed)))
    state = _mixed(state + (rows + 1) * _signed(0x9E3779B97F4A7C15))
    return _shifted(state, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x` shifted to the right with zeros: >> of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _entries(rows: RowMass) -> Tensor:
    """[rows, K] magnitude of the listed entries of the gradient, in the dtype of the lists."""
    return rows.listed * rows.scale.to(rows.listed.dtype)[:, None]


def _cheapest(cost: Tensor, allowance: Tensor, share: float) -> Tensor:
    """[rows] bool: the rows of least `cost` whose sum is <= share * allowance; not those of inf."""
    one = 1 << _UNIT_BITS
    # Rounded up; what is above the allowance by itself counts as 1, so that nothing overflows.
    units = torch.where(cost > 0, cost / allowance * one, 0.0).nan_to_num(one, one, one)
    units = units.ceil().clamp(max=one).long()
    order = cost.sort(stable=True).indices
    fits = units[order].cumsum(0) <= int(share * one)
    return torch.zeros_like(fits).scatter(0, order, fits)


def _climb(values: Tensor, limit: Tensor, row_limit: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest threshold whose values sum to at most `limit`, their sums [rows]).

    `limit` and `row_limit`, that of a row on average: [], for a sum over all of `values` [rows, K],
    or [rows] for one over each row. -1, which leaves out nothing, if not even the lowest fits.
    """
    is_per_row = limit.ndim > 0
    threshold = torch.full_like(limit, -1.0).to(values.dtype)
    kept = values.new_zeros(len(values), dtype=torch.float64)
    for step in range(LADDER_STEPS):
        candidate = (row_limit * (LADDER_BASE * 2.0**step)).to(values.dtype)
        column = candidate[:, None] if is_per_row else candidate
        sums = values.where(values <= column, 0.0).sum(1).double()
        fits = (sums if is_per_row else sums.sum()) <= limit
        threshold = torch.where(fits, candidate, threshold)
        kept = torch.where(fits, sums, kept)
    return threshold, kept
