"""Peak memory of a call on the CPU, from torch's own record of every allocation.

Buffers that MKL, oneDNN or a native library take from the system themselves are not seen.
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


class Peak(NamedTuple):
    """The most bytes that existed at one time."""

    total_bytes: int
    extra_bytes: int  # beside the tensors that the caller excludes


def recorded(call: Callable[[], T]) -> tuple[T, list[int]]:
    """The result, and the bytes of every allocation (> 0) and release (< 0) in order.

    Recorded in a scope that no operator of eager torch belongs to: memory alone, as the operators
    would double the time and take gigabytes.
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


def peak(sizes: Sequence[int], excluded: Mapping[int, int]) -> Peak:
    """Peak of a record; of a size in `excluded` that many tensors are not extra memory.

    An excluded tensor counts as such only while it exists, so that workspace which is released
    before the gradients are made does not hide behind them.
    """
    level = highest = highest_extra = 0
    alive: Counter[int] = Counter()
    for size in sizes:
        level += size
        alive[abs(size)] += 1 if size > 0 else -1
        # A release of memory older than the record makes a count negative.
        known = sum(size * max(0, min(alive[size], most)) for size, most in excluded.items())
        highest, highest_extra = max(highest, level), max(highest_extra, level - known)
    return Peak(highest, highest_extra)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
