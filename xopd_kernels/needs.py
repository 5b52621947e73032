"""The workspace of a call by backend: bytes for each row of a chunk, and the rows that fit."""

from dataclasses import dataclass

import torch

from xopd_kernels import native_matmul
from xopd_kernels.backend import Backend
from xopd_kernels.native_scores import TILE_SUM_BYTES, tiles_of_call
from xopd_kernels.workload import NATIVE_TILE_CLASSES, Operator, Workload

MIB = 2**20
DEFAULT_CPU_BYTES = 48 * MIB  # of workspace: near the caches of a server processor
DEFAULT_CUDA_BYTES = 640_000_000  # about 1000 rows of 152,000 fp32 logits
BLOCK_BYTES = MIB  # a copy of some rows of logits on the CPU: it stays in a core's cache
PIECE_BYTES = MIB // 4  # a temporary where element-wise work has many of them
DEFAULT_MIN_ROWS = 16  # what the default budget may exceed itself for at a huge vocabulary
MAX_CHUNK_ROWS = 4096  # more rows no longer help the GEMMs
MAX_NATIVE_SCORING_ROWS = 2048  # as many as GEMMs over a tile of classes gain from
MAX_SCORING_ROWS = 16_384  # without logits a chunk only bounds the copy of its hidden states
TRITON_ROW_STEP = 128  # rows of a tile
FILLED_ROWS = 4  # fewer are filled up to them where fp32 d_hidden is summed on the CPU
FILLED_CLASSES = 512  # of them at a time: small beside the rest of a chunk
_LEAST_PIECE_BYTES = 64
TERM_BYTES = 112  # of an id in `top_k_terms`: fourteen fp64 numbers
_PARTIAL_CLASSES = 256  # at least this many classes share one set of partial statistics


