"""The planned peak of a training step in one process on the CPU: what a measurement can check.

The same activations and the same `memory_plan` as in the table for a cluster, without sharding and
in fp32, where the profiler sees every allocation.
"""

from __future__ import annotations

from typing import NamedTuple

from xopd.plan.activations import (
    Precision,
    backward_bytes,
    kept_bytes,
    last_norm_bytes,
    recomputed_bytes,
)
from xopd.plan.losses import Head, HeadWork, loss_bytes
from xopd.plan.shape import ModelShape
from xopd_kernels import Backend

FP32 = 4


class UpdateBatch(NamedTuple):
    """The rows of an update; they are padded to the longest of their pass."""

    rows: int  # of a pass
    width_tokens: int  # T
    passes: int  # micro-batches of the update
    checkpoints_activations: bool = False
    has_sparse_gradient: bool = False


class CpuStep(NamedTuple):
    """Bytes of an update in fp32: what stays, and beside it each moment that may be the peak."""

    weights_bytes: int  # 4 (P + F): the student's
    moments_bytes: int  # 8 P; from the second update on they exist before it begins
    at_head_bytes: int  # the loss of the last pass
    in_layer_bytes: int  # the backward pass of the last layer
    at_end_bytes: int  # the embedding's gradient, after all others
    optimizer_bytes: int  # AdamW, one tensor after another

    @property
    def transient_bytes(self) -> int:
        """The most that exists beside weights and moments; what a profiler of the update sees."""
        return max(self.at_head_bytes, self.in_layer_bytes, self.at_end_bytes, self.optimizer_bytes)

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.moments_bytes + self.transient_bytes


def planned_cpu_step(shape: ModelShape, batch: UpdateBatch, backend: Backend) -> CpuStep:
    """The plan of one update of the student: every pass, then AdamW.

    Gradients G are 4 P once a first pass is done, and 0 during the only one.

    at lm_head: G + activations kept + loss (`memory_plan`, with d_hidden and d_weight)
    in a layer: G (of lm_head alone in the only pass) + activations kept, without the last norm's
                + one layer recomputed + gradients inside a layer + the largest new gradient
    at the end: 4 P + 2 N D + (several passes) a new gradient of the embedding
    AdamW:      4 P + 2 * 4 bytes of the largest tensor (the root of the second moment, and the
                denominator)
    """
    tokens, precision = batch.rows * batch.width_tokens, Precision.FP32
    several = batch.passes > 1
    earlier = FP32 * shape.trained_parameters * several
    sizes = (tokens, batch.width_tokens, shape.vocabulary, shape.hidden)
    work = HeadWork(*sizes, precision, batch.has_sparse_gradient)
    again = batch.checkpoints_activations
    kept = kept_bytes(shape, precision, tokens, checkpoints_activations=again)
    head = 0 if several else FP32 * shape.head_parameters
    layer = kept - last_norm_bytes(shape, precision, tokens)
    layer += recomputed_bytes(shape, precision, tokens) * again
    layer += backward_bytes(shape, precision, tokens) + FP32 * shape.largest_inner_tensor
    embedding = FP32 * shape.embedding_parameters * several
    return CpuStep(
        weights_bytes=FP32 * shape.parameters,
        moments_bytes=2 * FP32 * shape.trained_parameters,
        at_head_bytes=earlier + kept + loss_bytes(Head.OURS, work, backend),
        in_layer_bytes=earlier + head + layer,
        at_end_bytes=FP32 * (shape.trained_parameters + 2 * tokens * shape.hidden) + embedding,
        optimizer_bytes=FP32 * (shape.trained_parameters + 2 * shape.largest_tensor),
    )
