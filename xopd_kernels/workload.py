"""What decides the memory of a call."""

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from xopd_kernels.native_matmul import multiplies
from xopd_kernels.records import Wanted

# Of the GEMMs, or a multiple: their logits stay in the caches. No power of two: rows 4 KiB apart
# would share one set of the L1 cache.
NATIVE_TILE_CLASSES = 1008
NATIVE_TILE_BYTES = 2**22  # of d(loss)/d(logit) of a tile, fp32, or bf16 of either factor
NATIVE_TILE_SHARE = 12  # of the budget
NATIVE_TILES = 32  # most that become one, and most of a call that makes statistics

LIST_BYTES = 40 * 2**20  # of all lists of a sparse gradient that exist at one time
TAIL_CLASSES = 512  # that stand for those a sparse row leaves out
TAIL_BYTES = 4 * 2**20  # of what is made of them at a time
MIN_LIST, LIST_SHARE = 64, 32  # a list names at most max(64, V / 32) classes


class Operator(enum.Enum):
    """The operators whose memory can be planned."""

    LOGPROB = "linear_logprob"
    POLICY_LOSS = "linear_policy_loss"
    DIVERGENCE = "linear_divergence"
    TOPK_DIVERGENCE = "linear_topk_divergence"


class Workload(NamedTuple):
    """What decides the memory of a call."""

    operator: Operator
    rows: int  # N, tokens
    vocab_size: int  # V; with vocab_group: of the largest shard
    dim: int  # D
    dtype: torch.dtype
    wanted: Wanted = Wanted(hidden=True, weight=True, bias=False)
    teacher_dim: int = 0  # DIVERGENCE: D of the teacher
    teacher_dtype: torch.dtype | None = None  # DIVERGENCE; None: that of the student
    top_k: int = 0  # TOPK_DIVERGENCE: K
    has_softcap: bool = False
    needs_entropy: bool = False
    adds_to_main_grad: bool = False  # LOGPROB with an fp32 main_grad; others: main_grad_ahead
    is_sparse: bool = False  # gradient="sparse" or "unbiased"

    @classmethod
    def of(cls, operator: Operator, hidden: Tensor, weight: Tensor, wanted: Wanted) -> "Workload":
        """The workload of hidden [N, D] and weight [V, D]."""
        rows, dim = hidden.shape
        return cls(operator, rows, weight.shape[0], dim, hidden.dtype, wanted)

    @property
    def list_entry_bytes(self) -> int:
        """A class number, its probability, and what the rule needs to decide about it."""
        return 8 + 4 * self.arithmetic.itemsize

    def list_length(self, rows: int) -> int:
        """K of the lists of `rows` rows: at most max(64, V/32) and V, and LIST_BYTES in all.

        `rows` are those of a chunk where the gradient is computed ahead, all N of LOGPROB, whose
        lists wait for the backward pass. A teacher's ids (TOPK_DIVERGENCE) are not among the K.
        """
        fitting = LIST_BYTES // (max(1, rows) * self.list_entry_bytes)
        most = max(MIN_LIST, self.vocab_size // LIST_SHARE)
        # Never the target alone, where there are others.
        return min(self.vocab_size, max(2, min(most, fitting)))

    @property
    def has_gradient(self) -> bool:
        """Whether logits must be kept until they are turned into gradients."""
        return any(self.wanted)

    @property
    def models(self) -> int:
        """Models whose logits the operator needs."""
        return 1 + (self.operator is Operator.DIVERGENCE)

    def tile_classes(self, budget: int) -> int:
        """Most classes of a tile of NATIVE: more where few rows and no upcast make it small.

        d(loss)/d(logit) of a tile of several takes NATIVE_TILE_SHARE of the `budget` at most.
        """
        share = min(budget // NATIVE_TILE_SHARE, NATIVE_TILE_BYTES)
        few = share // self.dtype.itemsize // max(1, self.rows) // NATIVE_TILE_CLASSES
        is_fp32 = self.dtype == self.teacher_or_own_dtype == torch.float32
        # A sparse gradient has a whole tile of d_weight in fp32.
        is_packed = multiplies(self.dtype, self.dim) and not self.is_sparse
        upcasts_teacher = _is_upcast(self.teacher_or_own_dtype, self.teacher_dim)
        if is_packed and not (self.teacher_dim and upcasts_teacher):
            few = min(few, NATIVE_TILES)
        elif not is_fp32:
            few = 1
        return min(NATIVE_TILE_CLASSES * max(1, few), self.vocab_size)

    @property
    def shared_tile_dim(self) -> int:
        """Width of the fp32 memory of NATIVE for a tile of d_weight or of the teacher's weight."""
        rounded = self.wanted.weight and _is_upcast(self.dtype, self.dim)
        upcast = _is_upcast(self.teacher_or_own_dtype, self.teacher_dim)
        return max(self.dim * rounded, self.teacher_dim * upcast)

    @property
    def teacher_or_own_dtype(self) -> torch.dtype:
        """The dtype of the teacher, if there is one."""
        return self.teacher_dtype or self.dtype

    @property
    def holds_fp32(self) -> bool:
        """Whether gradients wait for their upstream gradient in fp32: see Call.held_dtype."""
        is_ahead = self.operator is not Operator.LOGPROB and not self.adds_to_main_grad
        return self.dtype == torch.float16 and is_ahead

    @property
    def has_narrow_d_weight(self) -> bool:
        """Whether d_weight is handed out in 2 bytes."""
        return self.dtype.itemsize == 2 and not self.holds_fp32

    @property
    def stores_logits(self) -> bool:
        """Whether NATIVE writes a tile of logits: not where its statistics are all there is."""
        is_needed = self.has_gradient or self.operator is Operator.DIVERGENCE or self.is_sparse
        return is_needed or not multiplies(self.dtype, self.dim)

    @property
    def keeps_d_logit(self) -> bool:
        """Whether NATIVE may round d(loss)/d(logit) to bf16 before all rows of it are there."""
        return multiplies(self.dtype, self.dim) and not self.is_sparse

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _is_upcast(dtype: torch.dtype, dim: int) -> bool:
    """Whether NATIVE multiplies a head of `dtype` and `dim` in fp32, which it is not."""
    return dtype != torch.float32 and not multiplies(dtype, dim)
