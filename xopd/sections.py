"""The sections of a run's configuration: one frozen dataclass a stage, each field with its help.

`xopd.config` puts them together; the string below a field is what `--help` and `xopd config` show.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from xopd.schema import ConfigError, Range, Section


class Dtype(StrEnum):
    """Floating-point precision of a run."""

    FP32 = "fp32"
    BF16 = "bf16"


class OldLogprob(StrEnum):
    """Whose log-probs of the sampled tokens the ratio of an update starts from."""

    AUTO = "auto"
    RECOMPUTED = "recomputed"
    ENGINE = "engine"


class RolloutEngine(StrEnum):
    """What samples from the student."""

    GENERATE = "generate"
    VLLM = "vllm"
    SERVER = "server"


class BackendChoice(StrEnum):
    """Which implementation of the kernels a run asks for."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"
    NATIVE = "native"


_Count = Annotated[int, Range(1, 10_000_000)]
_CountOrZero = Annotated[int, Range(0, 10_000_000)]
_UnitFloat = Annotated[float, Range(0.0, 1.0)]
_Beta = Annotated[float, Range(0.0, 1.0, high_open=True)]


@dataclass(frozen=True)
class ModelConfig(Section):
    """Which weights are trained and which teach."""

    student: str
    """Student: folder or hub id of a speech LLM; its audio tower and adapter stay frozen."""
    teacher: str
    """Teacher: folder or hub id of a text LLM with the student's tokenizer; frozen."""
    dtype: Dtype = Dtype.FP32
    """Precision of the computation; with bf16 the student keeps fp32 master weights."""
    revision: str | None = None
    """Hub revision (commit id) of both models; null takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Needs a pinned revision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trust_remote_code and self.revision is None:
            raise ConfigError(
                "model.trust_remote_code is true but model.revision is null: pin the commit id "
                "whose code you have read in model.revision"
            )


@dataclass(frozen=True)
class DataConfig(Section):
    """Paired speech and text prompts."""

    path: str
    """Corpus folder, one set of parquet shards per split (see `xopd data synth`)."""
    train_split: str = "train"
    """Split whose prompts the student answers in training."""
    eval_split: str = "test"
    """Split of the evaluations before, during and after training."""
    eval_limit: _Count = 400
    """Prompts per evaluation; a smaller split is used whole."""
    kept_clips: _Count = 4096
    """Clips whose audio embeddings stay in memory on each rank; others are encoded again."""


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How trajectories are sampled from the student."""

    engine: RolloutEngine = RolloutEngine.GENERATE
    """What samples: the student's own generate, a vLLM engine that the trainer starts (section
    vllm), or a vLLM server (sections vllm, server, http)."""
    prompts_per_step: _Count = 16
    """Prompts per step (B); each is answered from speech and from text."""
    rollouts_per_prompt: _Count = 4
    """Trajectories per prompt and modality (G)."""
    max_new_tokens: Annotated[int, Range(1, 1_000_000)] = 40
    """Longest response, in tokens."""
    temperature: Annotated[float, Range(0.0, 100.0, low_open=True)] = 1.0
    """Sampling temperature; log-probabilities are taken at the same temperature."""
    batch_size: _Count = 128
    """Rows per generate call. A memory knob, but another value draws other samples."""
    max_staleness: Annotated[int, Range(0, 1)] = 0
    """Steps by which the weights that sampled may be behind those that train. 1: rollouts of the
    next step are sampled while this one trains."""


