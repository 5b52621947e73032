"""The demo's model pair from nothing: a tiny Qwen3-Omni thinker and its Qwen3 text teacher.

Real transformers classes, small configurations: about 0.9 M parameters for the language model
(dense layers) and 0.2 M for the audio tower. Both share one word-level tokenizer, and the
language model's weights move from the teacher to the thinker key by key.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerConfig,
)

from xopd.data.world import VOCABULARY
from xopd.models.speech_lm import SpeechLM, leaf_modules, wrap_student

HIDDEN, LAYERS, HEADS, INTERMEDIATE = 128, 4, 4, 384
N_MELS = 64
SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<user>", "<assistant>", "<audio>", "<audio_start>"),
    *("<audio_end>", "<image>", "<video>", "<vision_start>", "<vision_end>"),
)
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{% if message['role'] == 'user' %} <user>"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    " <audio_start> <audio> <audio_end>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} <assistant> {{ message['content'] }} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the world's closed vocabulary, with a chat template."""
    words = [*SPECIAL, *VOCABULARY]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def vocabulary_rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """lm_head rows: the vocabulary padded to a multiple of 32, as real checkpoints pad theirs."""
    return -(-len(tokenizer) // 32) * 32


def _text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "vocab_size": vocabulary_rows(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def build_teacher(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 causal LM for the world's vocabulary."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return Qwen3ForCausalLM(Qwen3Config(**_text_config(tokenizer), rope_parameters=rope))


def build_student(tokenizer: PreTrainedTokenizerFast, seed: int) -> SpeechLM:
    """A randomly initialised Qwen3-Omni thinker whose language model matches the teacher's shape.

    The vision tower is part of the architecture and unused: its smallest legal size is built.
    """
    torch.manual_seed(seed)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    third = HIDDEN // HEADS // 2 // 3
    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        # Temporal, height and width sections; they carry equal positions for audio and text.
        "mrope_section": [HIDDEN // HEADS // 2 - 2 * third, third, third],
        "interleaved": True,
        "mrope_interleaved": True,
    }
    config = Qwen3OmniMoeThinkerConfig(
        audio_config={
            "num_mel_bins": N_MELS,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "d_model": 96,
            "output_dim": HIDDEN,
            "n_window": 50,
            "n_window_infer": 800,
            "conv_chunksize": 500,
            "downsample_hidden_size": 24,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            **_text_config(tokenizer),
            # Dense layers everywhere: routed experts cost CPU time and add nothing at this size.
            "mlp_only_layers": list(range(LAYERS)),
            "rope_parameters": rope,
        },
        audio_token_id=ids["<audio>"],
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        audio_start_token_id=ids["<audio_start>"],
        audio_end_token_id=ids["<audio_end>"],
        user_token_id=ids["<user>"],
        # get_rope_index reads these two although the config class does not declare them.
        vision_start_token_id=ids["<vision_start>"],
        vision_end_token_id=ids["<vision_end>"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)
    extractor = transformers.WhisperFeatureExtractor(feature_size=N_MELS, sampling_rate=16_000)
    return wrap_student(model, tokenizer, extractor)


def copy_language_model(teacher: Qwen3ForCausalLM, student: SpeechLM) -> None:
    """Copy the teacher's decoder and lm_head into the thinker; every key must match."""
    (decoder,) = (
        module
        for module in leaf_modules(student.model, ("language_model", "model"))
        if type(module).__name__ == "Qwen3OmniMoeThinkerTextModel"
    )
    decoder.load_state_dict(teacher.model.state_dict(), strict=True)
    student.lm_head.load_state_dict(teacher.lm_head.state_dict(), strict=True)
