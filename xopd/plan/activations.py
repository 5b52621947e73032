"""What a pass keeps for its backward pass, and what it needs for a moment, of decoder layers.

The layers are those of transformers' Qwen3 family, run eagerly with fused attention (SDPA): two
RMS norms, rotary attention with a norm of each head's query and key, and a gated MLP or experts
through grouped matrix products. Every count below names the tensors that autograd saves.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from xopd.plan.shape import ModelShape


class Precision(Enum):
    """How the forward and backward pass computes; weights rest in fp32 in all of them."""

    FP32 = "fp32"
    AUTOCAST = "bf16 by autocast: one rank"
    SHARDED = "bf16 weights and activations by FSDP2: several ranks"

    @property
    def size(self) -> int:
        """Bytes of what linear layers read and write."""
        return 4 if self is Precision.FP32 else 2

    @property
    def stream_size(self) -> int:
        """Bytes of an element of the residual stream; autocast leaves it in fp32."""
        return 2 if self is Precision.SHARDED else 4

    @property
    def expert_size(self) -> int:
        """Bytes of an element inside the experts; grouped products are not autocast."""
        return 2 if self is Precision.SHARDED else 4


class _Saved(NamedTuple):
    """Bytes saved for each element of the named width."""

    attention_norm: int  # D
    dense_norm: int  # D
    expert_norm: int  # D
    final_norm: int  # D
    query_key: int  # H h and K h: norm's input in fp32, its result, what attention reads


# A norm saves its input in fp32, the normalised value, and (as their input) what the linears behind
# it read. Autocast casts that anew for each linear: three for query, key and value, two in the MLP,
# one for the router; its own result stays fp32 and is not saved.
_SAVED = {
    Precision.FP32: _Saved(4 + 4 + 4, 4 + 4 + 4, 4 + 4 + 4, 4 + 4 + 4, 4 + 4 + 4),
    Precision.AUTOCAST: _Saved(4 + 4 + 3 * 2, 4 + 4 + 2 * 2, 4 + 4 + 2, 4 + 4 + 2, 4 + 2 + 2),
    Precision.SHARDED: _Saved(4 + 2 + 2, 4 + 2 + 2, 4 + 2 + 2, 4 + 2 + 2, 4 + 2 + 2),
}
_INDEX_BYTES = 8  # int64


def layer_bytes(shape: ModelShape, precision: Precision, tokens: int, *, has_experts: bool) -> int:
    """Saved activations of one layer, N tokens.

    N * (norm D + qk (H + K) h + s (H + K) h + 4 H  [attention's output, values, log-sum-exps]
         + 4 (2 + H + K)                            [each norm's 1/rms]
         + norm D + mlp)
    mlp, dense:   4 s I                             [gate, its activation, up, their product]
    mlp, experts: k (2 s D + 4 s I_e + s + 24) + 4 E + 8 k
                  [rows in and out of each expert, as dense, routing weights, three sort orders;
                   router probabilities, choices]
    """
    saved, size = _SAVED[precision], precision.size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (
        saved.attention_norm * shape.hidden
        + (saved.query_key + size) * (queries + keys)
        + 4 * shape.heads
        + 4 * (2 + shape.heads + shape.kv_heads)
    )
    if not has_experts:
        mlp = saved.dense_norm * shape.hidden + 4 * size * shape.intermediate
        return tokens * (attention + mlp)
    inner = precision.expert_size
    chosen = 2 * inner * shape.hidden + 4 * inner * shape.expert_intermediate
    chosen += inner + 3 * _INDEX_BYTES + _INDEX_BYTES
    mlp = saved.expert_norm * shape.hidden + shape.experts_per_token * chosen + 4 * shape.experts
    return tokens * (attention + mlp)


def largest_layer_bytes(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """Saved activations of the layer that has most."""
    kinds = [has for has, count in _kinds(shape) if count]
    return max(layer_bytes(shape, precision, tokens, has_experts=kind) for kind in kinds)


def kept_bytes(
    shape: ModelShape, precision: Precision, tokens: int, *, checkpoints_activations: bool
) -> int:
    """What a forward pass holds when it reaches lm_head.

    All layers, or with activation checkpointing their inputs: N L r D (r: `stream_size`); the
    final norm: N norm D; and the rotary tables that all layers share: N 2 s h.
    """
    if checkpoints_activations:
        layers = tokens * shape.layers * shape.hidden * precision.stream_size
    else:
        layers = sum(
            count * layer_bytes(shape, precision, tokens, has_experts=has)
            for has, count in _kinds(shape)
        )
    tables = 2 * precision.stream_size * shape.head_dim * tokens
    return layers + tables + last_norm_bytes(shape, precision, tokens)


def last_norm_bytes(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """N norm D of the norm before lm_head; gone when the backward pass reaches a layer."""
    return _SAVED[precision].final_norm * shape.hidden * tokens


def recomputed_bytes(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """What recomputing a layer adds: all that it saves but its input, which was kept.

    In bf16 of FSDP2 the norm saves an fp32 copy of the input, so that nothing is shared.
    """
    shared = 0 if precision is Precision.SHARDED else precision.stream_size
    return largest_layer_bytes(shape, precision, tokens) - tokens * shape.hidden * shared


def backward_bytes(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """Gradients inside a layer's backward pass, beside what was saved.

    Dense: N s (2 I + 2 D), where the product of gate and up splits. Experts: N (3 k s D + r D):
    the gradient of the gathered rows, of the routed ones, and their product with the output.
    """
    dense = precision.size * (2 * shape.intermediate + 2 * shape.hidden)
    routed = 3 * shape.experts_per_token * shape.hidden * precision.expert_size
    routed += precision.stream_size * shape.hidden
    return tokens * _widest(shape, dense, routed)


def forward_bytes(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """What a layer needs for a moment where nothing is saved: scoring.

    Dense: N s (3 I + 3 D). Experts: N (4 k s D + 3 r D): rows in, out, weighted, and those in the
    order of the tokens.
    """
    dense = precision.size * (3 * shape.intermediate + 3 * shape.hidden)
    routed = 4 * shape.experts_per_token * shape.hidden * precision.expert_size
    routed += 3 * precision.stream_size * shape.hidden
    return tokens * _widest(shape, dense, routed)


def _kinds(shape: ModelShape) -> tuple[tuple[bool, int], tuple[bool, int]]:
    """(has experts, how many such layers)."""
    return (True, shape.expert_layers), (False, shape.layers - shape.expert_layers)


def _widest(shape: ModelShape, dense: int, routed: int) -> int:
    has_dense = shape.layers > shape.expert_layers
    return max(dense * has_dense, routed * (shape.expert_layers > 0))
