"""``xopd plan``: what fits, and how long a step takes, before a cluster is rented."""

from __future__ import annotations

import argparse
from typing import Any

from xopd.plan.cluster import GB, GPUS, Cluster, Gpu
from xopd.plan.job import Job, RolloutPlace, TeacherPlace

_DESCRIPTION = """\
Memory of a rank and time of a step, by stated formulas, with naive logits, with chunks as Liger's,
and with our kernels. Nothing is measured and no weight is read: a model is a config.json.

The GPUs' figures are those of their data sheets; every one can be overridden. The shares of them
that a run reaches are assumptions: set those that your machines reach."""
_EPILOG = """\
examples:
  xopd plan qwen3_omni_30b_a3b_thinker --gpu h100 --gpus-per-node 8
  xopd plan runs/demo/student --teacher TEACHER --nodes 2 --offload --explain
"""
_TFLOPS = 1e12


def add_plan_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xopd plan``."""
    parser = commands.add_parser(
        "plan",
        help="memory per rank and time per stage on a cluster, by arithmetic",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="student: folder, config.json, hub id, or preset qwen3_omni_30b_a3b_thinker"
    )
    parser.add_argument("--teacher", help="as MODEL (default: the student's language model)")
    parser.add_argument("--vocabulary", type=int, metavar="V", help="default: the model's")
    parser.add_argument("--explain", action="store_true", help="the formula of every line")
    _add_cluster(parser.add_argument_group("cluster"))
    _add_batch(parser.add_argument_group("batch"))
    _add_placement(parser.add_argument_group("placement"))
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan of a parsed command line."""
    from xopd.plan.table import plan_text

    print(plan_text(job_of(args), explains=args.explain), end="")
    return 0