@dataclass(frozen=True)
class Needs:
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
    tile_classes: int = 0  # NATIVE: most classes of a tile
    kept: int = 0  # NATIVE: a row of all that wait for their d_weight, see `chunk.native_kept`

    @classmethod
    def of(cls, work: Workload, backend: Backend, given: int | None) -> "Needs":
        """The needs of a call with a budget of `given` bytes; None: the default one."""
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
            budget = DEFAULT_CPU_BYTES if given is None else given
            tile = work.tile_classes(budget)
            needs = cls._of_native(work, error, tile)
            # Larger tiles are for what is left over: a row fits before they do.
            while budget < needs.smallest(needs.least_rows) and tile > NATIVE_TILE_CLASSES:
                tile = (tile - 1) // NATIVE_TILE_CLASSES * NATIVE_TILE_CLASSES
                needs = cls._of_native(work, error, tile)
            return needs
        # The slope of the softcap is kept beside the logits until they have become a gradient.
        has_slope = work.has_softcap and work.has_gradient
        row = size * work.vocab_size
        logits = row * (1 + is_divergence + has_slope + work.needs_entropy)
        # Hidden states and their gradient in the dtype of the arithmetic, the gradient once more as
        # it is rounded; a chunk's statistics.
        scratch = (2 * work.dim + work.teacher_dim + 32) * size
        scratch += (4 * size + TERM_BYTES) * work.top_k
        scratch += work.dim * work.dtype.itemsize * (work.dtype != work.arithmetic)
        pieces = 12 if is_divergence else 0  # of the Jensen-Shannon divergence: eleven and masks
        dtypes = {work.dtype, work.teacher_dtype or work.dtype}
        widest = max(work.dim, work.teacher_dim) * size * (dtypes != {work.arithmetic})
        limit = widest * work.vocab_size
        filled = FILLED_ROWS * (min(FILLED_CLASSES, work.vocab_size) + work.dim)
        return cls(
            *(logits, scratch, row, pieces, widest, limit, 1, 1, DEFAULT_CPU_BYTES, error),
            fixed=size * filled * work.wanted.hidden,
        )

    @classmethod
    def _of_native(cls, work: Workload, error: str, tile: int) -> "Needs":
        models, is_stored = work.models, work.has_gradient or work.operator is Operator.DIVERGENCE
        dim, size = work.dim, work.dtype.itemsize
        logits = 4 * work.vocab_size * models if is_stored else 0
        # A tile of logits or of their gradient; hidden states and their gradient; of the policy
        # loss also the hidden states with a gradient.
        copies = 1 + (work.operator is Operator.POLICY_LOSS)
        scratch = 4 * (dim + 32) + 72 * work.top_k
        packs = native_matmul.multiplies(work.dtype, dim)
        # Of logits, or of their gradient in fp32.
        of_tile = 4 * tile * (work.stores_logits and not (packs and work.has_gradient))
        scratch += dim * size * (work.dtype != torch.float32)  # d_hidden rounded
        scratch += work.teacher_dim * _factor_bytes(work.teacher_or_own_dtype, work.teacher_dim)
        scratch += copies * dim * _factor_bytes(work.dtype, dim)
        # The bias, if there is one: upcast for a tile of both models, or for all tiles of a call.
        whole, fixed = native_matmul.whole, 8 * tile
        packs_teacher = native_matmul.multiplies(work.teacher_or_own_dtype, work.teacher_dim)
        if packs:
            fixed += 4 * tiles_of_call(work.vocab_size) * NATIVE_TILE_CLASSES
        for width in (dim * packs, work.teacher_dim * packs_teacher):
            # Packed, and the sums of tiles: in whole blocks of rows.
            tiles = tiles_of_call(work.vocab_size) * (width > 0)
            of_row = 2 * width + tiles * TILE_SUM_BYTES
            scratch += of_row
            fixed += of_row * (native_matmul.BLOCK - 1)
        # Tiles of the weight, upcast; one of the teacher's or of d_weight unrounded.
        row = 4 * dim * (work.dtype != torch.float32 and not packs)
        if packs and work.has_gradient:
            # d_logit twice; sums of 32 of its rows, should d_bias be wanted; hidden states.
            of_tile += 4 * (tile + 1) + tile // 8 + 1 + 2 * whole(dim)
            fixed += 2 * whole(dim) + 2 * tile + 8 * tile
        elif work.wanted.hidden:
            fixed += 4 * FILLED_ROWS * (min(FILLED_CLASSES, tile) + dim)
        row += 4 * work.shared_tile_dim
        # `top_k_terms` are gone when the first tile of d_logit comes; 32 of their bytes are above.
        # The workspace of logits that are not kept is there beside them.
        terms = (TERM_BYTES - 32) * work.top_k
        scratch += max(of_tile, terms) if work.has_gradient else of_tile + terms
        limit = (tile + tile % 2) * row
        step = 2 if row else 1
        # Hidden states, those of all chunks in one or a tile of d_logit, packed; their gradient.
        kept = 2 * dim + 2 * max(dim, tile) + 2 * whole(dim) + 4 * dim
        kept += 2 * (tile + 1) * (work.vocab_size % 2)
        return cls(
            *(logits, scratch, 0, 0, row, limit, 1, 1, DEFAULT_CPU_BYTES, error),
            tile_step=step,
            fixed=fixed,
            tile_classes=tile,
            kept=kept,
        )

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


def budget_of(needs: Needs, given: int | None) -> int:
    if given is None:
        return max(needs.default_bytes, needs.smallest(DEFAULT_MIN_ROWS))
    least = needs.smallest(needs.least_rows)
    if given < least:
        raise ValueError(
            f"memory_budget_bytes must be at least {least} for {needs.error}, got {given}"
        )
    return given


def fitting_rows(work: Workload, needs: Needs, budget: int) -> int:
    fitting = needs.rows(budget)
    if fitting >= needs.step:
        fitting = fitting // needs.step * needs.step
    most = MAX_CHUNK_ROWS
    if not needs.logits:
        most = MAX_SCORING_ROWS if needs.step > 1 else MAX_NATIVE_SCORING_ROWS
    return max(1, min(work.rows, most, fitting))


def _factor_bytes(dtype: torch.dtype, dim: int) -> int:
    """A number of NATIVE's hidden states: see `chunk.native_gemm.as_factors`."""
    return 2 if native_matmul.multiplies(dtype, dim) else 4
