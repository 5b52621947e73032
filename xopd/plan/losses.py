"""The three ways from hidden states to a loss: what each allocates, and how many GEMMs it needs.

U = 2 N V D FLOPs is one product with lm_head. Ours is planned by `xopd_kernels.memory_plan`, the
arithmetic by which the kernels themselves cut their chunks; the other two are written out here.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from xopd.plan.activations import Precision
from xopd_kernels import Backend, Operator, Wanted, Workload, memory_plan

# Liger-Kernel 0.8.5, chunked_loss/fused_linear_ppo.py: its tiles, rows x classes.
LIGER_TILE_ROWS, LIGER_TILE_CLASSES = 2048, 4096


class Head(Enum):
    """A column of the plan."""

    NAIVE = "naive logits"  # torch: all logits, log_softmax, autograd
    LIGER = "Liger's chunks"  # LigerFusedLinearGRPOLoss: one sequence at a time, tiles of logits
    OURS = "ours"  # linear_policy_loss and linear_logprob


class HeadWork(NamedTuple):
    """One call at lm_head."""

    tokens: int  # N, positions of the pass
    width_tokens: int  # T, of the longest row
    vocabulary: int  # V
    hidden: int  # D
    precision: Precision
    is_sparse: bool = False  # OURS: the loss with sparse gradients

    @property
    def size(self) -> int:
        """s: bytes of an element of hidden states and weight."""
        return self.precision.size

    @property
    def gradient_bytes(self) -> int:
        """d_hidden and d_weight: s (N D + V D); every column has them."""
        return self.size * self.hidden * (self.tokens + self.vocabulary)


class HeadGemms(NamedTuple):
    """Products with lm_head, in U of the tokens named."""

    bf16: int
    fp32: int
    counts_prompts: bool  # whether positions of the prompt are multiplied too


LOSS_GEMMS = {
    Head.NAIVE: HeadGemms(bf16=3, fp32=0, counts_prompts=True),
    # The backward pass computes the logits again; its two gradient products are fp32 (line 127).
    Head.LIGER: HeadGemms(bf16=2, fp32=2, counts_prompts=False),
    Head.OURS: HeadGemms(bf16=3, fp32=0, counts_prompts=False),
}
# OURS with sparse gradients where every token has a list; a dense one costs three.
SPARSE_LOSS_GEMMS = HeadGemms(bf16=1, fp32=0, counts_prompts=False)
SCORING_GEMMS = {
    Head.NAIVE: HeadGemms(bf16=1, fp32=0, counts_prompts=True),
    Head.LIGER: HeadGemms(bf16=1, fp32=0, counts_prompts=False),
    Head.OURS: HeadGemms(bf16=1, fp32=0, counts_prompts=False),
}


def loss_bytes(head: Head, work: HeadWork, backend: Backend) -> int:
    """Peak of the loss forward and backward beside its inputs, d_hidden and d_weight included.

    NAIVE: N V (4 + 4 + 4 + 4) + gradients: fp32 logits, log-softmax, and in the backward pass the
    gradients of both.
    LIGER: 20 r c + 4 (r + c) D [a tile of r x c and its products] + 6 V D or (fp32) 4 V D
    [d_weight of a sequence in fp32, and rounded, beside the sum] + N D s [d_hidden twice] +
    gradients.
    OURS: peak_bytes of `memory_plan`, with the lists of sparse gradients where there are any.
    """
    if head is Head.NAIVE:
        return work.tokens * work.vocabulary * 4 * 4 + work.gradient_bytes
    if head is Head.LIGER:
        rows, classes = _liger_tile(work)
        tile = 20 * rows * classes + 4 * (rows + classes) * work.hidden
        sequence = work.vocabulary * work.hidden * (4 + (work.size if work.size < 4 else 0))
        return tile + sequence + work.tokens * work.hidden * work.size + work.gradient_bytes
    return memory_plan(_workload(work, Operator.POLICY_LOSS), backend).peak_bytes


def scoring_bytes(head: Head, work: HeadWork, backend: Backend) -> int:
    """Peak of the log-probs of given tokens without gradients, beside the inputs.

    NAIVE: N V (4 + 4): fp32 logits and log-softmax. LIGER: 16 r c. OURS: peak_bytes of
    `memory_plan`.
    """
    if head is Head.NAIVE:
        return work.tokens * work.vocabulary * 2 * 4
    if head is Head.LIGER:
        rows, classes = _liger_tile(work)
        return 16 * rows * classes
    return memory_plan(_workload(work, Operator.LOGPROB), backend).peak_bytes


def _liger_tile(work: HeadWork) -> tuple[int, int]:
    """(r, c): a loss sees one sequence at a time."""
    rows = min(LIGER_TILE_ROWS, work.width_tokens, max(1, work.tokens))
    return rows, min(LIGER_TILE_CLASSES, work.vocabulary)


def _workload(work: HeadWork, operator: Operator) -> Workload:
    dtype = torch.float32 if work.precision is Precision.FP32 else torch.bfloat16
    is_loss = operator is Operator.POLICY_LOSS
    wanted = Wanted(hidden=is_loss, weight=is_loss, bias=False)
    sizes = (work.tokens, work.vocabulary, work.hidden)
    is_sparse = is_loss and work.is_sparse
    return Workload(operator, *sizes, dtype, wanted, is_sparse=is_sparse)