def job_of(args: argparse.Namespace) -> Job:
    """The job of a parsed command line; reads the models' configurations."""
    from xopd.plan.shape import model_shape

    student = model_shape(args.model)
    teacher = student.text_only() if args.teacher is None else model_shape(args.teacher)
    if args.vocabulary is not None:
        student = student.with_vocabulary(args.vocabulary)
        teacher = teacher.with_vocabulary(args.vocabulary)
    recomputes = args.recompute_old
    mean = args.mean_response
    return Job(
        student,
        teacher,
        cluster_of(args),
        prompts_per_step=args.prompts,
        rollouts_per_prompt=args.rollouts,
        micro_batch=args.micro_batch,
        kept_clips=args.kept_clips,
        speech_prompt_tokens=args.speech_prompt,
        text_prompt_tokens=args.text_prompt,
        response_tokens=args.response,
        mean_response_tokens=-(-args.response // 2) if mean is None else mean,
        recomputes_old=student.experts > 0 if recomputes is None else recomputes,
        checkpoints_activations=args.checkpoint_activations,
        offloads=args.offload,
        has_sparse_gradient=args.sparse_gradient,
        is_adam_fused=args.fused_adamw,
        teacher_place=TeacherPlace(args.teacher_on),
        rollout_place=RolloutPlace(args.rollouts_on),
        engine_gpus=args.engine_gpus,
        engine_rows=args.engine_rows,
        generate_rows=args.generate_rows,
        server_gpus=args.server_gpus,
    )


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The cluster of a parsed command line: a data sheet, and what overrides it."""
    return Cluster(
        _gpu(args),
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        compute_share=args.compute_share,
        memory_share=args.memory_share,
        link_share=args.link_share,
        reserve_bytes=args.reserve_gb * GB,
        host_memory_bytes_per_s=args.host_memory_gbs * GB,
        storage_bytes_per_s=args.storage_gbs * GB,
    )


# Field of Gpu: its option, its unit, what it is.
_OVERRIDES = (
    ("memory_bytes", "--gpu-memory-gb", GB, "memory of a GPU, GB"),
    ("bf16_flops", "--bf16-tflops", _TFLOPS, "dense TFLOP/s in bf16"),
    ("fp32_flops", "--fp32-tflops", _TFLOPS, "TFLOP/s in fp32 without tensor cores"),
    ("memory_bytes_per_s", "--memory-gbs", GB, "memory bandwidth, GB/s"),
    ("link_bytes_per_s", "--link-gbs", GB, "within a node, one direction, GB/s a GPU"),
    ("network_bytes_per_s", "--network-gbs", GB, "between nodes, one direction, GB/s a GPU"),
    ("host_bytes_per_s", "--host-gbs", GB, "to host memory, one direction, GB/s a GPU"),
)


def _gpu(args: argparse.Namespace) -> Gpu:
    gpu = GPUS[args.gpu]
    given: dict[str, Any] = {field: getattr(args, field) for field, *_ in _OVERRIDES}
    changed = {
        field: given[field] * unit for field, _, unit, _ in _OVERRIDES if given[field] is not None
    }
    if not changed:
        return gpu
    names = ", ".join(option for field, option, *_ in _OVERRIDES if field in changed)
    return gpu._replace(**changed, source=f"{gpu.source}; changed by {names}")


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="default: %(default)s")
    group.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    group.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    for field, option, _, meaning in _OVERRIDES:
        group.add_argument(
            option, dest=field, type=_positive, metavar="X", help=f"{meaning}; default: data sheet"
        )
    standard = Cluster(GPUS["h100"])
    for option, default, meaning in (
        ("--compute-share", standard.compute_share, "share of the FLOP/s that a run reaches"),
        ("--memory-share", standard.memory_share, "share of the memory bandwidth"),
        ("--link-share", standard.link_share, "share of links and network"),
        ("--reserve-gb", standard.reserve_bytes / GB, "kept free on each GPU, GB"),
        ("--host-memory-gbs", standard.host_memory_bytes_per_s / GB, "host memory, GB/s a node"),
        ("--storage-gbs", standard.storage_bytes_per_s / GB, "checkpoint storage, GB/s a node"),
    ):
        group.add_argument(
            option, type=_positive, default=default, metavar="X", help=f"{meaning}; %(default)g"
        )


def _add_batch(group: argparse._ArgumentGroup) -> None:
    for option, default, meaning in (
        ("--prompts", Job.prompts_per_step, "prompts of a step"),
        ("--rollouts", Job.rollouts_per_prompt, "rollouts of a prompt and modality"),
        ("--micro-batch", Job.micro_batch, "rollouts of a forward and backward pass"),
        ("--kept-clips", Job.kept_clips, "clips whose embeddings stay on each GPU"),
        ("--speech-prompt", Job.speech_prompt_tokens, "tokens of a spoken prompt"),
        ("--text-prompt", Job.text_prompt_tokens, "tokens of a written prompt"),
        ("--response", Job.response_tokens, "tokens of the longest response"),
    ):
        group.add_argument(
            option, type=int, default=default, metavar="N", help=f"{meaning}; %(default)s"
        )
    group.add_argument(
        "--mean-response", type=int, metavar="N", help="tokens of a response; half the longest"
    )


def _add_placement(group: argparse._ArgumentGroup) -> None:
    flag = argparse.BooleanOptionalAction
    group.add_argument(
        "--checkpoint-activations", action=flag, default=True, help="recompute layers"
    )
    group.add_argument("--offload", action="store_true", help="weights and moments on the host")
    group.add_argument(
        "--sparse-gradient", action="store_true", help="loss.max_gradient_error is a number"
    )
    group.add_argument("--fused-adamw", action="store_true", help="in place of torch's default")
    group.add_argument(
        "--recompute-old", action=flag, help="old log-probs by the trainer; on for experts"
    )
    group.add_argument(
        "--teacher-on",
        choices=[place.value for place in TeacherPlace],
        default=TeacherPlace.LOCAL.value,
        help="sharded over the ranks, or GPUs of its own; default: %(default)s",
    )
    group.add_argument(
        "--rollouts-on",
        choices=[place.value for place in RolloutPlace],
        default=RolloutPlace.COLOCATED.value,
        help="the trained model itself; one engine beside it, on GPUs of the first machine; or one "
        "on GPUs of its own (data-parallel engines are not there yet); default: %(default)s",
    )
    for option, default_gpus, meaning in (
        ("--engine-gpus", Job.engine_gpus, "GPUs of the one engine beside the trainer"),
        ("--engine-rows", Job.engine_rows, "rollouts that the engine decodes at a time"),
        ("--generate-rows", Job.generate_rows, "rollouts of a batch of generate"),
        ("--server-gpus", Job.server_gpus, "GPUs of a server"),
    ):
        group.add_argument(
            option, type=int, default=default_gpus, metavar="N", help=f"{meaning}; %(default)s"
        )


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value
