"""Liger-Kernel's GRPO loss: 3U where the loss is the clipped surrogate alone, 4U otherwise.

A KL penalty, a two-sided clip or a sequence-level ratio makes the gradient of a token depend on
more than its own clipped ratio; these are plain torch on the log-probs of `linear_logprob`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from xopd_kernels import linear_logprob, linear_policy_loss
from xopd_kernels.compat.scalar_loss import refuse, result_dtype

_IGNORED = -100


class _Tokens(NamedTuple):
    """What both ways to the loss read, [B, T] unless said otherwise."""

    target: Tensor  # _IGNORED where the mask is 0
    mask: Tensor  # fp32
    weight: Tensor  # mask over the normaliser of the loss type
    policy_weight: Tensor  # weight times vllm_is_ratio
    advantage: Tensor  # [B, 1]
    old_logprob: Tensor | None  # 0 where the mask is 0
    ref_logprob: Tensor | None  # 0 where the mask is 0

    def rate(self, is_counted: Tensor) -> Tensor:
        """Share of the masked-in tokens."""
        return (is_counted * self.mask).sum() / self.mask.sum().clamp(min=1)


class LigerFusedLinearGRPOLoss(nn.Module):
    """Clipped surrogate with KL penalty, as liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        """Arguments mean what they mean in Liger; `compiled` and `chunk_size` have no effect.

        Raises:
            NotImplementedError: loss_type "cispo", "sapo", "luspo" or "vespo".
            ValueError: an unknown loss_type or importance_sampling_level, delta <= 0, or
                loss_type "dr_grpo" without max_completion_length.
        """
        super().__init__()
        if loss_type in ("cispo", "sapo", "luspo", "vespo"):
            refuse("loss_type", loss_type)
        if loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo"):
            raise ValueError(
                f'loss_type must be "grpo", "bnpo", "dr_grpo" or "dapo", got {loss_type!r}'
            )
        if importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                'importance_sampling_level must be "token" or "sequence", got '
                f"{importance_sampling_level!r}"
            )
        if delta is not None and delta <= 0:
            raise ValueError(f"delta must be None or > 0, got {delta}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError('max_completion_length must be given for loss_type "dr_grpo"')
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss [], metrics): the KL where beta is not 0, then the share of clipped tokens.

        Args:
            _input: [B, T, D] bf16, fp16, fp32; lin_weight [V, D]; bias [V].
            selected_token_ids: [B, T] int64, already shifted; attention_mask [B, T], 0 = ignored.
            advantages: [B], one for each sequence.
            ref_per_token_logps: [B, T] nat; or ref_input, ref_weight, ref_bias to compute it from.
                Read only where beta is not 0.
            old_per_token_logps: [B, T] nat of the policy that sampled; None: this one.
            vllm_is_ratio: [B], [B, 1] or [B, T] >= 0, multiplies the surrogate. A token for which
                it is 0 is skipped, and not counted as clipped.
            num_items_in_batch: tokens over all ranks, the normaliser of "dapo".

        Cost: 3U with beta 0, no delta and token-level ratios, else 4U (U = 2 N V D); 1U for
        ref_input. Only `loss` has a gradient: to _input, lin_weight and bias.

        Raises:
            ValueError: beta is not 0 and use_ref_model is on without a reference.
            TypeError, ValueError: as `linear_policy_loss`.
        """
        per_token = (attention_mask, ref_per_token_logps, old_per_token_logps)
        _check_shapes(selected_token_ids, advantages, per_token, vllm_is_ratio)
        dtype = result_dtype(_input)
        is_live = attention_mask != 0
        mask = attention_mask.to(dtype)
        weight = mask / self._normalizer(mask, num_items_in_batch)
        target = selected_token_ids.where(is_live, _IGNORED)
        tokens = _Tokens(
            target,
            mask,
            weight,
            weight if vllm_is_ratio is None else weight * _columns(vllm_is_ratio, dtype),
            advantages.detach().to(dtype)[:, None],
            _constant(old_per_token_logps, is_live, dtype),
            None,
        )
        if self.beta == 0 and self.delta is None and self.importance_sampling_level == "token":
            return self._surrogate_loss(_input, lin_weight, bias, tokens)
        if self.beta != 0 and self.use_ref_model:
            if ref_per_token_logps is None:
                ref_per_token_logps = self._reference(ref_input, ref_weight, ref_bias, target)
            tokens = tokens._replace(ref_logprob=_constant(ref_per_token_logps, is_live, dtype))
        logprob = self._logprob(_input, lin_weight, bias, target)
        return self._general_loss(logprob, tokens)

    def _surrogate_loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: _Tokens
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = linear_policy_loss(
            hidden,
            weight,
            tokens.target,
            advantage=tokens.advantage.expand_as(tokens.mask).contiguous(),
            old_logprob=tokens.old_logprob,
            token_weight=tokens.policy_weight,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            bias=bias,
            temperature=self.temperature,
            ignore_index=_IGNORED,
        )
        return out.loss, (tokens.rate(out.is_clipped),)

    def _general_loss(self, logprob: Tensor, tokens: _Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        mask, advantage = tokens.mask, tokens.advantage
        old = logprob.detach() if tokens.old_logprob is None else tokens.old_logprob
        log_ratio = logprob - old
        if self.importance_sampling_level == "sequence":
            count = mask.sum(-1, keepdim=True).clamp(min=1)
            log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / count
        ratio = log_ratio.exp()
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        capped = ratio if self.delta is None else ratio.clamp(max=self.delta)
        surrogate = torch.minimum(capped * advantage, ratio.clamp(low, high) * advantage)
        loss = -(surrogate * tokens.policy_weight).sum()
        is_clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
        metrics = (tokens.rate(is_clipped),)
        if self.beta == 0:
            return loss, metrics
        ref = logprob.detach() if tokens.ref_logprob is None else tokens.ref_logprob
        kl = (ref - logprob).expm1() - (ref - logprob)  # the k3 estimate, arXiv:2402.03300 eq. 4
        if self.use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + self.beta * (kl * tokens.weight).sum()
        return loss, (tokens.rate(kl.detach()), *metrics)

    def _reference(
        self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        if hidden is None or weight is None:
            raise ValueError(
                "use_ref_model with beta != 0 needs ref_per_token_logps, or ref_input and "
                "ref_weight; got neither"
            )
        with torch.no_grad():
            return self._logprob(hidden, weight, bias, target)

    def _logprob(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        out = linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            temperature=self.temperature,
            ignore_index=_IGNORED,
        )
        return out.logprob

    def _normalizer(self, mask: Tensor, num_items: float | Tensor | None) -> Tensor:
        """What divides the sum over tokens, [] or [B, 1]."""
        batch = mask.shape[0]
        if self.loss_type == "grpo":
            return mask.sum(-1, keepdim=True).clamp(min=1) * batch
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1)
        if self.max_completion_length is not None and self.loss_type == "dr_grpo":
            return mask.new_full((), batch * self.max_completion_length)
        is_group = distributed.is_available() and distributed.is_initialized()
        if num_items is None:
            count = mask.sum()
            if is_group:
                distributed.all_reduce(count)
        else:
            # new_full: a copy from the host would make it wait.
            if isinstance(num_items, Tensor):
                count = num_items.to(mask)
            else:
                count = mask.new_full((), num_items)
        ranks = distributed.get_world_size() if is_group else 1
        return (count / ranks).clamp(min=1)


def _check_shapes(
    token_ids: Tensor,
    advantages: Tensor,
    per_token: tuple[Tensor, Tensor | None, Tensor | None],
    vllm_is_ratio: Tensor | None,
) -> None:
    """Raise ValueError for what broadcasting would accept and mean something else."""
    names = ("attention_mask", "ref_per_token_logps", "old_per_token_logps")
    shape = list(token_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"selected_token_ids must be [B, T], got {shape}; reshape it")
    for name, value in zip(names, per_token, strict=True):
        if value is not None and list(value.shape) != shape:
            raise ValueError(
                f"{name} must have the shape of selected_token_ids {shape}, got {list(value.shape)}"
            )
    if list(advantages.shape) != shape[:1]:
        raise ValueError(
            f"advantages must be {shape[:1]}, one for each sequence, got {list(advantages.shape)}; "
            "linear_policy_loss takes one for each token"
        )
    ratios = (shape[:1], [shape[0], 1], shape)
    if vllm_is_ratio is not None and list(vllm_is_ratio.shape) not in ratios:
        raise ValueError(
            f"vllm_is_ratio must be {ratios[0]}, {ratios[1]} or {shape}, "
            f"got {list(vllm_is_ratio.shape)}"
        )


def _constant(logprob: Tensor | None, is_live: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Log-probs [B, T] without gradient, 0 where ignored: padding may hold anything."""
    return None if logprob is None else logprob.detach().to(dtype).where(is_live, 0.0)


def _columns(ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """[B] as [B, 1]; [B, 1] and [B, T] as they are."""
    return (ratio[:, None] if ratio.ndim == 1 else ratio).detach().to(dtype)
