"""One batch layout for every pass that scores sampled tokens: prompt + response, right-padded.

With padding on the right a causal model needs no attention mask: no real token can see a padded
one. ``target[b, t]`` is the token that position t predicts, and IGNORE everywhere else, so the
kernels drop prompt and padding rows before the first GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xopd.head import IGNORE, Head, fused_head
from xopd.models import SpeechLM, TextLM
from xopd.sharding import reshard
from xopd.types import Modality, Rollout
from xopd_kernels import LinearLogprob, linear_logprob
from xopd_kernels.backend import BackendChoice


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rollouts laid out for one forward pass."""

    ids: Tensor  # [B, T] int64, right-padded
    target: Tensor  # [B, T] int64: token predicted at each position, IGNORE outside responses
    rows: tuple[Rollout, ...]

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        """Per-rollout values [n_i] -> [B, T] fp32 at the positions that predict them, else 0."""
        out = torch.zeros(self.target.shape, dtype=torch.float32, device=self.target.device)
        out[self.target != IGNORE] = torch.cat(list(values)).to(out)
        return out

    def gather(self, per_token: Tensor) -> list[Tensor]:
        """[B, T] -> one [n_i] tensor per rollout; the inverse of ``scatter``."""
        flat = per_token[self.target != IGNORE]
        return list(flat.split([len(row.response_ids) for row in self.rows]))


def layout(rows: Sequence[Rollout], lm: SpeechLM | TextLM) -> TokenBatch:
    """Rollouts on the model's device: behind the text prompt for a TextLM, else the student's."""
    as_teacher = isinstance(lm, TextLM)
    prompts = [r.prompt.text_ids if as_teacher else r.prompt.ids(r.modality) for r in rows]
    width = max(len(p) + len(r.response_ids) for p, r in zip(prompts, rows, strict=True))
    ids = torch.full((len(rows), width), int(lm.tokenizer.pad_token_id), dtype=torch.long)
    target = torch.full((len(rows), width), IGNORE, dtype=torch.long)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        response = torch.tensor(row.response_ids)
        ids[i, : len(prompt)] = torch.tensor(prompt)
        ids[i, len(prompt) : len(prompt) + len(response)] = response
        target[i, len(prompt) - 1 : len(prompt) - 1 + len(response)] = response
    return TokenBatch(ids=ids.to(lm.device), target=target.to(lm.device), rows=tuple(rows))


def positions(batch: TokenBatch) -> Tensor:
    """Position ids [B, T]: 0, 1, 2, ... in every row.

    Given explicitly because an Omni thinker otherwise reuses the rope offsets of its last generate.
    """
    rows, width = batch.ids.shape
    return torch.arange(width, device=batch.ids.device).expand(rows, width)


def embed(lm: SpeechLM | TextLM, batch: TokenBatch) -> Tensor:
    """Input embeddings [B, T, D]; audio goes in for the student's speech rows."""
    if isinstance(lm, TextLM):
        return lm.embed(batch.ids)
    speech = [row.prompt.audio for row in batch.rows if row.modality is Modality.SPEECH]
    return lm.embed(batch.ids, speech)


def support_bias(lm: SpeechLM | TextLM, head: Head) -> Tensor | None:
    """The lm_head bias [V], -inf at ids that rollouts never sample; a TextLM's own bias.

    Of the head's classes, where it has not all of them.

    Rollouts suppress reserved ids, so the policy that sampled is the softmax over the others.
    Scoring over all of V would be another policy, and its update would reward mass on ids that
    cannot be drawn.
    """
    if isinstance(lm, TextLM):
        return head.bias
    classes = head.weight.shape[0]
    mask = head.weight.new_zeros(classes)
    first = head.first_class
    mask[[i - first for i in lm.reserved_ids if first <= i < first + classes]] = -torch.inf
    return mask if head.bias is None else head.bias + mask


@torch.no_grad()
def score(
    lm: SpeechLM | TextLM,
    passes: Sequence[Sequence[Rollout]],
    *,
    temperature: float,
    backend: BackendChoice,
) -> list[list[Tensor]]:
    """Log-probabilities [n_i] fp32 of every sampled token, without gradient or logits.

    passes: the rows of each forward pass; the result has the same shape. A TextLM reads the text
    prompt whatever the rollout's modality: that is the cross-modal half of X-OPD (paper, eq. 2).
    """
    found = [_scored(lm, rows, temperature, backend) for rows in passes]
    reshard(lm.model)  # no backward pass comes that would let go of lm_head
    return found


def _scored(
    lm: SpeechLM | TextLM, rows: Sequence[Rollout], temperature: float, backend: BackendChoice
) -> list[Tensor]:
    batch = layout(rows, lm)

    def op(hidden: Tensor, head: Head, values: Sequence[Tensor]) -> LinearLogprob:
        (target,) = values
        return linear_logprob(
            hidden,
            head.weight,
            target,
            bias=support_bias(lm, head),
            temperature=temperature,
            vocab_group=head.group,
            backend=backend,
        )

    with fused_head(lm.model, op, [batch.target], is_vocab_parallel=lm.is_vocab_parallel):
        found: LinearLogprob = lm.model(
            inputs_embeds=embed(lm, batch), position_ids=positions(batch), use_cache=False
        ).logits
    return batch.gather(found.logprob)
