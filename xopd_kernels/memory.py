"""What a call allocates, before it runs: rows of a chunk and the bytes of every buffer.

The operators take their chunk from here, so the plan is what happens. Workspace does not grow
with the number of tokens; results, gradients and a few floats a token do, and are listed apart.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from xopd_kernels import native_matmul
from xopd_kernels.backend import Backend
from xopd_kernels.records import Wanted
from xopd_kernels.validation import check_budget
from xopd_kernels.workload import LIST_BYTES, SHARED_BLOCK, Operator, Workload

MIB = 2**20
DEFAULT_CPU_BYTES = 48 * MIB  # of workspace: near the caches of a server processor
DEFAULT_CUDA_BYTES = 640_000_000  # about 1000 rows of 152,000 fp32 logits
BLOCK_BYTES = MIB  # a copy of some rows of logits on the CPU: it stays in a core's cache
PIECE_BYTES = MIB // 4  # a temporary where element-wise work has many of them
DEFAULT_MIN_ROWS = 16  # what the default budget may exceed itself for at a huge vocabulary
MAX_CHUNK_ROWS = 4096  # more rows no longer help the GEMMs
MAX_NATIVE_SCORING_ROWS = 2048  # as many as GEMMs over a tile of classes gain from
MAX_SCORING_ROWS = 16_384  # without logits a chunk only bounds the copy of its hidden states
LIST_SLOT_BYTES = 40  # of a chunk's list: class, value, slope, what the rule and sorting need
LIST_ROOM = 64  # slots of a list beyond its length: entries that come before it is cut
TRITON_ROW_STEP = 128  # rows of a tile
_LEAST_PIECE_BYTES = 64
_PARTIAL_CLASSES = 256  # at least this many classes share one set of partial statistics


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a call allocates at its peak; the inputs are not counted."""

    chunk_rows: int  # rows whose logits exist at one time
    logits_bytes: int  # [chunk_rows, V] buffers; 0 where no logits are stored, or in d_weight
    tile_bytes: int  # part of the weight in the dtype of the arithmetic (REFERENCE, NATIVE)
    block_bytes: int  # element-wise temporaries (REFERENCE); never beside the tile
    scratch_bytes: int  # copies of a chunk's hidden states, statistics
    accumulator_bytes: int  # fp32 gradients that are rounded to their dtype at the end
    row_bytes: int  # per-token statistics and results: some floats for each of the N tokens
    gradient_bytes: int  # d_hidden, d_weight, d_bias as they are handed out
    list_bytes: int  # lists of a sparse gradient: of a chunk; LOGPROB: also those of all rows

    @property
    def workspace_bytes(self) -> int:
        """What memory_budget_bytes bounds; the same for every N that fills a chunk."""
        return self.logits_bytes + max(self.tile_bytes, self.block_bytes) + self.scratch_bytes

    @property
    def extra_bytes(self) -> int:
        """Everything beyond inputs and gradients."""
        work = self.workspace_bytes + self.list_bytes
        return work + self.accumulator_bytes + self.row_bytes

    @property
    def peak_bytes(self) -> int:
        """Everything beyond the inputs."""
        return self.extra_bytes + self.gradient_bytes


