"""The student's language model as a folder that vLLM loads: a plain Qwen3, dense or MoE.

The audio tower stays in the trainer, which runs it once per clip; vLLM gets a spoken prompt as
embeddings. For audio and text the thinker's three kinds of position are equal, so its rotary
embedding is the plain one and the language model is a Qwen3 to the last weight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from xopd.files import write_atomically
from xopd.models import SpeechLM
from xopd.sections import Dtype
from xopd.vllm.options import DTYPE_NAMES, VllmError

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps"),
    *("max_position_embeddings", "tie_word_embeddings", "initializer_range"),
)
_COPIED_OF_EXPERTS = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers"),
)


def language_model_config(student: SpeechLM, dtype: Dtype) -> PreTrainedConfig:
    """The configuration of the language model alone."""
    text = student.model.config.get_text_config()
    if text.model_type != "qwen3_omni_moe_text":
        raise VllmError(
            f"the student's language model is a {text.model_type!r}; vLLM rollouts know "
            "'qwen3_omni_moe_text' so far. Sample with generate."
        )
    # How the three kinds of position are laid out means nothing where they are equal.
    rope = {
        k: v for k, v in text.rope_parameters.items() if "mrope" not in k and k != "interleaved"
    }
    sparse = [
        layer
        for layer in range(text.num_hidden_layers)
        if layer not in text.mlp_only_layers and (layer + 1) % text.decoder_sparse_step == 0
    ]
    is_moe = bool(sparse) and text.num_experts > 0
    names = _COPIED + (_COPIED_OF_EXPERTS if is_moe else ())
    config = (Qwen3MoeConfig if is_moe else Qwen3Config)(
        **{name: getattr(text, name) for name in names},
        rope_parameters=rope,
        eos_token_id=student.eos_id,
        bos_token_id=student.tokenizer.bos_token_id,
        pad_token_id=student.tokenizer.pad_token_id,
        dtype=DTYPE_NAMES[dtype],
    )
    config.architectures = ["Qwen3MoeForCausalLM" if is_moe else "Qwen3ForCausalLM"]
    return config


def write_folder(student: SpeechLM, folder: Path, dtype: Dtype) -> None:
    """Configuration and tokenizer, no weights: an engine gets those before its first sample."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        language_model_config(student, dtype).save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise VllmError(f"folder {str(folder)!r} cannot be written: {error}") from error


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Safetensors shards and their index, each put in place at once; the index comes last."""
    written: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            _write_shard(shard, folder, written)
            shard, size = {}, 0
        # Parts of one parameter share memory, which the format does not allow.
        shard[name] = tensor.cpu().clone()
        size += tensor.nbytes
        total += tensor.nbytes
    if not shard:
        raise VllmError("the student has no language model weights to write.")
    _write_shard(shard, folder, written)
    index = {"metadata": {"total_size": total}, "weight_map": written}
    try:
        write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
    except OSError as error:
        raise VllmError(f"{str(folder / INDEX)!r} cannot be written: {error}.") from error


def _write_shard(shard: dict[str, Tensor], folder: Path, written: dict[str, str]) -> None:
    # Numbered, because how many there will be is not known yet.
    name = f"model-{len(set(written.values())) + 1:05d}.safetensors"
    temporary = folder / f".{name}.tmp"
    try:
        # A reader of the old file keeps it: the new one takes its name, not its place.
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # a server of another user reads it, too
        os.replace(temporary, folder / name)
    except (OSError, SafetensorError) as error:
        raise VllmError(
            f"weights cannot be written to {str(folder)!r}: {error}. Give a folder with room for "
            "the whole language model."
        ) from error
    written.update(dict.fromkeys(shard, name))
