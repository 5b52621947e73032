"""Runs with exact and with sparse gradients side by side: table, verdicts, curves with bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.sparse_report import put_into
from xopd_bench.record import Line
from xopd_bench.report import number, run_title

__all__ = ["put_into", "table", "verdicts", "write_plot"]

_EXACT = "exact"
_FIGURES = {
    "kl_speech": "KL, speech, nat",
    "kl_text": "KL, text, nat",
    "accuracy_speech": "speech, % correct",
    "accuracy_text": "text, % correct",
    "accuracy_held_out_voice": "held-out voices, % correct",
}
_PANELS = {
    "kl_speech": "KL to the teacher, speech, nat a token",
    "kl_text": "KL to the teacher, text, nat a token",
    "gradient_error": "bound that was reached (gradient_error)",
    "dropped_mass_speech": "probability without a gradient, speech",
}


def _groups(lines: Sequence[Line]) -> dict[str, dict[int, Line]]:
    """The runs of each gradient by seed; exact first, and of those made twice the last."""
    found: dict[str, dict[int, Line]] = {}
    for line in sorted(lines, key=lambda x: -1.0 if x["max_error"] is None else x["max_error"]):
        found.setdefault(line["gradient"], {})[line["seed"]] = line
    return found


def _steps(lines: Sequence[Line]) -> str:
    """What the runs are, for titles; runs of several lengths are not one study."""
    counts = sorted({line["steps"] for line in lines})
    shown = " and ".join(str(count) for count in counts)
    seeds = sorted({line["seed"] for line in lines})
    title = run_title(lines[0]).partition(" (stale")[0]
    return f"{shown} steps, seeds {', '.join(map(str, seeds))}, {lines[0]['date'][:10]}; {title}"


def table(lines: Sequence[Line]) -> str:
    """One row for each gradient: mean ± sample standard deviation over seeds; "" without lines."""
    if not lines:
        return ""
    names = [name for name in _FIGURES if any(name in line["figures"] for line in lines)]
    rows = [
        f"| gradient | seeds | {' | '.join(_FIGURES[name] for name in names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for gradient, runs in (_before(lines) | _groups(lines)).items():
        values = [[run["figures"].get(name) for run in runs.values()] for name in names]
        cells = [_shown([x for x in column if x is not None]) for column in values]
        rows.append(f"| {gradient} | {len(runs)} | {' | '.join(cells)} |")
    note = "KL: mean of the last tenth of the steps. ± is over seeds."
    return f"{_steps(lines)}\n\n" + "\n".join(rows) + f"\n\n{note}\n"


def _before(lines: Sequence[Line]) -> dict[str, dict[int, Line]]:
    """What the runs of each seed start from, whatever their gradient."""
    found: dict[int, Line] = {}
    for line in lines:
        figures = {
            f"accuracy_{name.removeprefix('before_')}": value
            for name, value in line["figures"].items()
            if name.startswith("before_")
        }
        if figures:
            found[line["seed"]] = {"figures": figures}
    return {"before training": found} if found else {}


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {number(stdev(values))}" if len(values) > 1 else ""
    return f"{number(fmean(values))}{spread}"


def verdicts(lines: Sequence[Line]) -> str:
    """For each gradient and figure: the difference to exact at the same seeds, and the spread."""
    groups = _groups(lines)
    exact = groups.pop(_EXACT, {})
    found = []
    for gradient, runs in groups.items():
        seeds = sorted(exact.keys() & runs.keys())
        for name, label in _FIGURES.items():
            if not seeds:
                continue
            if any(name not in side[seed]["figures"] for side in (exact, runs) for seed in seeds):
                continue
            before = [exact[seed]["figures"][name] for seed in seeds]
            after = [runs[seed]["figures"][name] for seed in seeds]
            difference = fmean(after) - fmean(before)
            found.append(f"- {gradient}, {label}: {_verdict(difference, before)}\n")
    return "".join(found)


def _verdict(difference: float, exact: Sequence[float]) -> str:
    if len(exact) < 2:
        return f"{difference:+.3g} to exact; one seed has no spread"
    spread = stdev(exact)
    place = "within" if abs(difference) <= spread else "outside"
    return f"{difference:+.3g} to exact, {place} the seeds' spread of {spread:.3g}"


def write_plot(lines: Sequence[Line], folder: Path) -> Path:
    """training.png: means over seeds with bands from the least to the most; returns its path."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8))
    for axis, (name, label) in zip(axes.flat, _PANELS.items(), strict=True):
        for order, (gradient, runs) in enumerate(_groups(lines).items()):
            curves = [run["curve"][name] for run in runs.values() if name in run["curve"]]
            if not curves:
                continue
            columns = list(zip(*curves, strict=False))  # as far as the shortest goes
            steps = range(1, len(columns) + 1)
            color = f"C{order}"
            axis.plot(steps, [fmean(x) for x in columns], color=color, label=gradient)
            bands = [min(x) for x in columns], [max(x) for x in columns]
            axis.fill_between(steps, *bands, color=color, alpha=0.2, linewidth=0)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(visible=True, alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(f"mean and range over seeds; {_steps(lines)}", fontsize=8, wrap=True)
    figure.tight_layout()
    path = folder / "training.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path
