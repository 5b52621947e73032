"""A plan as Markdown: what `xopd plan` prints, and what docs/scale.md holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from xopd.plan.cluster import GB, Cluster
from xopd.plan.job import Job, RolloutPlace, TeacherPlace
from xopd.plan.losses import Head
from xopd.plan.memory import RankMemory, largest_micro_batch, rank_memory
from xopd.plan.timing import StepTime, step_time

LEFT_OUT = (
    "Left out: fragmentation and library workspaces (the reserve stands for them), the audio tower "
    "at work, padding of rows of unlike length in the times, evaluation, data loading, launches, "
    "latencies, the slowest rank, what an engine needs beside weights and cache, and what its GPUs "
    "exchange."
)
SYMBOLS = (
    "n ranks; g GPUs of the one engine; N positions of a pass; T the longest row; P trained "
    "parameters, P_T the teacher's, P_l of a layer, P_head of lm_head, A of the decoder that a "
    "token meets; F frozen, F_r of them outside layers; V vocabulary, D hidden size, L layers, H "
    "heads, K of them with keys, h head size; E experts, k a token, I inner size; r bytes of the "
    "residual stream; U = 2 N V D FLOPs, one product with lm_head."
)
_HEADINGS = tuple(head.value for head in Head)


def plan_text(job: Job, *, explains: bool = False) -> str:
    """The whole plan; `explains` adds the formula of every line."""
    memory, time = rank_memory(job), step_time(job)
    most = [largest_micro_batch(job, head) for head in Head]
    parts = [
        "**Arithmetic, not a measurement.**",
        "\n".join(f"- {line}" for line in _header(job)),
        _memory_table(job, memory, most),
        _time_table(job, time, most),
        LEFT_OUT,
    ]
    if explains:
        parts.append(f"Symbols: {SYMBOLS}")
        for title, lines in (
            ("Memory", (*memory.resident, *memory.parts, *memory.stages, memory.host)),
            ("Time", (*time.stages, *time.background)),
        ):
            formulas = "\n".join(f"- {line.name}: {line.formula}" for line in lines)
            parts.append(f"{title}:\n\n{formulas}")
    return "\n\n".join(parts) + "\n"


def _header(job: Job) -> list[str]:
    student = job.student
    experts = ""
    if student.experts:
        experts = f", {student.experts_per_token} of {student.experts} experts a token"
    return [
        f"student {student.name}: {_billions(student.parameters)} parameters, "
        f"{_billions(student.trained_parameters)} of them trained, "
        f"{_billions(student.active_parameters)} active for a token; D {student.hidden}, "
        f"V {student.vocabulary}, L {student.layers}{experts}",
        _teacher_text(job),
        *_cluster_text(job.cluster),
        f"step: {job.prompts_per_step} prompts x {job.rollouts_per_prompt} rollouts x 2 "
        f"modalities; prompts of {job.speech_prompt_tokens} (speech) and {job.text_prompt_tokens} "
        f"(text) tokens, responses of up to {job.response_tokens}, {job.mean_response_tokens} on "
        "average",
        f"rank: {job.rank_rows} rollouts in {job.passes} passes of {job.pass_rows} "
        f"(N = {job.pass_tokens}), {_settings(job)}",
        _engine_text(job),
    ]


def _teacher_text(job: Job) -> str:
    where = "sharded over the ranks"
    if job.teacher_place is TeacherPlace.SERVER:
        where = f"on a server of {job.server_gpus} GPUs"
    return f"teacher {job.teacher.name}: {_billions(job.teacher.parameters)} parameters, {where}"


def _engine_text(job: Job) -> str:
    if job.rollout_place is RolloutPlace.GENERATE:
        return f"rollouts by transformers' generate, batches of {job.generate_rows}"
    where = f"on {job.engine_gpus} GPUs of the first machine, asleep while they train"
    if job.rollout_place is RolloutPlace.SERVER:
        where = f"on a server of {job.server_gpus} GPUs"
    return f"rollouts by one engine {where}: up to {job.engine_rows} rollouts at a time"


def _settings(job: Job) -> str:
    used = {
        "FSDP2": job.is_sharded,
        "activation checkpointing": job.checkpoints_activations,
        "CPU offload": job.offloads,
        "fused AdamW": job.is_adam_fused,
        "sparse gradients of lm_head": job.has_sparse_gradient,
    }
    return ", ".join(["bf16, fp32 master weights", *(name for name, on in used.items() if on)])


def _cluster_text(cluster: Cluster) -> list[str]:
    gpu = cluster.gpu
    return [
        f"cluster: {cluster.nodes} x {cluster.gpus_per_node} {gpu.name} of "
        f"{gpu.memory_bytes / GB:g} GB, {gpu.bf16_flops / 1e12:g} TFLOP/s in bf16, "
        f"{gpu.fp32_flops / 1e12:g} in fp32, memory {gpu.memory_bytes_per_s / GB:g} GB/s, node "
        f"{gpu.link_bytes_per_s / GB:g}, network {gpu.network_bytes_per_s / GB:g}, host "
        f"{gpu.host_bytes_per_s / GB:g} GB/s in one direction ({gpu.source})",
        f"assumed: {cluster.compute_share:.0%} of the FLOP/s, {cluster.memory_share:.0%} of the "
        f"memory bandwidth, {cluster.link_share:.0%} of links and network; reserve "
        f"{cluster.reserve_bytes / GB:g} GB a rank; host memory "
        f"{cluster.host_memory_bytes_per_s / GB:g} GB/s and storage "
        f"{cluster.storage_bytes_per_s / GB:g} GB/s a node",
    ]


def _memory_table(job: Job, memory: RankMemory, most: Sequence[int]) -> str:
    rows = [_row(f"stays: {line.name}", line.values, _gigabytes) for line in memory.resident]
    rows += [_row(f"update: {line.name}", line.values, _gigabytes) for line in memory.parts]
    rows += [_row(f"peak: {line.name}", line.values, _gigabytes) for line in memory.stages]
    peaks = [memory.peak_bytes(head) for head in Head]
    limit = job.cluster.gpu.memory_bytes - job.cluster.reserve_bytes
    rows.append(_row("**largest peak**", peaks, lambda x: f"**{_gigabytes(x)}**"))
    rows.append(
        _row(
            f"fits into {_gigabytes(limit)}",
            peaks,
            lambda x: "yes" if x <= limit else f"no: {_gigabytes(x - limit)} too much",
        )
    )
    rows.append(_row("largest micro-batch that fits, rollouts", most, _rollouts))
    rows.append(_row(memory.host.name, memory.host.values, _gigabytes))
    return _table("GPU memory of a rank, GB (10^9 bytes)", rows)


def _time_table(job: Job, time: StepTime, most: Sequence[int]) -> str:
    rows = [_row(line.name, line.values, _seconds) for line in time.stages]
    rows.append(_row("**step**", [time.step_s(h) for h in Head], lambda x: f"**{_seconds(x)}**"))
    largest = [
        step_time(replace(job, micro_batch=count)).step_s(head) if count else 0.0
        for head, count in zip(Head, most, strict=True)
    ]
    name = "**step** with the largest micro-batch that fits"
    rows.append(_row(name, largest, lambda x: f"**{_seconds(x)}**" if x else "does not fit"))
    rows += [_row(line.name, line.values, _seconds) for line in time.background]
    return _table("time of a step, s", rows)


def _table(title: str, rows: Iterable[str]) -> str:
    head = f"| {title} | {' | '.join(_HEADINGS)} |\n|---|{'---:|' * len(_HEADINGS)}"
    return "\n".join([head, *rows])


def _row(name: str, values: Sequence[float], shown: Callable[[float], str]) -> str:
    return f"| {name} | {' | '.join(shown(value) for value in values)} |"


def _gigabytes(size: float) -> str:
    return f"{size / GB:.2f}" if size == 0 or size >= GB / 10 else f"{size / GB:.2g}"


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _rollouts(value: float) -> str:
    return f"{value:.0f}" if value else "none"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B"
