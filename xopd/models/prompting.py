"""Turn instructions into token ids through the tokenizer's own chat template.

The student's speech prompt and the text prompt that student and teacher share are the same chat
turn; only the content part that carries the instruction differs (audio or text).
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from xopd.models.speech_lm import ModelError


def render(tokenizer: PreTrainedTokenizerBase, content: list[dict[str, str]]) -> tuple[int, ...]:
    """Token ids of one user turn, ready for the assistant's answer.

    ``content`` is a list of ``{"type": "text", "text": ...}`` and ``{"type": "audio"}`` parts.
    """
    turn = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def text_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> tuple[int, ...]:
    """The text form of an instruction; what the teacher always reads."""
    return render(tokenizer, [{"type": "text", "text": instruction}])


def speech_prompt(
    tokenizer: PreTrainedTokenizerBase, audio_id: int, audio_tokens: int, question: str = ""
) -> tuple[int, ...]:
    """The spoken form: the clip's placeholder repeated once per audio embedding.

    ``question`` is written text that follows the clip (used by probes; empty for instructions).
    """
    content: list[dict[str, str]] = [{"type": "audio"}]
    if question:
        content.append({"type": "text", "text": question})
    ids = render(tokenizer, content)
    if ids.count(audio_id) != 1:
        raise ModelError(
            f"the chat template rendered {ids.count(audio_id)} audio placeholders (id {audio_id}) "
            "for one clip; expected exactly one. Check chat_template and audio_token_id."
        )
    at = ids.index(audio_id)
    return ids[:at] + (audio_id,) * audio_tokens + ids[at + 1 :]
