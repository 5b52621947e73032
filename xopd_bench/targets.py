"""What we promise, beside what was measured: one table for each run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xopd_bench.cell import Job
from xopd_bench.measure import Status
from xopd_bench.providers.ours import NATIVE, TRITON
from xopd_bench.providers.plain import GEMM, GEMM_FP32
from xopd_bench.record import Line


@dataclass(frozen=True)
class Target:
    """A bound on a figure of every cell that it is about."""

    name: str
    bound: float
    is_upper: bool
    of: Callable[[Line, Sequence[Line]], float | None]  # (cell, all cells of the run)

    def is_met(self, value: float) -> bool:
        """Whether the figure is on the right side of the bound."""
        return value <= self.bound if self.is_upper else value >= self.bound


LEAST_CLASSES = 4096  # of a head that a target is about: the time of a smaller one is that of calls


def targets_table(lines: Sequence[Line]) -> str:
    """For each target the worst cell, how many met it, and how many of ours have no figure."""
    lines = [line for line in lines if _classes(line) >= LEAST_CLASSES]
    if not lines:
        return f"None: all heads of this run have fewer than {LEAST_CLASSES} classes."
    rows = ["| target | bound | worst | where | cells that meet it |", "|---|---|---:|---|---:|"]
    silent = [line for line in lines if _ours(line) is None]
    for target in _targets(lines):
        sign = "<=" if target.is_upper else ">="
        found = [(value, line) for line in lines if (value := target.of(line, lines)) is not None]
        if not found:
            rows.append(f"| {target.name} | {sign} {target.bound:g} | not measured | | |")
            continue
        choose = max if target.is_upper else min
        worst, where = choose(found, key=lambda x: x[0])
        met = sum(target.is_met(value) for value, _ in found)
        bound, place = f"{sign} {target.bound:g}", _place(where)
        rows.append(f"| {target.name} | {bound} | {worst:.3g} | {place} | {met} of {len(found)} |")
    if silent:
        cells = "; ".join(f"{_place(line)}: {_why(line)}" for line in silent)
        rows.append(f"\nOurs has no figure in {len(silent)} of {len(lines)} cells: {cells}.")
    return "\n".join(rows)


def _classes(line: Line) -> int:
    return int(line["shape"].split("x")[-1])


def _place(line: Line) -> str:
    sizes = f"{line['job'].replace('_', ' ')}, {line['shape']}, {line['dtype']}"
    return f"{sizes}, {line['distribution']}, {line['masked_percent']} %"


def _why(line: Line) -> str:
    """What became of our backend for the device."""
    outcomes = {x["provider"]: x for x in line["outcomes"]}
    found = outcomes.get(TRITON if line.get("device_type") == "cuda" else NATIVE)
    return "not listed" if found is None else f"{found['status']} ({found['reason']})"


def _targets(lines: Sequence[Line]) -> Iterator[Target]:
    is_cuda = any(line.get("device_type") == "cuda" for line in lines)
    gemms = (1.10, 1 / 0.93, 1.12, 1.10) if is_cuda else (1.15, 1.15, 1.20, 1.15)
    loss, scoring, divergence, frozen = gemms
    yield _of_gemms("G1 policy loss / three GEMMs", (Job.POLICY_LOSS,), loss)
    for peer, least in (
        ("Liger scaled CE", 1.2),
        ("TRL chunked", 1.3),
        ("verl Triton", 2.0),
        ("Liger FLCE", 3.5),
    ):
        if is_cuda:
            yield _faster_than(f"G1 {peer} / ours", peer, least)
    masked = 0.55 if is_cuda else 0.60
    yield Target("G2 half masked / unmasked", masked, True, _masked)
    yield _of_gemms("G4 scoring / one GEMM", (Job.SCORING,), scoring)
    yield _of_gemms("G5 divergence / four GEMMs", (Job.DIVERGENCE, Job.JSD), divergence)
    yield _of_gemms("G6 frozen head / two GEMMs", (Job.FROZEN_HEAD,), frozen)
    yield Target("G7 extra memory, MB", 650 if is_cuda else 64, True, _extra)
    yield Target("G8 error / what is allowed", 1.0, True, _field("budget_used"))
    yield Target("G8 bf16 gradient error / torch's", 1.05, True, _field("torch_ratio", "bfloat16"))
    yield Target("G8 log-prob error, nat", 1e-4, True, _field("logprob_error"))
    yield Target("fastest peer / ours at bf16", 1.0, False, _fastest_peer)


def _outcome(line: Line, name: str) -> dict[str, Any] | None:
    for outcome in line["outcomes"]:
        if outcome["provider"] == name and outcome["status"] == Status.OK.value:
            found: dict[str, Any] = outcome
            return found
    return None


def _ours(line: Line) -> dict[str, Any] | None:
    return _outcome(line, TRITON if line.get("device_type") == "cuda" else NATIVE)


def _of_gemms(name: str, jobs: tuple[Job, ...], bound: float) -> Target:
    def value(line: Line, _: Sequence[Line]) -> float | None:
        floors = [x for x in (_outcome(line, GEMM), _outcome(line, GEMM_FP32)) if x]
        ours = _ours(line)
        if line["masked_percent"] or Job(line["job"]) not in jobs or not floors or not ours:
            return None
        return float(ours["median_ms"] / min(x["median_ms"] for x in floors))

    return Target(name, bound, True, value)


def _faster_than(name: str, peer: str, least: float) -> Target:
    def value(line: Line, _: Sequence[Line]) -> float | None:
        theirs, ours = _outcome(line, peer), _ours(line)
        if line["masked_percent"] or line["job"] != Job.POLICY_LOSS.value or not theirs or not ours:
            return None
        return float(theirs["median_ms"] / ours["median_ms"])

    return Target(name, least, False, value)


def _masked(line: Line, lines: Sequence[Line]) -> float | None:
    """Half of the tokens masked against none, forward and backward."""
    if line["masked_percent"] != 50 or not Job(line["job"]).has_gradient:
        return None
    fields = ("job", "shape", "dtype", "distribution")
    for other in lines:
        if other["masked_percent"] == 0 and all(other[x] == line[x] for x in fields):
            ours, whole = _ours(line), _ours(other)
            return float(ours["median_ms"] / whole["median_ms"]) if ours and whole else None
    return None


def _extra(line: Line, _: Sequence[Line]) -> float | None:
    ours = _ours(line)
    return None if ours is None else ours["extra_bytes"] / 1e6


def _field(name: str, dtype: str | None = None) -> Callable[[Line, Sequence[Line]], float | None]:
    """A field of our outcome, of one dtype or of all."""

    def value(line: Line, _: Sequence[Line]) -> float | None:
        ours = _ours(line)
        if ours is None or ours.get(name) is None or dtype not in (None, line["dtype"]):
            return None
        return float(ours[name])

    return value


def _fastest_peer(line: Line, _: Sequence[Line]) -> float | None:
    ours = _ours(line)
    times = [
        x["median_ms"]
        for x in line["outcomes"]
        if x["status"] == Status.OK.value
        and not x["is_floor"]
        and not x["provider"].startswith("ours ")
    ]
    if line["dtype"] != "bfloat16" or ours is None or not times:
        return None
    return float(min(times) / ours["median_ms"])
