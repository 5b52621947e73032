"""Verify, then time: interleaved rounds, median and spread, one JSON line for each provider.

Providers are timed in turns, so that a change of clock or temperature hits all alike. The JSON
line says where it comes from: device, versions, commit, date.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import xopd_kernels
from xopd_kernels.backend import Backend, unavailable_reason
from xopd_kernels.testing import Distribution


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden size and vocabulary of one measurement."""

    name: str
    rows: int
    dim: int
    vocab_size: int

    @property
    def gemm_flop(self) -> int:
        """Floating-point operations of one lm_head GEMM (U)."""
        return 2 * self.rows * self.dim * self.vocab_size


@dataclass(frozen=True)
class Provider:
    """One implementation; `run` does the measured work and returns the result to verify."""

    name: str
    run: Callable[[], Tensor | None]  # None: nothing to verify (bare GEMMs)


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    shapes: tuple[Shape, ...]
    distributions: tuple[Distribution, ...]
    device: torch.device
    dtype: torch.dtype
    rounds: int


SMOKE_SHAPES = (Shape("smoke", 256, 64, 1000),)
# The lm_heads of models that are trained with these operators.
FULL_SHAPES = tuple(
    Shape(f"{name}-{rows}", rows, dim, vocab_size)
    for name, dim, vocab_size in (
        ("qwen3-omni-30b-a3b", 2048, 152_064),
        ("qwen2.5-omni-7b", 3584, 152_064),
        ("voxtral-mini", 3072, 131_072),
    )
    for rows in (1024, 4096, 8192, 16_384)
)


def parse_options(description: str) -> Options:
    """The command line: --smoke for seconds on a CPU, otherwise the full shapes on CUDA."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; seconds on a CPU")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (smoke: 3)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.smoke:
        parser.error("the full shapes need a CUDA device; use --smoke on a CPU")
    return Options(
        shapes=SMOKE_SHAPES if arguments.smoke else FULL_SHAPES,
        distributions=tuple(Distribution),
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        rounds=3 if arguments.smoke else arguments.rounds,
    )


def our_backends(options: Options) -> list[Backend]:
    """The backends that run here; the reason for each that does not is printed."""
    chosen = []
    for backend in Backend:
        reason = unavailable_reason(backend, options.device, options.dtype)
        if reason is None:
            chosen.append(backend)
        else:
            print(json.dumps({"skipped": f"ours-{backend.value}", "reason": reason}))
    return chosen


def gemm_providers(hidden: Tensor, weight: Tensor) -> list[Provider]:
    """The bare GEMMs of a step: logits, d_hidden, d_weight, on one buffer of logits."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden @ weight.t()

    def one() -> None:
        torch.mm(hidden, weight.t(), out=logits)

    def three() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    return [Provider("torch.mm x1", one), Provider("torch.mm x3", three)]


def measure(
    benchmark: str,
    shape: Shape,
    distribution: Distribution,
    providers: Sequence[Provider],
    options: Options,
) -> None:
    """Verify every provider against the first that returns a result, time all, print JSON."""
    _verify(providers)
    times_ms: dict[str, list[float]] = {provider.name: [] for provider in providers}
    for _ in range(options.rounds):
        for provider in providers:
            times_ms[provider.name].append(_time_ms(provider, options.device))
    common = {
        "benchmark": benchmark,
        "shape": shape.name,
        "rows": shape.rows,
        "dim": shape.dim,
        "vocab_size": shape.vocab_size,
        "distribution": distribution.value,
        "dtype": str(options.dtype).removeprefix("torch."),
        **provenance(options.device),
    }
    for provider in providers:
        values = sorted(times_ms[provider.name])
        record = {
            **common,
            "provider": provider.name,
            "median_ms": round(statistics.median(values), 4),
            "p20_ms": round(quantile(values, 0.2), 4),
            "p80_ms": round(quantile(values, 0.8), 4),
            "rounds": len(values),
            "peak_extra_bytes": _peak_extra_bytes(provider, options.device),
        }
        print(json.dumps(record), flush=True)


def _verify(providers: Sequence[Provider]) -> None:
    """Run each once (this also compiles) and compare; RuntimeError if one is wrong."""
    expected: Tensor | None = None
    for provider in providers:
        result = provider.run()
        if result is None:
            continue
        result = result.detach().float()
        expected = result if expected is None else expected
        error = (result - expected).norm() / expected.norm()
        if not error < 2e-2:  # bf16's own; a wrong kernel is off by far more
            raise RuntimeError(f"{provider.name} is wrong: relative error {error.item():.2e}")


def _time_ms(provider: Provider, device: torch.device) -> float:
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        provider.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    provider.run()
    return (time.perf_counter() - start) * 1e3


def _peak_extra_bytes(provider: Provider, device: torch.device) -> int | None:
    """Device memory at its highest beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def quantile(ordered: Sequence[float], fraction: float) -> float:
    return ordered[round(fraction * (len(ordered) - 1))]


def provenance(device: torch.device) -> dict[str, str]:
    """Where and with what a number was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "torch": torch.__version__,
        "xopd_kernels": xopd_kernels.__version__,
        "commit": commit.stdout.strip() or "none",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