def memory_plan(
    work: Workload, backend: Backend, memory_budget_bytes: int | None = None
) -> MemoryPlan:
    """The plan of a call on `backend` (TRITON: on a CUDA device); ValueError as in the call.

    `memory_budget_bytes` bounds the workspace; None: 48 MiB (REFERENCE, NATIVE), 640 MB (TRITON),
    or what 16 rows need if that is more. The fp32 sum of a narrower d_weight, the lists of a
    sparse gradient (about 40 MiB at most) and the gradients come on top, see the fields.

    Not counted, because they depend on how the inputs lie: a copy of hidden [N, D] whose leading
    dimensions do not flatten as a view (``hidden[:, :-1]``), one of a weight neither of whose
    strides is 1 (TRITON: whole; NATIVE and REFERENCE: an fp32 one by tiles), one by tiles of a bf16
    weight whose rows are not contiguous (NATIVE), casts under autocast,
    and a second set of gradients where the graph is kept (retain_graph), where the upstream
    gradient of a divergence differs from token to token, or where the teacher's vocabulary is the
    smaller one (torch pads d_weight). NATIVE with a main_grad that is added to in the backward pass
    has its later chunks of bf16 in the workspace.

    Example:
        >>> import torch
        >>> from xopd_kernels import Backend, Operator, Workload, memory_plan
        >>> work = Workload(Operator.POLICY_LOSS, 8192, 151_936, 2048, torch.bfloat16)
        >>> memory_plan(work, Backend.TRITON).chunk_rows
        1024
    """
    _check(work, backend, memory_budget_bytes)
    wanted, size = work.wanted, work.dtype.itemsize
    needs = _Needs.of(work, backend)
    budget = _budget(needs, memory_budget_bytes)
    if backend is Backend.NATIVE:
        return _native_plan(work, needs, budget)
    chunk = _fitting_rows(work, needs, budget)
    has_d_weight = wanted.weight and not work.adds_to_main_grad
    weight_elements = work.vocab_size * (has_d_weight * work.dim + wanted.bias)
    hidden_elements = work.rows * work.dim * wanted.hidden
    is_rounded = work.arithmetic != work.dtype
    return MemoryPlan(
        chunk_rows=chunk,
        logits_bytes=chunk * needs.logits,
        tile_bytes=needs.tile(budget),
        block_bytes=needs.blocks(budget),
        scratch_bytes=chunk * needs.scratch,
        accumulator_bytes=weight_elements * work.arithmetic.itemsize * is_rounded
        + 4 * hidden_elements * work.holds_fp32,
        row_bytes=work.rows * _statistics_bytes(work),
        gradient_bytes=(hidden_elements + weight_elements) * size,
        list_bytes=_list_bytes(work, chunk),
    )


def _check(work: Workload, backend: Backend, budget: int | None) -> None:
    """Raise TypeError or ValueError for a plan of a call that could not be made."""
    kinds = (
        ("operator", work.operator, Operator),
        ("dtype", work.dtype, torch.dtype),
        ("wanted", work.wanted, Wanted),
        ("backend", backend, Backend),
    )
    for name, value, kind in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
    check_budget(budget)
    for name in ("rows", "vocab_size", "dim", "teacher_dim", "top_k"):
        size, least = getattr(work, name), int(name in ("vocab_size", "dim"))
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"{name} must be an int >= {least}, got {size!r}")
    if not work.dtype.is_floating_point:
        raise ValueError(f"dtype must be bf16, fp16, fp32 or fp64, got {work.dtype}")
    if (work.operator is Operator.DIVERGENCE) != (work.teacher_dim > 0):
        raise ValueError(
            f"teacher_dim must be > 0 for DIVERGENCE and 0 for the others, got {work.teacher_dim} "
            f"for {work.operator.name}"
        )
    if (work.operator is Operator.TOPK_DIVERGENCE) != (0 < work.top_k <= work.vocab_size):
        raise ValueError(
            f"top_k must lie in [1, V] for TOPK_DIVERGENCE and be 0 for the others, got "
            f"{work.top_k} for {work.operator.name}"
        )
    if backend is not Backend.REFERENCE and work.dtype == torch.float64:
        raise ValueError(f"backend {backend.name} does not run {work.dtype}; REFERENCE does")


