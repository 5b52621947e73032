"""What a call allocates, before it runs: rows of a chunk and the bytes of every buffer.

The operators take their chunk from here, so the plan is what happens. Workspace does not grow
with the number of tokens; results, gradients and a few floats a token do, and are listed apart.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from xopd_kernels import native_matmul
from xopd_kernels.backend import Backend
from xopd_kernels.needs import MAX_CHUNK_ROWS, TERM_BYTES, Needs, budget_of, fitting_rows
from xopd_kernels.records import Wanted
from xopd_kernels.validation import check_budget
from xopd_kernels.workload import LIST_BYTES, TAIL_BYTES, TAIL_CLASSES, Operator, Workload

LIST_SLOT_BYTES = 40  # of a chunk's list: class, value, slope, what the rule and sorting need
LIST_ROOM = 64  # slots of a list beyond its length: entries that come before it is cut


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
    sparse gradient (tens of MiB) and the gradients come on top, see the fields.

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
    needs = Needs.of(work, backend, memory_budget_bytes)
    if work.operator is Operator.LOGPROB and work.has_gradient and memory_budget_bytes is not None:
        # As the forward pass, which does not know what gradients will be asked for.
        every = work._replace(wanted=Wanted(hidden=True, weight=True, bias=True))
        budget_of(Needs.of(every, backend, memory_budget_bytes), memory_budget_bytes)
    budget = budget_of(needs, memory_budget_bytes)
    if backend is Backend.NATIVE:
        return _native_plan(work, needs, budget)
    chunk = fitting_rows(work, needs, budget)
    has_d_weight = wanted.weight and not work.adds_to_main_grad
    weight_elements = work.vocab_size * (has_d_weight * work.dim + wanted.bias)
    hidden_elements = work.rows * work.dim * wanted.hidden
    is_rounded = work.arithmetic != work.dtype
    # TRITON's exact kernel has no `top_k_terms`; those of REFERENCE are in the scratch.
    terms = TERM_BYTES * chunk * work.top_k * (work.is_sparse and backend is Backend.TRITON)
    return MemoryPlan(
        chunk_rows=chunk,
        logits_bytes=chunk * needs.logits,
        tile_bytes=needs.tile(budget),
        block_bytes=needs.blocks(budget),
        scratch_bytes=needs.fixed + chunk * needs.scratch,
        accumulator_bytes=weight_elements * work.arithmetic.itemsize * is_rounded
        + 4 * hidden_elements * work.holds_fp32,
        row_bytes=work.rows * _statistics_bytes(work),
        gradient_bytes=(hidden_elements + weight_elements) * size,
        list_bytes=_list_bytes(work, chunk) + terms,
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
    if work.is_sparse and work.operator is Operator.DIVERGENCE:
        raise ValueError("is_sparse must be False for DIVERGENCE, which has no sparse gradient")
    if backend is not Backend.REFERENCE and work.dtype == torch.float64:
        raise ValueError(f"backend {backend.name} does not run {work.dtype}; REFERENCE does")


def chunk_rows(work: Workload, backend: Backend, memory_budget_bytes: int | None) -> int:
    """Rows of a chunk within the budget, at most `work.rows` (at least 1).

    Raises:
        ValueError: the budget does not hold the smallest chunk; the message says what would.
    """
    needs = Needs.of(work, backend, memory_budget_bytes)
    return fitting_rows(work, needs, budget_of(needs, memory_budget_bytes))


class Blocks(NamedTuple):
    """How REFERENCE cuts its work so that temporaries stay small."""

    tile_classes: int  # classes of the weight that are upcast at a time
    rows: int  # rows of a [rows, V] buffer that are copied at a time
    piece: int  # elements of a temporary where there are many

    @classmethod
    def of(cls, work: Workload, memory_budget_bytes: int | None) -> "Blocks":
        """The blocks within the budget."""
        needs = Needs.of(work, Backend.REFERENCE, memory_budget_bytes)
        size = work.arithmetic.itemsize
        budget = budget_of(needs, memory_budget_bytes)
        classes = max(1, needs.tile(budget) // max(1, needs.tile_row))
        return cls(classes, needs.block(budget) // needs.row, needs.piece(budget) // size)


class Panel(NamedTuple):
    """How NATIVE cuts its work. Where a number of rows is 0, logits lie in the workspace."""

    tile_classes: int  # classes whose GEMMs are done at a time
    first_rows: int  # rows whose logits fit into the fp32 d_weight, before it is written
    later_rows: int  # rows whose logits fit into a d_weight of 2 bytes, before it is rounded to
    kept_rows: int  # rows that a d_weight of 2 bytes holds in turn, see `chunk.native_kept`
    kept_step: int  # most of them at a time

    @classmethod
    def of(cls, work: Workload, memory_budget_bytes: int | None) -> "Panel":
        """The panel within the budget."""
        needs = Needs.of(work, Backend.NATIVE, memory_budget_bytes)
        return cls.within(work, needs, budget_of(needs, memory_budget_bytes))

    @classmethod
    def within(cls, work: Workload, needs: Needs, budget: int) -> "Panel":
        """As `of`, for whoever has the needs already."""
        tile = needs.tile_classes
        if needs.tile_row:
            tile = min(tile, max(1, needs.tile(budget) // needs.tile_row))
        if not work.wanted.weight or work.adds_to_main_grad:
            return cls(tile, 0, 0, 0, 0)
        rest = budget - needs.tile(budget) - needs.fixed
        fitting = min(rest // needs.scratch, MAX_CHUNK_ROWS)
        first = min(work.dim // work.models, fitting)
        later = kept = step = 0
        if work.has_narrow_d_weight and work.dim % 2 == 0:  # two numbers make a word
            later = min(work.dim // 2 // work.models, fitting)
        least = min(work.rows, fitting_rows(work, needs, budget))  # else the workspace is better
        if later and work.keeps_d_logit:
            step = min(later, (rest - work.rows * needs.kept) // needs.scratch)
            kept = _kept_rows(work, step) if step >= least else 0
        first, later = first * (first >= least), later * (later >= least)
        return cls(tile, first, later, kept, step * (kept > 0))

    def is_narrow(self, rows: int) -> bool:
        """Whether all rows fit into the d_weight of 2 bytes: then there is no fp32 one."""
        return 0 < rows <= self.later_rows

    def is_kept(self, rows: int) -> bool:
        """Whether they fit into it in turn: then there is no fp32 one either."""
        return not self.is_narrow(rows) and 0 < rows <= self.kept_rows


def next_kept_rows(words: int, models: int, kept: int, rows: int, most: int) -> int:
    """Rows of the next chunk, of `rows` that are left: their logits lie behind `kept` rows.

    Those take half a word of the `words` of a class each, logits one. Whole blocks of the GEMMs
    while rows remain, 0 if none fits.
    """
    room = min((words - kept // 2) // models, most)
    return rows if rows <= room else room // native_matmul.BLOCK * native_matmul.BLOCK


def _kept_rows(work: Workload, most: int) -> int:
    """The most rows that fit in turn, or `work.rows` if they do."""
    kept, words = 0, work.dim // 2
    while kept < work.rows:
        step = next_kept_rows(words, work.models, kept, work.rows - kept, most)
        if step == 0:
            return kept
        kept += step
    return kept


def _native_plan(work: Workload, needs: Needs, budget: int) -> MemoryPlan:
    panel, workspace_rows = Panel.within(work, needs, budget), fitting_rows(work, needs, budget)
    overlay, is_summed = panel.first_rows, work.dtype != torch.float32
    kept = 0
    if panel.is_narrow(work.rows):
        overlay, is_summed = work.rows, False
    elif panel.is_kept(work.rows):
        overlay, is_summed, kept = panel.kept_step, False, work.rows * needs.kept
        workspace_rows = 0
    elif overlay == 0 and work.has_narrow_d_weight and work.rows <= workspace_rows:
        is_summed = False
    overlay = min(overlay, work.rows)
    if overlay == work.rows > 0 or (overlay > 0 and panel.later_rows > 0):
        workspace_rows = 0
    listed = 0
    if work.is_sparse and work.operator is Operator.LOGPROB:
        # The forward pass makes them, of chunks without logits.
        forward = work._replace(wanted=Wanted(hidden=False, weight=False, bias=False))
        listed = fitting_rows(forward, Needs.of(forward, Backend.NATIVE, budget), budget)
    logits = workspace_rows * needs.logits
    hidden = work.rows * work.dim * work.wanted.hidden
    weight = work.vocab_size * work.dim * (work.wanted.weight and not work.adds_to_main_grad)
    bias = work.vocab_size * work.wanted.bias
    held = weight * is_summed + bias * (work.dtype != torch.float32) + hidden * work.holds_fp32
    scratch = max(workspace_rows * needs.scratch, overlay * needs.scratch - logits)
    if kept:  # fewer live rows may be one chunk
        scratch = max(scratch + kept, min(panel.later_rows, work.rows) * needs.scratch)
    return MemoryPlan(
        chunk_rows=max(overlay, workspace_rows),
        logits_bytes=logits,
        tile_bytes=needs.tile(budget),
        block_bytes=0,
        scratch_bytes=needs.fixed + scratch,
        accumulator_bytes=4 * held,
        row_bytes=work.rows * _statistics_bytes(work),
        gradient_bytes=(hidden + weight + bias) * work.dtype.itemsize,
        list_bytes=_list_bytes(work, max(overlay, workspace_rows, listed))
        + _sum_bytes(work, needs),
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
    tail = TAIL_BYTES + work.arithmetic.itemsize * work.dim * (TAIL_CLASSES + 4)
    tail += 8 * work.vocab_size
    tail *= work.wanted.hidden
    # A row at a time is searched for its largest classes: its copy, their order, what is chosen.
    lists = max(copies, min(LIST_BYTES, slots * LIST_SLOT_BYTES))
    return kept + lists + tail + 16 * work.vocab_size


def _sum_bytes(work: Workload, needs: Needs) -> int:
    """A tile of d_weight to which entries are added: otherwise bf16 GEMMs round it at once."""
    adds = work.is_sparse and work.wanted.weight and not work.adds_to_main_grad
    return (
        4
        * work.dim
        * needs.tile_classes
        * (adds and native_matmul.multiplies(work.dtype, work.dim))
    )


def _statistics_bytes(work: Workload) -> int:
    """Per-token statistics, inputs in another dtype or order, and results."""
    per_model = 8 * work.arithmetic.itemsize + 16
    return (12 + 2 * work.top_k) * work.arithmetic.itemsize + per_model * work.models
