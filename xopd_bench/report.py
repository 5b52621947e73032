"""The Markdown report of JSON lines: for each run a summary, the targets, and every table."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from xopd_bench.measure import Status
from xopd_bench.providers.ours import NATIVE, PREFIX, REFERENCE, TRITON
from xopd_bench.providers.plain import EAGER, GEMM, GEMM_FP32
from xopd_bench.record import CELL_FIELDS, Line, kernel_hash
from xopd_bench.targets import targets_table

_NOTES = """\
Summary: ms, and in brackets as a multiple of the bare GEMMs, in the dtype of the inputs or in fp32,
whichever are faster. A dash: did not run; the tables say why.

Times: median [p20, p80] of one pass in ms, interleaved rounds. Bold: the fastest one whose results
are right. Bare GEMMs multiply every token, also the ignored ones: less than 1 x is what leaving
those out wins. The policy loss has advantage 1, so that those which only know the negative
log-likelihood compute the same gradient; they return the loss, no log-probs of the tokens.

TFLOP/s and GB/s: of the GEMMs over the tokens that count (the bare GEMMs: over all), and of every
input read and every gradient written once; in brackets as a share of the best torch.mm and the best
copy of this run.

Memory: MB (10^6 bytes) at the peak beside inputs and gradients, and in brackets beside one fp32
d_weight too, as far as torch allocates it; buffers inside MKL, oneDNN and other libraries are not
seen.

Error: relative, against fp64, of the worst result, and in brackets its share of what is allowed
(one rounding + 1.05 x the error of plain torch for ours, + 3 x and 1e-5 for others). vs torch: the
worst gradient's error as a multiple of plain torch's. Verified with all results on a fraction of
the vocabulary; at full size with the values of all tokens, d_weight of some classes and d_hidden of
some tokens (ours row by row too: tokens that are nearly certain are lost in a norm over all).

Inputs: random = normal hidden states and weights, normal logits; peaked = half of the tokens have a
target with p > 0.99, the others a broad softmax over a Zipf tail. Seeded, the same in every run on
the same kind of device. In brackets the mean entropy in nats and the share of tokens with p > 0.99,
as measured."""
_SUMMARY_HEADER = (
    "| job | N x D x V | dtype | inputs | GEMMs | torch eager | fastest peer | ours reference "
    "| ours | ours vs peer | extra MB eager / ours |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
_HEADER = (
    "| inputs | provider | ms | x GEMMs | x fp32 GEMMs | TFLOP/s | GB/s | MB | error | vs torch |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
_SHORT_HEADER = """\
| job | dtype | inputs | bare GEMMs, ms | fastest peer | {ours} | extra memory, MB |
|---|---|---|---:|---|---|---:|"""
_RUN_FIELDS = (
    *("device", "driver", "cores", "threads", "capability", "torch", "triton", "trl"),
    *("commit", "kernel_hash"),
)


def markdown(lines: Sequence[Line]) -> str:
    """All tables, the notes last."""
    if not lines:
        return "No cell has been measured.\n"
    runs: dict[str, dict[str, list[Line]]] = {}
    for line in latest(lines):
        runs.setdefault(run_title(line), {}).setdefault(_table_title(line), []).append(line)
    parts = []
    for run, tables in runs.items():
        cells = [line for table in tables.values() for line in table]
        summary = "\n".join([_SUMMARY_HEADER, *(_summary_row(line) for line in cells)])
        parts += [f"## {run}\n\n{summary}", f"### Targets\n\n{targets_table(cells)}"]
        for title, table in tables.items():
            rows = "\n".join(row for line in table for row in _rows(line))
            parts.append(f"### {title}\n\n{_HEADER}\n{rows}{_absent(table)}")
    return "\n\n".join([*parts, _NOTES]) + "\n"


def latest(lines: Sequence[Line]) -> list[Line]:
    """Of cells that one version measured on one machine more than once, the last."""
    return list(
        {(*run_key(line), *(str(line[x]) for x in CELL_FIELDS)): line for line in lines}.values()
    )


def run_key(line: Line) -> tuple[str, ...]:
    """The same for lines that one version measured on one machine."""
    return tuple(str(line.get(x)) for x in _RUN_FIELDS)


def is_stale(line: Line) -> bool:
    """Whether the kernels have changed since it was measured."""
    now = kernel_hash()  # "" where the sources are not there: then nobody can tell
    return bool(now) and line["kernel_hash"] != now


def short_report(lines: Sequence[Line]) -> str:
    """For each run its title and `short_table`."""
    runs: dict[str, list[Line]] = {}
    for line in latest(lines):
        runs.setdefault(run_title(line), []).append(line)
    return "".join(f"{title}\n\n{short_table(found)}\n\n" for title, found in runs.items())


def short_table(lines: Sequence[Line]) -> str:
    """One row for each cell, for a README: the bare GEMMs, the fastest peer, and ours.

    The sizes stand in the row where they are not the same in all.
    """
    names = {ours_name(line).removeprefix(PREFIX).upper() for line in lines}
    rows = [_SHORT_HEADER.format(ours=" or ".join(sorted(names)))]
    is_one_shape = len({line["shape"] for line in lines}) == 1
    for line in lines:
        found = _Summary.of(line)
        job = found.job if is_one_shape else f"{found.job}, {line['shape']}"
        rows.append(
            f"| {job} | {line['dtype']} | {found.inputs} masked | {found.gemms} | {found.peer} | "
            f"{found.ours} | {found.ours_extra} |"
        )
    return "\n".join(rows)


def fastest(outcomes: Sequence[dict[str, Any]]) -> str | None:
    """The provider with the least median among those that were right; GEMMs do not compete."""
    ranked = [x for x in outcomes if x["status"] == Status.OK.value and not x["is_floor"]]
    return min(ranked, key=lambda x: x["median_ms"], default={"provider": None})["provider"]


def ours_name(line: Line) -> str:
    """The backend that auto takes on the line's device."""
    return TRITON if line.get("device_type") == "cuda" else NATIVE