@dataclass(frozen=True)
class _Needs:
    """Bytes of workspace: for each row of a chunk, and whatever the chunk."""

    logits: int  # a row of every [rows, V] buffer
    scratch: int  # a row of everything else
    row: int  # a row of one [rows, V] buffer
    pieces: int  # temporaries of PIECE_BYTES that exist at a time
    tile_row: int  # a class of the weight tile; 0 where nothing is upcast
    tile_limit: int  # the whole weight
    step: int  # chunks are a multiple of it, if they hold that many rows
    least_rows: int
    default_bytes: int
    error: str  # how an error names the call
    tile_step: int = 1  # the tile is a multiple of as many classes
    fixed: int = 0  # whatever the chunk, beside it

    @classmethod
    def of(cls, work: Workload, backend: Backend) -> "_Needs":
        size, is_divergence = work.arithmetic.itemsize, work.operator is Operator.DIVERGENCE
        error = (
            f"V={work.vocab_size}, D={work.dim}, {work.dtype} and {work.operator.value} on "
            f"{backend.name}"
        )
        if backend is Backend.TRITON:
            is_scoring = work.operator in (Operator.LOGPROB, Operator.POLICY_LOSS)
            stored = 1 + is_divergence if work.has_gradient or not is_scoring else 0
            slabs = -(-work.vocab_size // _PARTIAL_CLASSES)
            hidden = max(work.dim, work.teacher_dim) * work.dtype.itemsize
            scratch = hidden + (1 + is_divergence) * 3 * 4 * slabs + 64 + 16 * work.top_k
            logits = stored * size * work.vocab_size
            return cls(logits, scratch, 0, 0, 0, 0, TRITON_ROW_STEP, 16, DEFAULT_CUDA_BYTES, error)
        if backend is Backend.NATIVE:
            return cls._of_native(work, error)
        # The slope of the softcap is kept beside the logits until they have become a gradient.
        has_slope = work.has_softcap and work.has_gradient
        row = size * work.vocab_size
        logits = row * (1 + is_divergence + has_slope + work.needs_entropy)
        # Hidden states and their gradient in the dtype of the arithmetic, the gradient once more as
        # it is rounded; a chunk's statistics.
        scratch = (2 * work.dim + work.teacher_dim + 4 * work.top_k + 32) * size
        scratch += work.dim * work.dtype.itemsize * (work.dtype != work.arithmetic)
        pieces = 12 if is_divergence else 0  # of the Jensen-Shannon divergence: eleven and masks
        dtypes = {work.dtype, work.teacher_dtype or work.dtype}
        widest = max(work.dim, work.teacher_dim) * size * (dtypes != {work.arithmetic})
        limit = widest * work.vocab_size
        return cls(logits, scratch, row, pieces, widest, limit, 1, 1, DEFAULT_CPU_BYTES, error)

    @classmethod
    def _of_native(cls, work: Workload, error: str) -> "_Needs":
        models, is_stored = work.models, work.has_gradient or work.operator is Operator.DIVERGENCE
        tile, dim, size = work.tile_classes, work.dim, work.dtype.itemsize
        logits = 4 * work.vocab_size * models if is_stored else 0
        # A tile of logits or of their gradient; hidden states and their gradient; of the policy
        # loss also the hidden states with a gradient.
        copies = 1 + (work.operator is Operator.POLICY_LOSS)
        scratch = 4 * (tile + dim + 32) + 72 * work.top_k
        scratch += dim * size * (work.dtype != torch.float32)  # d_hidden rounded
        scratch += work.teacher_dim * _factor_bytes(work.teacher_or_own_dtype, work.teacher_dim)
        scratch += copies * dim * _factor_bytes(work.dtype, dim)
        whole, fixed = native_matmul.whole, 0
        packs = native_matmul.multiplies(work.dtype, dim)
        packs_teacher = native_matmul.multiplies(work.teacher_or_own_dtype, work.teacher_dim)
        for width in (dim * packs, work.teacher_dim * packs_teacher):
            scratch += 2 * width  # packed, in whole blocks of rows
            fixed += 2 * width * (native_matmul.BLOCK - 1)
        # Tiles of the weight, packed or upcast; one of the teacher's or of d_weight unrounded.
        row = 4 * dim * (work.dtype != torch.float32 and not packs)
        if packs and work.has_gradient:
            scratch += 4 * (tile + 1) + 2 * whole(dim)  # d_logit twice, hidden states
            fixed += 2 * whole(dim) + 2 * tile
            row = 2 * whole(dim)
        row += 4 * work.shared_tile_dim
        limit = (tile + tile % 2) * row
        step = 2 if row else 1
        return cls(logits, scratch, 0, 0, row, limit, 1, 1, DEFAULT_CPU_BYTES, error, step, fixed)

    def tile(self, budget: int) -> int:
        """Bytes of the weight tile: a quarter of the budget, whole classes, at least one step."""
        if self.tile_row == 0:
            return 0
        step = self.tile_step * self.tile_row
        return min(self.tile_limit, max(1, budget // 4 // step) * step)

    def block(self, budget: int) -> int:
        """Bytes of a copy of rows: at least one."""
        return max(self.row, min(BLOCK_BYTES, budget // 32))

    def piece(self, budget: int) -> int:
        """Bytes of a temporary that may be a part of a row."""
        return max(_LEAST_PIECE_BYTES, min(PIECE_BYTES, budget // 64))

    def blocks(self, budget: int) -> int:
        """Bytes of all temporaries of element-wise work; a row block has a copy and a result."""
        return 2 * self.block(budget) * (self.row > 0) + self.pieces * self.piece(budget)

    def rows(self, budget: int) -> int:
        """Rows that fit beside the rest."""
        rest = budget - max(self.blocks(budget), self.tile(budget)) - self.fixed
        return rest // (self.logits + self.scratch)

    def smallest(self, rows: int) -> int:
        """A budget that holds `rows` rows: blocks and tile take shares of it, or their minimum."""
        rest = rows * (self.logits + self.scratch) + self.fixed
        tile = self.tile_step * self.tile_row
        rest += max(2 * self.row + self.pieces * _LEAST_PIECE_BYTES, tile)
        # Of 64 parts: one for each piece, two for each block, or a quarter for the tile.
        blocks = self.pieces + 4 * (self.row > 0)
        return rest * 64 // (64 - max(blocks, 16 * (self.tile_row > 0))) + 1


def chunk_rows(work: Workload, backend: Backend, memory_budget_bytes: int | None) -> int:
    """Rows of a chunk within the budget, at most `work.rows` (at least 1).

    Raises:
        ValueError: the budget does not hold the smallest chunk; the message says what would.
    """
    needs = _Needs.of(work, backend)
    return _fitting_rows(work, needs, _budget(needs, memory_budget_bytes))


class Blocks(NamedTuple):
    """How REFERENCE cuts its work so that temporaries stay small."""

    tile_classes: int  # classes of the weight that are upcast at a time
    rows: int  # rows of a [rows, V] buffer that are copied at a time
    piece: int  # elements of a temporary where there are many

    @classmethod
    def of(cls, work: Workload, memory_budget_bytes: int | None) -> "Blocks":
        """The blocks within the budget."""
        needs, size = _Needs.of(work, Backend.REFERENCE), work.arithmetic.itemsize
        budget = _budget(needs, memory_budget_bytes)
        classes = max(1, needs.tile(budget) // max(1, needs.tile_row))
        return cls(classes, needs.block(budget) // needs.row, needs.piece(budget) // size)


class Panel(NamedTuple):
    """How NATIVE cuts its work. Where a number of rows is 0, logits lie in the workspace."""

    tile_classes: int  # classes whose GEMMs are done at a time
    first_rows: int  # rows whose logits fit into the fp32 d_weight, before it is written
    later_rows: int  # rows whose logits fit into a d_weight of 2 bytes, before it is rounded to

    @classmethod
    def of(cls, work: Workload, memory_budget_bytes: int | None) -> "Panel":
        """The panel within the budget."""
        needs = _Needs.of(work, Backend.NATIVE)
        return cls.within(work, needs, _budget(needs, memory_budget_bytes))

    @classmethod
    def within(cls, work: Workload, needs: _Needs, budget: int) -> "Panel":
        """As `of`, for whoever has the needs already."""
        tile = work.tile_classes
        if needs.tile_row:
            tile = min(tile, max(1, needs.tile(budget) // needs.tile_row))
        if not work.wanted.weight or work.adds_to_main_grad:
            return cls(tile, 0, 0)
        rest = budget - needs.tile(budget) - needs.fixed
        fitting = min(rest // needs.scratch, MAX_CHUNK_ROWS)
        first = min(work.dim // work.models, fitting)
        later = 0
        if work.has_narrow_d_weight and work.dim % 2 == 0:  # two numbers make a word
            later = min(work.dim // 2 // work.models, fitting)
        least = min(work.rows, _fitting_rows(work, needs, budget))  # else the workspace is better
        return cls(tile, first * (first >= least), later * (later >= least))

    def is_narrow(self, rows: int) -> bool:
        """Whether all rows fit into the d_weight of 2 bytes: then there is no fp32 one."""
        return 0 < rows <= self.later_rows


def _native_plan(work: Workload, needs: _Needs, budget: int) -> MemoryPlan:
    panel, workspace_rows = Panel.within(work, needs, budget), _fitting_rows(work, needs, budget)
    overlay, is_summed = panel.first_rows, work.dtype != torch.float32
    if panel.is_narrow(work.rows):
        overlay, is_summed = work.rows, False
    elif overlay == 0 and work.has_narrow_d_weight and work.rows <= workspace_rows:
        is_summed = False
    overlay = min(overlay, work.rows)
    if overlay == work.rows > 0 or (overlay > 0 and panel.later_rows > 0):
        workspace_rows = 0
    logits = workspace_rows * needs.logits
    hidden = work.rows * work.dim * work.wanted.hidden
    weight = work.vocab_size * work.dim * (work.wanted.weight and not work.adds_to_main_grad)
    bias = work.vocab_size * work.wanted.bias
    held = weight * is_summed + bias * (work.dtype != torch.float32) + hidden * work.holds_fp32
    return MemoryPlan(
        chunk_rows=max(overlay, workspace_rows),
        logits_bytes=logits,
        tile_bytes=needs.tile(budget),
        block_bytes=0,
        scratch_bytes=needs.fixed
        + max(workspace_rows * needs.scratch, overlay * needs.scratch - logits),
        accumulator_bytes=4 * held,
        row_bytes=work.rows * _statistics_bytes(work),
        gradient_bytes=(hidden + weight + bias) * work.dtype.itemsize,
        list_bytes=_list_bytes(work, max(overlay, workspace_rows)) + _sum_bytes(work),
    )


def _list_bytes(work: Workload, chunk: int) -> int:
    if not work.is_sparse or not work.has_gradient:
        return 0
    is_kept = work.operator is Operator.LOGPROB
    length = work.list_length(work.rows if is_kept else chunk)
    kept = work.rows * length * (8 + work.arithmetic.itemsize) * is_kept
    # In the backward pass: in the types of the kernels, and in the order of classes.
    copies = work.rows * length * 16 * is_kept
    slots = chunk * (length + work.top_k + LIST_ROOM)
    shared = work.wanted.hidden * 4 * work.dim * (2 * SHARED_BLOCK + 4)
    # A row at a time is searched for its largest classes: its copy, their order, what is chosen.
    lists = max(copies, min(LIST_BYTES, slots * LIST_SLOT_BYTES))
    return kept + lists + shared + 16 * work.vocab_size


def _sum_bytes(work: Workload) -> int:
    """A tile of d_weight to which entries are added: otherwise bf16 GEMMs round it at once."""
    adds = work.is_sparse and work.wanted.weight and not work.adds_to_main_grad
    return (
        4 * work.dim * work.tile_classes * (adds and native_matmul.multiplies(work.dtype, work.dim))
    )


def _budget(needs: _Needs, given: int | None) -> int:
    if given is None:
        return max(needs.default_bytes, needs.smallest(DEFAULT_MIN_ROWS))
    least = needs.smallest(needs.least_rows)
    if given < least:
        raise ValueError(
            f"memory_budget_bytes must be at least {least} for {needs.error}, got {given}"
        )
    return given


def _fitting_rows(work: Workload, needs: _Needs, budget: int) -> int:
    fitting = needs.rows(budget)
    if fitting >= needs.step:
        fitting = fitting // needs.step * needs.step
    most = MAX_CHUNK_ROWS
    if not needs.logits:
        most = MAX_SCORING_ROWS if needs.step > 1 else MAX_NATIVE_SCORING_ROWS
    return max(1, min(work.rows, most, fitting))


def _factor_bytes(dtype: torch.dtype, dim: int) -> int:
    """A number of NATIVE's hidden states: see `chunk.native_gemm.as_factor`."""
    return 2 if native_matmul.multiplies(dtype, dim) else 4


def _statistics_bytes(work: Workload) -> int:
    """Per-token statistics, inputs in another dtype or order, and results."""
    per_model = 8 * work.arithmetic.itemsize + 16
    return (12 + 2 * work.top_k) * work.arithmetic.itemsize + per_model * work.models
