"""Rollouts: the student answers each prompt, in speech and in text (HF ``generate``).

Sampling is from the whole distribution at the given temperature (no top-k, no top-p): a truncated
support would bias the ratio and the reverse KL. Ids of media placeholders can never be sampled,
because re-scoring would take them for audio.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from xopd.models import SpeechLM, TextLM
from xopd.types import Modality, Prompt, Rollout


def left_padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, T] int64, padded on the left for generation."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def generate(
    lm: SpeechLM | TextLM,
    rows: Sequence[tuple[int, ...]],
    audio: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[tuple[int, ...]]:
    """Responses to prompt rows; EOS is part of a response that ended.

    ``audio`` holds the [A, D] embeddings of the rows that have placeholders, in row order.
    ``temperature`` 0 is greedy decoding; sampling draws from torch's global generator.
    """
    model = lm.model
    model.eval()
    device = next(model.parameters()).device
    pad_id = int(lm.tokenizer.pad_token_id)
    ids, mask = left_padded(rows, pad_id, device)
    embedded = lm.embed(ids, audio) if isinstance(lm, SpeechLM) else lm.embed(ids)
    reserved = list(lm.reserved_ids) if isinstance(lm, SpeechLM) else None
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0 if temperature > 0 else None,
        suppress_tokens=reserved,
        pad_token_id=pad_id,
        eos_token_id=lm.eos_id,
        use_cache=True,
    )
    # What settings leaves open, generate would take from the checkpoint's own generation config: a
    # repetition penalty there would sample another policy than the one that is scored.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            inputs_embeds=embedded, attention_mask=mask, generation_config=settings
        )
    finally:
        model.generation_config = own
    return [_until_eos(row, lm.eos_id) for row in output.tolist()]


def _until_eos(row: list[int], eos_id: int) -> tuple[int, ...]:
    return tuple(row[: row.index(eos_id) + 1]) if eos_id in row else tuple(row)


def sample_rollouts(
    student: SpeechLM,
    prompts: Sequence[Prompt],
    modality: Modality,
    *,
    rollouts_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> list[Rollout]:
    """G trajectories for each prompt in one modality, in prompt order."""
    repeated = [p for p in prompts for _ in range(rollouts_per_prompt)]
    responses: list[tuple[int, ...]] = []
    for start in range(0, len(repeated), batch_size):
        batch = repeated[start : start + batch_size]
        responses += generate(
            student,
            [p.ids(modality) for p in batch],
            [p.audio for p in batch] if modality is Modality.SPEECH else [],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
    return [
        Rollout(p, modality, response, is_finished=response[-1] == student.eos_id)
        for p, response in zip(repeated, responses, strict=True)
    ]