def right(line: Line) -> dict[str, dict[str, Any]]:
    """The outcomes with a time, by provider."""
    return {x["provider"]: x for x in line["outcomes"] if x["status"] == Status.OK.value}


def fastest_peer(line: Line) -> dict[str, Any] | None:
    """The fastest provider that is not ours."""
    peers = [x for name, x in right(line).items() if not name.startswith(PREFIX)]
    return right(line).get(fastest(peers) or "")


def floor_ms(line: Line) -> float | None:
    """The bare GEMMs, in whichever dtype they are faster."""
    return min((x["median_ms"] for x in right(line).values() if x["is_floor"]), default=None)


class _Summary(NamedTuple):
    """The figures of a cell that tell most, as they are shown."""

    job: str
    inputs: str
    gemms: str
    eager: str
    peer: str
    reference: str
    ours: str
    ratio: str
    eager_extra: str
    ours_extra: str

    @classmethod
    def of(cls, line: Line) -> "_Summary":
        """From the medians of the line."""
        measured, floor, peer = right(line), floor_ms(line), fastest_peer(line)
        ours = measured.get(ours_name(line))

        def time(outcome: dict[str, Any] | None) -> str:
            if outcome is None:
                return "-"
            value = outcome["median_ms"]
            return number(value) + (f" ({value / floor:.2f} x)" if floor else "")

        def extra(name: str) -> str:
            return _megabytes(measured[name]["extra_bytes"]) if name in measured else "-"

        ratio = "-"
        if ours is not None and peer is not None:
            ratio = f"{peer['median_ms'] / ours['median_ms']:.2f} x"
        return cls(
            line["job"].replace("_", " "),
            f"{line['distribution']}, {line['masked_percent']} %",
            "-" if floor is None else number(floor),
            time(measured.get(EAGER)),
            "-" if peer is None else f"{peer['provider']}: {time(peer)}",
            time(measured.get(REFERENCE)),
            time(ours),
            ratio,
            extra(EAGER),
            extra(ours_name(line)),
        )


