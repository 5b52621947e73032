"""Time of a step, stage by stage: FLOPs, bytes and messages over the cluster's rates.

Within a stage the slowest of arithmetic and traffic counts, as if they overlapped in full; stages
follow one another. Padding, launches, latencies and waiting for the slowest rank are left out, so
a stage takes at least this at the shares that the cluster assumes.
"""

from __future__ import annotations

from dataclasses import dataclass

from xopd.plan.job import Job, RolloutPlace, TeacherPlace
from xopd.plan.losses import LOSS_GEMMS, SCORING_GEMMS, SPARSE_LOSS_GEMMS, Head, HeadGemms
from xopd.plan.memory import BF16, FP32, Line, same
from xopd.plan.shape import ModelShape

ADAM_BYTES = 7 * FP32  # read weight, gradient, two moments; write weight, two moments


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step."""

    stages: tuple[Line, ...]
    background: tuple[Line, ...]  # beside the next steps

    def step_s(self, head: Head) -> float:
        """Sum of the stages."""
        return sum(stage.of(head) for stage in self.stages)


def step_time(job: Job) -> StepTime:
    """The plan of one step; see the formula of each line."""
    stages = [_rollout(job), _teacher(job)]
    if job.recomputes_old:
        stages.append(_old(job))
    stages += [_update(job), _adam(job), _sync(job)]
    return StepTime(tuple(stages), _checkpoint(job))


def layer_flops(shape: ModelShape, width_tokens: float) -> float:
    """FLOPs a token of a forward pass through the decoder.

    2 A + 2 L H h T: A active parameters; scores and values of T/2 earlier tokens on average.
    """
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * width_tokens
    return 2.0 * shape.active_decoder_parameters + attention


def _head_s(job: Job, shape: ModelShape, gemms: HeadGemms, total_tokens: float) -> float:
    """Seconds of the products with lm_head, spread over the ranks."""
    tokens = total_tokens if gemms.counts_prompts else job.response_total_tokens
    unit = 2.0 * tokens * shape.vocabulary * shape.hidden / job.cluster.ranks
    cluster = job.cluster
    return gemms.bf16 * unit / cluster.bf16_flops + gemms.fp32 * unit / cluster.fp32_flops


def _gather_s(job: Job, parameters: int, shard_size: int) -> float:
    """Seconds of gathering so many parameters once in bf16, unit by unit.

    Offloaded, their shards come from the host first, `shard_size` bytes an element.
    """
    seconds = job.cluster.gather_s(BF16 * float(parameters))
    if not job.offloads:
        return seconds
    return max(seconds, shard_size * parameters / job.cluster.ranks / _host_rate(job))


def _host_rate(job: Job) -> float:
    return job.cluster.gpu.host_bytes_per_s * job.cluster.link_share


def _rollout(job: Job) -> Line:
    if job.rollout_place is RolloutPlace.GENERATE:
        return _generate(job)
    cluster, shape = job.cluster, job.student
    rows = min(job.engine_rows, job.rows)
    prompt = (job.speech_prompt_tokens + job.text_prompt_tokens) / 2
    prefill_tokens = job.prompts_per_step * (job.speech_prompt_tokens + job.text_prompt_tokens)
    prefill = prefill_tokens * layer_flops(shape, prompt) / job.sampling_gpus / cluster.bf16_flops
    step_s = _decode_s(job, rows, prompt, job.sampling_gpus, job.cache_parts)
    steps = max(job.rows * job.mean_response_tokens / rows, float(job.response_tokens))
    return same(
        "rollouts",
        prefill + steps * step_s,
        "one engine of g GPUs: prefill of each prompt once + steps * max(bytes / memory of a GPU, "
        "FLOPs / g / compute); steps = max(all rows * mean response / rows at a time, longest "
        "response); bytes = 2 (weights that rows at a time touch) / g + rows (prompt + mean "
        "response / 2) 2 (2 L K h) / min(g, K)",
    )


def _decode_s(job: Job, rows: int, prompt_tokens: float, gpus: int, cache_parts: int) -> float:
    """Seconds in which so many GPUs together sample one token for each of the rows."""
    cluster, shape = job.cluster, job.student
    context = prompt_tokens + job.mean_response_tokens / 2
    touched = BF16 * shape.touched_parameters(rows)
    cache = rows * context * BF16 * shape.cache_elements_per_token
    flops = rows * (layer_flops(shape, 2 * context) + 2.0 * shape.head_parameters)
    read = touched / gpus + cache / cache_parts
    return max(read / cluster.memory_bytes_per_s, flops / cluster.bf16_flops / gpus)


def _generate(job: Job) -> Line:
    """Every rank takes batches in turn; for each token of one it gathers the whole student."""
    prompt = (job.speech_prompt_tokens + job.text_prompt_tokens) / 2
    rows = min(job.generate_rows, job.rows)
    batches = -(-job.rows // rows)
    rounds = -(-batches // job.cluster.ranks)
    gather = _gather_s(job, job.student.trained_parameters, FP32)
    decode = max(_decode_s(job, rows, prompt, gpus=1, cache_parts=1), gather)
    tokens = rows * prompt
    flops = tokens * (layer_flops(job.student, prompt) + 2.0 * job.student.head_parameters)
    prefill = max(flops / job.cluster.bf16_flops, gather)
    return same(
        "rollouts",
        rounds * (prefill + job.response_tokens * decode),
        "ceil(batches / n) * (prefill + longest response * max(decode of a batch on one GPU, "
        "gathering 2 P)); no prompt is shared",
    )


def _teacher(job: Job) -> Line:
    shape = job.teacher
    if job.teacher_place is TeacherPlace.SERVER:
        # The 2 G trajectories of a prompt share its prefix in the server's cache.
        tokens = job.prompts_per_step * job.text_prompt_tokens + job.response_total_tokens
        flops = tokens * layer_flops(shape, job.teacher_total_tokens / job.rows)
        flops += job.response_total_tokens * 2.0 * shape.head_parameters
        return same(
            "teacher's log-probs",
            flops / job.server_gpus / job.cluster.bf16_flops,
            "forward FLOPs of each text prompt once and every response / the server's GPUs",
        )
    values = _scoring_values(job, shape, job.teacher_total_tokens, BF16)
    return Line("teacher's log-probs", values, _SCORING)


def _old(job: Job) -> Line:
    values = _scoring_values(job, job.student, job.student_total_tokens, FP32)
    return Line("old log-probs", values, _SCORING)


_SCORING = (
    "max(tokens (2 A + 2 L H h T) / n / compute + lm_head, passes * gathering 2 P, of lm_head "
    "once); lm_head: 1 U = 2 V D a token, naive of prompts and responses, the others of responses"
)


def _scoring_values(
    job: Job, shape: ModelShape, total_tokens: float, shard_size: int
) -> tuple[float, ...]:
    """Seconds by column of a forward pass over all rows, gathered once a pass."""
    # The first pass leaves lm_head gathered for the others.
    traffic = job.passes * _gather_s(job, shape.trained_parameters, shard_size)
    traffic -= (job.passes - 1) * _gather_s(job, shape.head_parameters, shard_size)
    cluster, flops = job.cluster, layer_flops(shape, total_tokens / job.rows)
    layers = total_tokens * flops / cluster.ranks / cluster.bf16_flops
    return tuple(
        max(layers + _head_s(job, shape, SCORING_GEMMS[head], total_tokens), traffic)
        for head in Head
    )


def _update(job: Job) -> Line:
    shape, cluster, tokens = job.student, job.cluster, job.student_total_tokens
    forward = tokens * layer_flops(shape, tokens / job.rows) / cluster.ranks / cluster.bf16_flops
    layers = forward * (4 if job.checkpoints_activations else 3)
    traffic = job.passes * _pass_traffic_s(job)
    gemms, ours = dict(LOSS_GEMMS), "3 U"
    if job.has_sparse_gradient:
        gemms[Head.OURS], ours = SPARSE_LOSS_GEMMS, "1 U (sparse; 3 U of a dense token)"
    return Line(
        "update: forward and backward passes",
        tuple(max(layers + _head_s(job, shape, gemms[head], tokens), traffic) for head in Head),
        "max(3 forward passes (4 with checkpointing) + lm_head, passes * (gathering 2 P twice, of "
        "lm_head once, + reducing 4 P)); lm_head: naive 3 U of prompts and responses, Liger 2 U "
        "in bf16 and 2 U in fp32 without tensor cores (torch's default for fp32) of responses, "
        f"ours {ours} of responses",
    )


def _pass_traffic_s(job: Job) -> float:
    """Gather for the forward pass, again for the backward pass, and reduce-scatter in fp32."""
    if not job.is_sharded:
        return 0.0
    cluster, shape = job.cluster, job.student
    reduced = cluster.gather_s(FP32 * float(shape.trained_parameters))
    kept = _gather_s(job, shape.head_parameters, FP32)
    seconds = 2 * _gather_s(job, shape.trained_parameters, FP32) - kept + reduced
    if job.offloads:
        seconds += FP32 * shape.trained_parameters / cluster.ranks / _host_rate(job)
    return seconds


def _adam(job: Job) -> Line:
    cluster = job.cluster
    moved = float(ADAM_BYTES * job.student.trained_parameters) / cluster.ranks
    if job.offloads:
        node = moved * cluster.gpus_per_node / cluster.host_memory_bytes_per_s
        return same("update: AdamW", node, "28 P / nodes / a node's host memory bandwidth")
    return same("update: AdamW", moved / cluster.memory_bytes_per_s, "28 P / n / memory bandwidth")


def _sync(job: Job) -> Line:
    cluster, trained = job.cluster, float(job.student.trained_parameters)
    gathered, whole = _gather_whole_s(job), BF16 * trained
    if job.rollout_place is RolloutPlace.GENERATE:
        return same("weight sync", 0.0, "none: the student itself samples")
    if job.rollout_place is RolloutPlace.COLOCATED:
        to_host = 0.0 if job.offloads else whole / _host_rate(job)
        return same(
            "weight sync",
            gathered + to_host + 2 * whole / cluster.host_memory_bytes_per_s,
            f"{_GATHERED} + 2 P / host link of the first GPU (0 if offloaded) + (2 P written to a "
            "folder in memory + 2 P read by the engine's process) / a node's host memory bandwidth",
        )
    network = cluster.gpu.network_bytes_per_s * cluster.link_share
    return same(
        "weight sync",
        max(gathered, whole / network),
        f"by NCCL: max({_GATHERED}, 2 P / the network of one GPU, which sends)",
    )


_GATHERED = (
    "4 P gathered in fp32, a tensor at a time (offloaded: by all ranks of a node in host memory)"
)


def _gather_whole_s(job: Job) -> float:
    """Seconds of gathering the fp32 weights tensor by tensor, where their shards rest."""
    whole = FP32 * float(job.student.trained_parameters)
    ring = job.cluster.gather_s(whole)
    if not job.offloads:
        return ring
    return max(ring, whole * job.cluster.gpus_per_node / job.cluster.host_memory_bytes_per_s)


def _checkpoint(job: Job) -> tuple[Line, ...]:
    cluster = job.cluster
    whole = 3.0 * FP32 * job.student.trained_parameters
    copied = whole / cluster.ranks / _host_rate(job)
    if job.offloads:  # from host memory to host memory: read and written
        copied = 2 * whole / cluster.nodes / cluster.host_memory_bytes_per_s
    return (
        same(
            "checkpoint: copy to the host",
            copied,
            "12 P / n / host link; offloaded: 2 * 12 P / nodes / a node's host memory bandwidth",
        ),
        same(
            "checkpoint: write, beside the next steps",
            whole / cluster.nodes / cluster.storage_bytes_per_s,
            "12 P / nodes / a node's storage",
        ),
    )
