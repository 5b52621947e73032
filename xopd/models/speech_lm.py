"""A speech LLM as the trainer sees it: audio tower, language model, lm_head, tokenizer.

Families differ in where these parts live, and one family moves them between transformers
releases (``thinker.audio_tower`` in 5.17, ``thinker.model.audio_tower`` in 5.23). So parts are
found by the leaf name of the module, never by a fixed path. The audio tower (with its adapter) is
frozen and runs once per clip; from then on a prompt is a row of input embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    WhisperFeatureExtractor,
)

from xopd.errors import UserError
from xopd.sharding import Placement, compute_device, reshard

AUDIO_LEAVES = ("audio_tower", "multi_modal_projector")
VISION_LEAVES = ("visual", "vision_tower")
EXPERT_LEAVES = ("experts",)
WHOLE = Placement()  # on the CPU


class ModelError(UserError):
    """A model folder that cannot be used, and what to do about it."""


def leaf_modules(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """All submodules whose last name component is in ``names``."""
    return [module for name, module in model.named_modules() if name.split(".")[-1] in names]


@dataclass(frozen=True, slots=True)
class TextLM:
    """The text-only teacher."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_vocab_parallel: bool = False  # scored with each rank's own classes of lm_head

    @property
    def eos_id(self) -> int:
        return _eos_id(self.model.config, self.tokenizer)

    @property
    def classes(self) -> int:
        """Rows of its lm_head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        return compute_device(self.model)

    def embed(self, token_ids: Tensor) -> Tensor:  # [B, T] int64 -> [B, T, D]
        """Input embeddings of token ids."""
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        return embedded


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the ids of a text-only teacher mean, without its weights."""

    tokenizer: PreTrainedTokenizerBase
    eos_id: int
    classes: int  # rows of its lm_head


@dataclass(frozen=True, slots=True)
class SpeechLM:
    """The student: a transformers speech LLM with its tokenizer and feature extractor."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    feature_extractor: SequenceFeatureExtractor
    audio_id: int  # the placeholder that one audio embedding replaces
    reserved_ids: tuple[int, ...]  # ids that a rollout must never contain (media placeholders)
    is_vocab_parallel: bool = False  # loss and scores with each rank's own classes of lm_head

    @property
    def eos_id(self) -> int:
        return _eos_id(self.model.config, self.tokenizer)

    @property
    def device(self) -> torch.device:
        return compute_device(self.model)

    @property
    def lm_head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ModelError(
                f"{type(self.model).__name__} has no nn.Linear lm_head; "
                "the fused loss runs inside lm_head.forward and needs one."
            )
        return head

    @property
    def is_mixture_of_experts(self) -> bool:
        """Whether its language model routes tokens to experts."""
        return bool(leaf_modules(self.model, EXPERT_LEAVES))

    def freeze_all_but_language_model(self) -> None:
        """Freeze the audio tower, its adapter and any vision tower; train the rest.

        Raises ModelError when no audio tower is found, so that a renamed module cannot
        silently be trained.
        """
        self.model.requires_grad_(True)
        for module in (*self.towers(), *leaf_modules(self.model, VISION_LEAVES)):
            module.requires_grad_(False)
            module.eval()

    def towers(self) -> list[nn.Module]:
        """The audio tower and its adapter; ModelError if there is none."""
        found = leaf_modules(self.model, AUDIO_LEAVES)
        if not found:
            raise ModelError(
                f"no audio tower in {type(self.model).__name__}: looked for modules named "
                f"{', '.join(AUDIO_LEAVES)}. Add the family's name to AUDIO_LEAVES."
            )
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training changes, by name; shards where the model is sharded."""
        reshard(self.model)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def encode_audio(self, features: Sequence[np.ndarray]) -> list[Tensor]:
        """Audio tower and adapter on log-mel clips [n_mels, frames] -> [A_i, D] each.

        Differentiable; the trainer calls it once per clip under ``torch.no_grad``.
        """
        longest = max(clip.shape[1] for clip in features)
        padded = torch.zeros(len(features), features[0].shape[0], longest)
        mask = torch.zeros(len(features), longest, dtype=torch.long)
        for row, clip in enumerate(features):
            padded[row, :, : clip.shape[1]] = torch.from_numpy(clip)
            mask[row, : clip.shape[1]] = 1
        (tower, *_) = self.towers()
        dtype = next(tower.parameters()).dtype
        output = self.model.get_audio_features(padded.to(self.device, dtype), mask.to(self.device))
        embeddings = getattr(output, "last_hidden_state", output)
        lengths = [audio_token_count(clip.shape[1]) for clip in features]
        if embeddings.shape[0] != sum(lengths):
            raise ModelError(
                f"the audio tower returned {embeddings.shape[0]} embeddings for clips that "
                f"should give {sum(lengths)}; its down-sampling is not that of Qwen3-Omni."
            )
        return list(embeddings.split(lengths))

    def embed(self, token_ids: Tensor, audio: Sequence[Tensor]) -> Tensor:
        """Input embeddings [B, T, D] of token ids [B, T] with audio at the placeholders.

        ``audio`` holds one [A, D] tensor per placeholder run, in row order.
        """
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        if not audio:
            return embedded
        flat = torch.cat(list(audio)).to(embedded.device, embedded.dtype)
        is_audio = token_ids == self.audio_id
        if int(is_audio.sum()) != flat.shape[0]:
            raise ModelError(
                f"{int(is_audio.sum())} audio placeholders for {flat.shape[0]} audio embeddings; "
                "a prompt was rendered for another clip."
            )
        return embedded.masked_scatter(is_audio[..., None].expand_as(embedded), flat)


