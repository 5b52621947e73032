"""The sizes of a model that memory and time depend on, counted from its configuration alone.

The model is built on torch's meta device: no weight is read and nothing of size is allocated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xopd.plan.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Counts are of parameters, whatever their dtype. The letters are those of the formulas."""

    name: str
    hidden: int  # D
    vocabulary: int  # V, rows of lm_head
    layers: int  # L, of the decoder
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # h
    intermediate: int  # I, of a dense layer
    experts: int  # E, of a layer that has them; 0: a dense model
    experts_per_token: int  # k
    expert_intermediate: int  # I_e
    expert_layers: int  # layers that have experts
    layer_parameters: int  # P_l, of the largest decoder layer
    expert_parameters: int  # of all experts of all layers
    trained_parameters: int  # P: embedding, decoder, lm_head
    embedding_parameters: int
    head_parameters: int  # of lm_head; the embedding's where they are tied
    is_tied: bool  # lm_head is the embedding
    frozen_parameters: int  # F: audio and vision towers
    frozen_root_parameters: int  # F_r: of them, what is not a layer; FSDP2 leaves that to the root
    largest_inner_tensor: int  # of the trained tensors but embedding and lm_head

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest trained tensor."""
        return max(self.largest_inner_tensor, self.embedding_parameters, self.head_parameters)

    @property
    def parameters(self) -> int:
        """P + F."""
        return self.trained_parameters + self.frozen_parameters

    @property
    def decoder_parameters(self) -> int:
        """Trained parameters without the embedding and lm_head."""
        head = 0 if self.is_tied else self.head_parameters
        return self.trained_parameters - self.embedding_parameters - head

    @property
    def active_decoder_parameters(self) -> int:
        """Decoder parameters that one token meets: k of the E experts of a layer."""
        if self.experts == 0:
            return self.decoder_parameters
        idle = self.expert_parameters * (self.experts - self.experts_per_token) // self.experts
        return self.decoder_parameters - idle

    @property
    def active_parameters(self) -> int:
        """Trained parameters that one token meets, embedding and lm_head included."""
        return self.trained_parameters - self.decoder_parameters + self.active_decoder_parameters

    @property
    def cache_elements_per_token(self) -> int:
        """Keys and values of one token: 2 L K h."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def text_only(self) -> ModelShape:
        """The language model alone: what a text teacher of the same size is."""
        return replace(
            self,
            name=f"{self.name} (language model)",
            frozen_parameters=0,
            frozen_root_parameters=0,
        )

    def with_vocabulary(self, vocabulary: int) -> ModelShape:
        """The same model with another number of rows in embedding and lm_head."""
        if vocabulary < 1:
            raise PlanError(f"vocabulary must be at least 1, got {vocabulary}")
        size = vocabulary * self.hidden
        grown = (size - self.embedding_parameters) * (1 if self.is_tied else 2)
        return replace(
            self,
            vocabulary=vocabulary,
            trained_parameters=self.trained_parameters + grown,
            embedding_parameters=size,
            head_parameters=size,
        )

    def touched_parameters(self, tokens: int) -> float:
        """Trained parameters that a pass over so many tokens reads, each expert drawn alike.

        An expert is left out by all of them with probability (1 - k/E)^tokens.
        """
        if self.experts == 0:
            return float(self.trained_parameters)
        idle = (1.0 - self.experts_per_token / self.experts) ** tokens
        return self.trained_parameters - self.expert_parameters * idle


def presets() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def model_shape(source: str) -> ModelShape:
    """Sizes of a preset, a model folder, a config.json, or a hub id (its configuration alone).

    Of a checkpoint that also talks, the thinker is taken. PlanError: no readable configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    preset = PRESETS / f"{source}.json"
    try:
        config = AutoConfig.from_pretrained(str(preset) if preset.is_file() else source)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"model {source!r}: no readable config.json ({str(error).splitlines()[0]}); give a "
            f"folder, a hub id, or a preset: {', '.join(presets())}"
        ) from error
    config = getattr(config, "thinker_config", config)
    known = AutoModelForMultimodalLM._model_mapping
    auto = AutoModelForMultimodalLM if type(config) in known else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return shape_of(model, source)


def shape_of(model: PreTrainedModel, name: str) -> ModelShape:
    """Sizes of a model that is built already, on any device."""
    from xopd.models.speech_lm import AUDIO_LEAVES, VISION_LEAVES

    text = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = [(path.split("."), p.numel()) for path, p in model.named_parameters()]
    towers = {*AUDIO_LEAVES, *VISION_LEAVES}
    frozen = [(path, size) for path, size in paths if towers & set(path)]
    trained = [(path, size) for path, size in paths if not towers & set(path)]
    layers: Counter[int] = Counter()
    experts: Counter[int] = Counter()
    for path, size in trained:
        number = _layer_number(path)
        if number is not None:
            layers[number] += size
            experts[number] += size * ("experts" in path)
    expert_layers = sum(size > 0 for size in experts.values())
    has_experts = expert_layers > 0
    return ModelShape(
        name=name,
        hidden=text.hidden_size,
        vocabulary=head.weight.shape[0],
        layers=len(layers),
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size,
        experts=text.num_experts if has_experts else 0,
        experts_per_token=text.num_experts_per_tok if has_experts else 0,
        expert_intermediate=text.moe_intermediate_size if has_experts else 0,
        expert_layers=expert_layers,
        layer_parameters=max(layers.values()),
        expert_parameters=sum(experts.values()),
        trained_parameters=sum(size for _, size in trained),
        embedding_parameters=embedding.weight.numel(),
        head_parameters=head.weight.numel(),
        is_tied=head.weight is embedding.weight,
        frozen_parameters=sum(size for _, size in frozen),
        frozen_root_parameters=sum(size for p, size in frozen if _layer_number(p) is None),
        largest_inner_tensor=max(size for p, size in trained if _layer_number(p) is not None),
    )


def _layer_number(path: Sequence[str]) -> int | None:
    """The 7 of model.layers.7.mlp; None outside a list of that name."""
    for name, number in pairwise(path):
        if name == "layers" and number.isdigit():
            return int(number)
    return None
