"""The Markdown table of JSON lines: one part for each run, job, shape and dtype."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cpu.measure import Status
from benchmarks.cpu.providers import EAGER, NATIVE, OURS, REFERENCE
from benchmarks.cpu.record import CELL_FIELDS, Line

_NOTES = """\
First table: ms, and in brackets as a multiple of the bare GEMMs, in the dtype of the inputs or in
fp32, whichever are faster. A dash: did not run, see below.

Times: median [p20, p80] of one pass in ms, interleaved rounds. Bold: the fastest one whose results
are right. Bare GEMMs multiply every token, also the ignored ones: less than 1 x is what leaving
those out wins. The policy loss has advantage 1, so that F.linear_cross_entropy computes the same
gradient; it returns the loss, no log-probs of the tokens. TRL is called as its trainers do on a
CPU: on every token.

Extra memory: MB (10^6 bytes) at the peak beside inputs, both gradients and one fp32 d_weight, as
far as torch allocates it; buffers inside MKL, oneDNN and a native library are not seen.

Error: relative, against fp64, of the worst result, and in brackets its share of what is allowed
(one rounding + 1.05 x the error of plain torch for ours, + 3 x and 1e-5 for others). Verified with
all results on a fraction of the vocabulary, and at some tokens of the full problem."""
_SUMMARY_HEADER = (
    "| job | N x D x V | dtype | inputs | GEMMs | torch eager | fastest peer | ours reference "
    "| ours native | native vs peer | extra MB eager / native |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
_HEADER = (
    "| inputs | provider | ms | x GEMMs | x fp32 GEMMs | extra MB | error |\n"
    "|---|---|---|---|---|---|---|"
)
# Two lines with the same of these were made by one version on one machine.
_RUN_FIELDS = ("device", "cores", "threads", "capability", "torch", "trl", "commit", "kernel_hash")


def markdown(lines: Sequence[Line]) -> str:
    """All tables, the notes last; a cell that was measured twice counts as measured last."""
    if not lines:
        return "No cell has been measured.\n"
    latest = {tuple(str(line.get(x)) for x in (*_RUN_FIELDS, *CELL_FIELDS)): line for line in lines}
    runs: dict[str, dict[str, list[Line]]] = {}
    for line in latest.values():
        runs.setdefault(_run_title(line), {}).setdefault(_table_title(line), []).append(line)
    parts = []
    for run, tables in runs.items():
        parts.append(f"## {run}\n\n{_summary([line for x in tables.values() for line in x])}")
        for title, cells in tables.items():
            rows = "\n".join(row for cell in cells for row in _rows(cell))
            parts.append(f"### {title}\n\n{_HEADER}\n{rows}")
    return "\n\n".join([*parts, _NOTES]) + "\n"


def short_table(lines: Sequence[Line]) -> str:
    """One row for each cell, for a README: the bare GEMMs, the fastest peer, and ours."""
    rows = [
        "| job | dtype | inputs | bare GEMMs, ms | fastest peer | NATIVE | extra memory, MB |",
        "|---|---|---|---:|---|---|---:|",
    ]
    for line in lines:
        cells = [x.strip() for x in _summary_row(line).strip("| ").split(" | ")]
        job, _, dtype, inputs, gemms, _, peer, _, ours, _, memory = cells
        extra = memory.split(" / ")[-1]
        row = (job, dtype, f"{inputs} masked", gemms, peer, ours, extra)
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def fastest(outcomes: Sequence[dict[str, Any]]) -> str | None:
    """The provider with the least median among those that were right; GEMMs do not compete."""
    ranked = [x for x in outcomes if x["status"] == Status.OK.value and not x["is_floor"]]
    return min(ranked, key=lambda x: x["median_ms"], default={"provider": None})["provider"]


def _summary(lines: Sequence[Line]) -> str:
    """One row for each cell: ms, and as a multiple of the faster ones of the bare GEMMs."""
    return "\n".join([_SUMMARY_HEADER, *(_summary_row(line) for line in lines)])


def _summary_row(line: Line) -> str:
    right = {x["provider"]: x for x in line["outcomes"] if x["status"] == Status.OK.value}
    floor = min((x["median_ms"] for x in right.values() if x["is_floor"]), default=None)
    peers = [x for name, x in right.items() if not x["is_floor"] and not name.startswith(OURS)]
    peer = right.get(fastest(peers) or "")
    ours = right.get(NATIVE)

    def time(outcome: dict[str, Any] | None) -> str:
        if outcome is None:
            return "-"
        value = outcome["median_ms"]
        return _number(value) + (f" ({value / floor:.2f} x)" if floor else "")

    def extra(name: str) -> str:
        return _megabytes(right[name]["extra_bytes"]) if name in right else "-"

    cells = [
        line["job"].replace("_", " "),
        f"{line['rows']} x {line['dim']} x {line['vocab_size']}",
    ]
    cells += [line["dtype"], f"{line['distribution']}, {line['masked_percent']} %"]
    cells += ["-" if floor is None else _number(floor), time(right.get(EAGER))]
    cells.append("-" if peer is None else f"{peer['provider']}: {time(peer)}")
    cells += [time(right.get(REFERENCE)), time(ours)]
    if ours is None or peer is None:
        cells.append("-")
    else:
        cells.append(f"{peer['median_ms'] / ours['median_ms']:.2f} x")
    cells.append(f"{extra(EAGER)} / {extra(NATIVE)}")
    return f"| {' | '.join(cells)} |"


def _run_title(line: Line) -> str:
    machine = f"{line['device']}, {line['threads']} threads, {line['capability']}"
    versions = f"torch {line['torch']}, trl {line['trl']}"
    return f"{machine}; {versions}; commit {line['commit']}, kernels {line['kernel_hash']}"


def _table_title(line: Line) -> str:
    sizes = f"N {line['rows']}, D {line['dim']}, V {line['vocab_size']}"
    return f"{line['job'].replace('_', ' ')}, {sizes}, {line['dtype']}"


def _rows(line: Line) -> Iterator[str]:
    inputs = f"{line['distribution']}, {line['masked_percent']} % masked"
    best = fastest(line["outcomes"])
    for outcome in line["outcomes"]:
        name, status = outcome["provider"], outcome["status"]
        if status != Status.OK.value:
            reason = outcome["reason"].replace("|", "/")
            yield f"| {inputs} | {name} | {status}: {reason} | | | | |"
            continue
        spread = f"[{_number(outcome['p20_ms'])}, {_number(outcome['p80_ms'])}]"
        time = f"{_number(outcome['median_ms'])} {spread}"
        if name == best:
            name, time = f"**{name}**", f"**{time}**"
        cells = [inputs, name, time, _factor(outcome["of_gemms"])]
        cells += [_factor(outcome["of_fp32_gemms"]), _megabytes(outcome["extra_bytes"])]
        yield f"| {' | '.join([*cells, _error(outcome)])} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f}"


def _error(outcome: dict[str, Any]) -> str:
    if outcome["relative_error"] is None:
        return ""
    return f"{outcome['relative_error']:.1e} ({outcome['budget_used']:.2f})"
