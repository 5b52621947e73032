"""Peak memory of a call, from torch's own record of every allocation.

On a CPU, buffers that MKL, oneDNN or a native library take from the system are not seen; on CUDA,
those that are not torch's.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch._C._profiler import RecordScope
from torch.autograd import profiler as autograd_profiler

T = TypeVar("T")

# The profiler would tell of each start and stop on stderr. It reads this when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
_MAX_EVENTS = 1_000_000


class Peak(NamedTuple):
    """The most bytes that existed at one time."""

    total_bytes: int
    beyond_bytes: int  # beside the gradients
    extra_bytes: int  # beside one fp32 d_weight too


def recorded(call: Callable[[], T], device: torch.device) -> tuple[T, list[int]]:
    """The result, and the bytes of every allocation (> 0) and release (< 0) in order."""
    return _recorded_cuda(call) if device.type == "cuda" else _recorded_cpu(call)


def _recorded_cpu(call: Callable[[], T]) -> tuple[T, list[int]]:
    """Recorded in a scope that no operator of eager torch belongs to.

    Memory alone, as the operators would double the time and take gigabytes.
    """
    profiler = autograd_profiler.profile(profile_memory=True)
    settings = (profiler.config(), profiler.kineto_activities)
    # Private, but the only way to name the scope; the stubs know one signature of several.
    torch.autograd._prepare_profiler(*settings)  # type: ignore[attr-defined]
    scopes = {RecordScope.STATIC_RUNTIME_OP}
    torch.autograd._enable_profiler(*settings, scopes)  # type: ignore[attr-defined,call-arg]
    try:
        result = call()
    finally:
        events = torch.autograd._disable_profiler().events()  # type: ignore[attr-defined]
    memory: list[Any] = [event for event in events if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(memory, key=lambda x: x.start_ns())]


def _recorded_cuda(call: Callable[[], T]) -> tuple[T, list[int]]:
    """The allocator's own history; sizes are as requested, not as rounded."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(context=None, max_entries=_MAX_EVENTS)
    try:
        result = call()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    signs = {"alloc": 1, "free_requested": -1}
    events = traces[torch.cuda.current_device()]
    return result, [signs[x["action"]] * x["size"] for x in events if x["action"] in signs]


def peak(
    sizes: Sequence[int], gradients: Mapping[int, int], accumulated: Mapping[int, int]
) -> Peak:
    """Peak of a record, in all and beside tensors of the sizes given, so many of each.

    A tensor counts as one of those only while it exists, so that workspace which is released before
    the gradients are made does not hide behind them.
    """
    level = highest = beyond = extra = 0
    alive: Counter[int] = Counter()

    def known(excluded: Mapping[int, int]) -> int:
        # A release of memory older than the record makes a count negative.
        return sum(size * max(0, min(alive[size], most)) for size, most in excluded.items())

    for size in sizes:
        level += size
        alive[abs(size)] += 1 if size > 0 else -1
        highest = max(highest, level)
        beyond = max(beyond, level - known(gradients))
        extra = max(extra, level - known(accumulated))
    return Peak(highest, beyond, extra)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + (
            torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