def _summary_row(line: Line) -> str:
    found = _Summary.of(line)
    sizes = f"{line['rows']} x {line['dim']} x {line['vocab_size']}"
    cells = (found.job, sizes, line["dtype"], *found[1:-2])
    return f"| {' | '.join(cells)} | {found.eager_extra} / {found.ours_extra} |"


def run_title(line: Line) -> str:
    """Machine, versions and commit; says if the kernels have changed since."""
    parts = [line["device"], f"{line['threads']} threads", line["capability"]]
    if line.get("driver"):
        parts.append(f"driver {line['driver']}")
    versions = [f"{x} {line[x]}" for x in ("torch", "triton", "trl") if line.get(x)]
    stale = " (stale: the kernels have changed since)" if is_stale(line) else ""
    return (
        f"{', '.join(parts)}; {', '.join(versions)}; commit {line['commit']}, kernels "
        f"{line['kernel_hash']}{stale}"
    )


def _table_title(line: Line) -> str:
    sizes = f"N {line['rows']}, D {line['dim']}, V {line['vocab_size']}"
    return f"{line['job'].replace('_', ' ')}, {sizes}, {line['dtype']}"


def _absent(table: Sequence[Line]) -> str:
    """Who could not run at all, by reason."""
    reasons: dict[str, dict[str, None]] = {}
    for outcome in (x for line in table for x in line["outcomes"]):
        if outcome["status"] == Status.ABSENT.value:
            version = f" {outcome['version']}" if outcome.get("version") else ""
            reasons.setdefault(outcome["reason"], {})[f"{outcome['provider']}{version}"] = None
    found = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return f"\n\nAbsent: {'; '.join(found)}." if found else ""


def _rows(line: Line) -> Iterator[str]:
    inputs = f"{line['distribution']}, {line['masked_percent']} % masked"
    if "entropy_nat" in line:
        inputs += f" ({line['entropy_nat']:.2g} nat, {line['certain_share']:.0%})"
    best, medians = fastest(line["outcomes"]), {x: y["median_ms"] for x, y in right(line).items()}
    floor, floor_fp32 = medians.get(GEMM), medians.get(GEMM_FP32, medians.get(GEMM))
    for outcome in line["outcomes"]:
        if outcome["status"] == Status.ABSENT.value:
            continue  # below the table
        version = outcome.get("version", "")
        name, status = outcome["provider"], outcome["status"]
        shown = f"{name} ({version})" if version and not name.startswith("torch.mm") else name
        if status != Status.OK.value:
            reason = outcome["reason"].replace("|", "/")
            if outcome.get("relative_error") is not None:
                reason += f"; relative error {outcome['relative_error']:.1e}"
            yield f"| {inputs} | {shown} | {status}: {reason} |" + " |" * 7
            continue
        spread = f"[{number(outcome['p20_ms'])}, {number(outcome['p80_ms'])}]"
        time = f"{number(outcome['median_ms'])} {spread}"
        if name == best:
            shown, time = f"**{shown}**", f"**{time}**"
        cells = [inputs, shown, time]
        cells += [_factor(outcome["median_ms"] / x) if x else "" for x in (floor, floor_fp32)]
        cells.append(_rate(outcome.get("tflop_s"), line.get("gemm_tflop_s")))
        cells.append(_rate(outcome.get("gb_s"), line.get("copy_gb_s")))
        cells += [_memory(outcome), _error(outcome), _factor(outcome.get("torch_ratio"))]
        yield f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three digits, and whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _rate(value: float | None, ceiling: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" + (f" ({value / ceiling:.0%})" if ceiling else "")


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f}"


def _memory(outcome: dict[str, Any]) -> str:
    """Beside inputs and gradients, and beside an fp32 d_weight where that is less."""
    extra = _megabytes(outcome["extra_bytes"])
    beyond = _megabytes(outcome.get("beyond_bytes"))
    return f"{beyond} ({extra})" if beyond and beyond != extra else extra


def _error(outcome: dict[str, Any]) -> str:
    if outcome["relative_error"] is None:
        return ""
    return f"{outcome['relative_error']:.1e} ({outcome['budget_used']:.2f})"