def audio_token_count(frames: int) -> int:
    """Audio embeddings that Qwen3-Omni's tower makes of ``frames`` log-mel frames (10 ms each).

    13 per full 100 frames, and three stride-2 convolutions over the rest.
    """
    full, rest = divmod(frames, 100)
    for _ in range(3):
        rest = (rest - 1) // 2 + 1 if rest > 0 else 0
    return 13 * full + rest


def _eos_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The one EOS id that a model's config and its tokenizer agree on."""
    configured = config.get_text_config().eos_token_id
    if isinstance(configured, int) and configured != tokenizer.eos_token_id:
        raise ModelError(
            f"{config.model_type} model: config.eos_token_id {configured} differs from the "
            f"tokenizer's {tokenizer.eos_token_id}; rollouts would never end. Make them equal."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of the {config.model_type} model has no EOS token.")
    return int(tokenizer.eos_token_id)


def _check_folder(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not (Path(path) / "config.json").is_file():
        raise ModelError(f"model folder {path!r} has no config.json; is the path right?")


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the model in what transformers and safetensors raise for a folder that does not load."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ModelError(f"cannot load model {path!r}: {reason}") from error


def load_student(
    path: str,
    *,
    placement: Placement = WHOLE,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> SpeechLM:
    """Load a speech LLM from a folder or a hub id: safetensors only, fp32 weights.

    Today that is Qwen3-Omni's thinker. Raises
    ModelError for another architecture, and for a folder or hub id that does not load.
    """
    _check_folder(path)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _naming(path):
        config = AutoConfig.from_pretrained(path, **options)
    if config.model_type != "qwen3_omni_moe_thinker":
        raise ModelError(
            f"student {path!r} has model_type {config.model_type!r}; "
            "supported: 'qwen3_omni_moe_thinker' (save the thinker of an Omni checkpoint alone)."
        )
    with _naming(path):
        model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, **options, **placement.options()
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        extractor = WhisperFeatureExtractor.from_pretrained(path, revision=revision)
    placement.put(model)
    student = wrap_student(model, tokenizer, extractor)
    return replace(student, is_vocab_parallel=placement.is_vocab_parallel)


def wrap_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    feature_extractor: SequenceFeatureExtractor,
) -> SpeechLM:
    """A SpeechLM around a Qwen3-Omni thinker that is already in memory."""
    config = model.config
    media = ("audio", "image", "video", "vision_start", "vision_end", "audio_start", "audio_end")
    ids = [getattr(config, f"{name}_token_id", None) for name in media]
    ids += [tokenizer.pad_token_id, tokenizer.bos_token_id]
    reserved = {int(i) for i in ids if i is not None} - {tokenizer.eos_token_id}
    return SpeechLM(
        model=model,
        tokenizer=tokenizer,
        feature_extractor=feature_extractor,
        audio_id=int(config.audio_token_id),
        reserved_ids=tuple(sorted(reserved)),
    )


def load_teacher(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    placement: Placement = WHOLE,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TextLM:
    """Load a text-only causal LM from a folder or a hub id, safetensors only, frozen."""
    _check_folder(path)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _naming(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **options, **placement.options()
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    placement.put(model)
    model.requires_grad_(False)
    model.eval()
    return TextLM(model, tokenizer, placement.is_vocab_parallel)


def load_vocabulary(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Vocabulary:
    """Of a teacher that a server runs: reads the tokenizer and the config alone."""
    _check_folder(path)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _naming(path):
        config = AutoConfig.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    classes = int(config.get_text_config().vocab_size)
    return Vocabulary(tokenizer, _eos_id(config, tokenizer), classes)
