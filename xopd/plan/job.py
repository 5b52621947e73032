"""What a plan is for: two models, a batch, and where everything runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from xopd.plan.activations import Precision
from xopd.plan.cluster import Cluster
from xopd.plan.errors import PlanError
from xopd.plan.shape import ModelShape


class TeacherPlace(Enum):
    """Where the teacher scores."""

    LOCAL = "local"  # sharded over the training ranks
    SERVER = "server"  # on GPUs of its own


class RolloutPlace(Enum):
    """What samples."""

    GENERATE = "generate"  # the sharded student itself, through transformers
    COLOCATED = "colocated"  # one engine on GPUs of the first machine, asleep while they train
    SERVER = "server"  # one engine on GPUs of its own


@dataclass(frozen=True)
class Job:
    """A training job; bf16 computation with fp32 master weights, as `model.dtype=bf16` trains."""

    student: ModelShape
    teacher: ModelShape
    cluster: Cluster
    prompts_per_step: int = 256
    rollouts_per_prompt: int = 4  # G, of each of the two modalities
    micro_batch: int = 8  # rollouts of a forward and backward pass
    kept_clips: int = 4096  # clips whose embeddings stay on each GPU: data.kept_clips
    speech_prompt_tokens: int = 420  # 30 s of speech at 13 tokens a second, and the template
    text_prompt_tokens: int = 100
    response_tokens: int = 1024  # the longest: memory
    mean_response_tokens: int = 512  # time
    recomputes_old: bool = False  # the sampling policy's log-probs by the trainer
    checkpoints_activations: bool = True
    offloads: bool = False  # weights, gradients and moments in host memory
    has_sparse_gradient: bool = False  # loss.max_gradient_error is a number
    is_adam_fused: bool = False  # else torch's default: foreach on GPUs
    teacher_place: TeacherPlace = TeacherPlace.LOCAL
    rollout_place: RolloutPlace = RolloutPlace.COLOCATED
    engine_gpus: int = 2  # of the one engine of COLOCATED: vllm.tensor_parallel
    engine_rows: int = 256  # rollouts that an engine decodes at a time: vllm.max_num_seqs
    generate_rows: int = 128  # rollouts of a batch of GENERATE: rollout.batch_size
    server_gpus: int = 8  # of each server there is

    def __post_init__(self) -> None:
        for name in (
            *("prompts_per_step", "rollouts_per_prompt", "micro_batch", "speech_prompt_tokens"),
            *("text_prompt_tokens", "response_tokens", "mean_response_tokens", "engine_gpus"),
            *("engine_rows", "generate_rows", "server_gpus", "kept_clips"),
        ):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mean_response_tokens > self.response_tokens:
            raise PlanError(
                f"mean_response_tokens {self.mean_response_tokens} is above response_tokens "
                f"{self.response_tokens}, which is the longest; lower the one or raise the other"
            )
        if self.offloads and not self.is_sharded:
            raise PlanError(
                "offloading is FSDP2's and needs more than one rank; raise gpus_per_node"
            )
        most = self.cluster.gpus_per_node
        if self.rollout_place is RolloutPlace.COLOCATED and self.engine_gpus > most:
            raise PlanError(
                f"engine_gpus {self.engine_gpus} is above the {most} GPUs of a node, and the one "
                "engine runs on the first of them; lower it"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether there is anything to shard over."""
        return self.cluster.ranks > 1

    @property
    def precision(self) -> Precision:
        """How the student computes."""
        return Precision.SHARDED if self.is_sharded else Precision.AUTOCAST

    @property
    def rows(self) -> int:
        """Rollouts of a step: prompts x G x 2 modalities."""
        return self.prompts_per_step * self.rollouts_per_prompt * 2

    @property
    def rank_rows(self) -> int:
        """Rollouts that the fullest rank trains on."""
        return -(-self.rows // self.cluster.ranks)

    @property
    def passes(self) -> int:
        """Forward and backward passes of a rank in a step."""
        return -(-self.rank_rows // self.micro_batch)

    @property
    def pass_rows(self) -> int:
        """Rollouts of a full pass."""
        return min(self.micro_batch, self.rank_rows)

    @property
    def width_tokens(self) -> int:
        """T: the longest row of a pass, prompt and response; rows are padded to it."""
        return max(self.speech_prompt_tokens, self.text_prompt_tokens) + self.response_tokens

    @property
    def pass_tokens(self) -> int:
        """N: positions of a full pass."""
        return self.pass_rows * self.width_tokens

    @property
    def teacher_width_tokens(self) -> int:
        """As `width_tokens`, of the teacher, who reads the text prompt."""
        return self.text_prompt_tokens + self.response_tokens

    @property
    def response_total_tokens(self) -> float:
        """Response tokens of a step: rows x mean length."""
        return float(self.rows * self.mean_response_tokens)

    @property
    def student_total_tokens(self) -> float:
        """Prompt and response tokens of a step as the student reads them, without padding."""
        prompts = (self.speech_prompt_tokens + self.text_prompt_tokens) / 2
        return self.rows * (prompts + self.mean_response_tokens)

    @property
    def teacher_total_tokens(self) -> float:
        """As `student_total_tokens`, behind the text prompt."""
        return float(self.rows * (self.text_prompt_tokens + self.mean_response_tokens))

    @property
    def sampling_gpus(self) -> int:
        """g: GPUs of the one engine, which decodes all rollouts of a step; the others wait."""
        is_server = self.rollout_place is RolloutPlace.SERVER
        return self.server_gpus if is_server else self.engine_gpus

    @property
    def cache_parts(self) -> int:
        """Parts into which an engine cuts its cache: min(g, K), as a head is never cut."""
        return min(self.sampling_gpus, self.student.kv_heads)