@dataclass(frozen=True)
class LossConfig(Section):
    """The X-OPD objective (paper, equations 1 to 5)."""

    text_weight: _UnitFloat = 0.5
    """Weight lambda of the text half: L = lambda * L_in + (1 - lambda) * L_cross."""
    clip_low: _UnitFloat = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Annotated[float, Range(0.0, 1_000_000.0)] = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    advantage_clamp: Annotated[float, Range(0.0, 1_000_000.0, low_open=True)] = 10.0
    """Per-token advantages are clamped to [-advantage_clamp, advantage_clamp], in nats."""
    center_advantage: bool = False
    """Subtract the running mean advantage of earlier steps, for each modality apart."""
    sequence_mean: bool = True
    """Mean over the tokens of each trajectory, then over trajectories; false: over all tokens."""
    minibatches: _Count = 1
    """Optimizer steps per rollout batch. Above 1 the ratio leaves 1 and the clip acts."""
    old_logprob: OldLogprob = OldLogprob.AUTO
    """Denominator of the ratio: recomputed by the trainer before the update, or what the rollout
    engine said while it sampled. auto: the engine's where it says something, but recomputed for
    mixtures of experts, whose two sides may route a token differently."""
    importance_cap: Annotated[float, Range(1.0, 1_000_000.0)] = 2.0
    """Where both are known, each token weighs min(recomputed / engine's probability, this): the
    truncated importance weight of having sampled with the engine's numerics."""
    max_gradient_error: Annotated[float | None, Range(0.0, 1.0)] = None
    """What the gradient of the logits may lack, as a share of its 1-norm: a token's gradient then
    reaches lm_head through the few classes that hold its probability, for about one product with
    lm_head in place of three; metrics gradient_error and dropped_mass_* say what it came to.
    What is left out depends on the cut into passes, the bound does not. null: exact."""


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: _UnitFloat = 2e-6
    """Learning rate before warm-up and decay are applied."""
    beta1: _Beta = 0.9
    """Decay of the first moment."""
    beta2: _Beta = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Range(0.0, 1.0, low_open=True)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: _UnitFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: _CountOrZero = 10
    """Steps of linear warm-up from 0."""
    cosine_decay: bool = True
    """Times half a cosine from 1 to 0 over all steps, warm-up included; false: no decay."""
    max_grad_norm: Annotated[float, Range(0.0, 1_000_000.0, low_open=True)] = 1.0
    """Gradients are scaled down to this global L2 norm."""


@dataclass(frozen=True)
class ShardingConfig(Section):
    """How a run is spread over the ranks that `torchrun` starts; without it there is one."""

    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory; layers visit the GPU."""
    checkpoint_activations: bool = False
    """Recompute each layer in the backward pass in place of keeping its activations."""
    vocab_parallel_head: bool = False
    """Never gather lm_head: each rank computes the loss of all ranks' tokens with its own part of
    the vocabulary. Saves V D weights and as many fp32 gradients on each rank, and moves hidden
    states in their place: for large vocabularies and few tokens a pass."""
    balance_tokens: bool = True
    """Deal a step's rollouts out so that ranks have equal numbers of tokens; false: in turn."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The loop, and where its files go."""

    steps: _Count = 100
    """Rollout batches to train on."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of prompt order and sampling; the same seed and config give the same run."""
    micro_batch: _Count = 64
    """Rollouts per forward and backward pass of a rank. A memory knob: the gradient does not depend
    on it."""
    eval_every: _CountOrZero = 0
    """Steps between evaluations; 0: only before and after training."""
    checkpoint_every: _CountOrZero = 20
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: _Count = 2
    """How many of the newest checkpoints stay on disk."""
    max_skipped_updates: _CountOrZero = 3
    """Updates in a row that may be left out because loss or gradient is not finite; one more stops
    the run."""
    rank_timeout_s: Annotated[int, Range(1, 1_000_000)] = 1800
    """A rank that waits longer than this for the others stops with an error."""
    out_dir: str = "runs/xopd"
    """Folder of the run: config, metrics, checkpoints, evaluations, report."""
    backend: BackendChoice = BackendChoice.AUTO
    """Kernel implementation; an explicit choice that is unavailable is an error."""
    threads: Annotated[int, Range(1, 1024)] = 2
    """CPU threads of torch."""
    tensorboard: bool = True
    """Also write TensorBoard events, where the package is installed."""
    trackio: bool = False
    """Also log to a local trackio project; needs the extra of that name."""
    wandb: bool = False
    """Also log to Weights & Biases; needs the extra of that name."""
    project: str = "xopd"
    """Project of trackio and wandb; a run in it is named after its folder."""
