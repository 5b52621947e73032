"""PNGs of JSON lines: time against N, memory against N, and the roofline."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from xopd_bench.cell import Cell, Job, Shape
from xopd_bench.measure import Status
from xopd_bench.providers.ours import PREFIX
from xopd_bench.record import Line
from xopd_bench.report import latest, number, right, run_key, run_title
from xopd_kernels.testing import Distribution

# Who is drawn, in the order of the colors; ours in those that stand out.
NAMES = (
    *("ours native", "ours reference", "ours triton", "torch.mm", "torch.mm fp32", "torch eager"),
    *("torch eager, fp32 inside", "torch.compile", "F.linear_cross_entropy"),
    *("F.linear_cross_entropy chunked", "TRL chunked", "Liger FLCE", "Liger scaled CE"),
    *("Liger GRPO chunked", "Liger FLJSD", "Liger JSD chunked", "verl Triton", "verl chunked"),
    *("CCE", "CCE exact", "QuACK", "FLA"),
)
_COLORS = [to_hex(color) for name in ("tab20", "tab20b") for color in colormaps[name](range(20))]
_MARKERS = "os^vDPX*<"


class Look(NamedTuple):
    """How a provider is drawn, in every panel the same."""

    color: str
    marker: str
    is_ours: bool


def write_plots(lines: Sequence[Line], folder: Path) -> list[Path]:
    """One PNG for each kind, run, head, dtype and distribution; returns their paths.

    Cells without masked tokens, because those with them are other problems.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Line]] = {}
    runs: dict[tuple[str, ...], int] = {}
    looks = _looks(lines)
    for line in latest(lines):
        if line["masked_percent"] == 0:
            run = runs.setdefault(run_key(line), len(runs) + 1)
            head = f"{line['dim']}x{line['vocab_size']}"
            about = (f"run{run}", line["commit"], head, line["dtype"], line["distribution"])
            groups.setdefault("_".join(about), []).append(line)
    paths = []
    for stem, group in groups.items():
        paths += list(_against_rows(group, looks, folder, stem))
        paths.append(_roofline(group, looks, folder / f"roofline_{stem}.png"))
    return paths


def _looks(lines: Sequence[Line]) -> dict[str, Look]:
    """A look for each provider: the same in every plot, whoever else is in it."""
    names = dict.fromkeys(x["provider"] for line in lines for x in line["outcomes"])
    known = {name: i for i, name in enumerate((*NAMES, *(x for x in names if x not in NAMES)))}
    return {
        name: Look(
            _COLORS[known[name] % len(_COLORS)],
            _MARKERS[known[name] % len(_MARKERS)],
            name.startswith(PREFIX),
        )
        for name in names
    }


def _against_rows(
    lines: Sequence[Line], looks: Mapping[str, Look], folder: Path, stem: str
) -> Iterator[Path]:
    """Time and memory of every provider against N, or as bars where there is one N; by job."""
    kinds = {
        "time": ("median_ms", 1.0, "ms, median"),
        "memory": ("extra_bytes", 1e-6, "MB beyond inputs, gradients, one fp32 d_weight"),
    }
    jobs = sorted({line["job"] for line in lines}, key=[x.value for x in Job].index)
    draw = _draw_lines if len({line["rows"] for line in lines}) > 1 else _draw_bars
    for kind, (field, factor, label) in kinds.items():
        figure, axes = pyplot.subplots(1, len(jobs), figsize=(5.5 * len(jobs), 5.5), squeeze=False)
        for axis, job in zip(axes[0], jobs, strict=True):
            of_job = sorted((x for x in lines if x["job"] == job), key=lambda x: x["rows"])
            draw(axis, of_job, looks, Quantity(field, factor, label))
            axis.set_title(job.replace("_", " "))
            place = axis.transAxes
            axis.text(0.0, -0.14, _too_large(of_job), transform=place, fontsize=7, va="top")
        path = folder / f"{kind}_{stem}.png"
        figure.suptitle(textwrap.fill(_title(lines[0]), 70 * len(jobs)), fontsize=9)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        yield path


def _title(line: Line) -> str:
    sizes = f"D {line['dim']}, V {line['vocab_size']}, {line['dtype']}, {line['distribution']}"
    return f"{sizes}, 0 % masked; {run_title(line)}"


def _too_large(lines: Sequence[Line]) -> str:
    """Who ran out of memory, and from how many tokens on."""
    least: dict[str, int] = {}
    for line in lines:
        for outcome in line["outcomes"]:
            if outcome["status"] == Status.TOO_LARGE.value:
                name = outcome["provider"]
                least[name] = min(line["rows"], least.get(name, line["rows"]))
    if not least:
        return ""
    found = ", ".join(f"{name} (N {rows:,})" for name, rows in least.items())
    return textwrap.fill(f"does not fit: {found}", 90)


class Quantity(NamedTuple):
    """What is drawn: a field of an outcome, in the unit of the label."""

    field: str
    factor: float
    label: str

    @property
    def scale(self) -> str:
        """Times are never 0; memory beside the gradients may be."""
        return "log" if self.field == "median_ms" else "symlog"

    def of(self, outcome: Mapping[str, Any]) -> float | None:
        """The value; None where it was not measured."""
        value = outcome[self.field]
        return None if value is None else value * self.factor


def _draw_lines(
    axis: Axes, lines: Sequence[Line], looks: Mapping[str, Look], quantity: Quantity
) -> None:
    for name, look in looks.items():
        measured = [(x["rows"], quantity.of(right(x)[name])) for x in lines if name in right(x)]
        points = [(rows, value) for rows, value in measured if value is not None]
        if points:
            width = 2.5 if look.is_ours else 1.2
            x, y = zip(*points, strict=True)
            axis.plot(x, y, label=name, color=look.color, marker=look.marker, linewidth=width)
    axis.set_xscale("log", base=2)
    axis.set_yscale(quantity.scale)
    axis.set_xlabel("N, tokens")
    axis.set_ylabel(quantity.label, fontsize=8)
    axis.grid(visible=True, alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=7)


def _draw_bars(
    axis: Axes, lines: Sequence[Line], looks: Mapping[str, Look], quantity: Quantity
) -> None:
    """The first provider on top, each with its value."""
    (line,) = lines
    measured = [(name, quantity.of(outcome)) for name, outcome in right(line).items()]
    shown = [(name, value) for name, value in reversed(measured) if value is not None]
    names, values = [name for name, _ in shown], [value for _, value in shown]
    colors = [looks[name].color for name in names]
    bars = axis.barh(names, values, color=colors)
    axis.bar_label(bars, [number(value) for value in values], padding=2, fontsize=7)
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if looks[name].is_ours else "normal")
    axis.set_xlabel(f"{quantity.label}; N = {line['rows']:,}", fontsize=8)
    axis.margins(x=0.15)
    axis.grid(visible=True, axis="x", alpha=0.3)


def _roofline(lines: Sequence[Line], looks: Mapping[str, Look], path: Path) -> Path:
    """Operations a second against operations a byte, under what this run's device can do."""
    figure, axis = pyplot.subplots(figsize=(8, 5.5))
    top, rate = (max(x.get(name, 0.0) for x in lines) for name in ("gemm_tflop_s", "copy_gb_s"))
    cells = [_cell(line) for line in lines]
    intensities = [cell.least_flop / cell.least_bytes for cell in cells]
    if top and rate:
        ends = [min(intensities) / 4, max(intensities) * 4]
        middle = [x for x in (top * 1e3 / rate,) if ends[0] < x < ends[1]]
        grid = sorted(ends + middle)
        bound = [min(top * 1e3, x * rate) for x in grid]
        label = f"torch.mm {number(top * 1e3)} GFLOP/s, copy {rate:.3g} GB/s"
        axis.plot(grid, bound, "k-", label=label)
    for name, look in looks.items():
        points = [
            (intensity, _gflop_s(cell, right(line)[name]))
            for line, cell, intensity in zip(lines, cells, intensities, strict=True)
            if name in right(line)
        ]
        if points:
            x, y = zip(*points, strict=True)
            size = 60 if look.is_ours else 25
            axis.scatter(x, y, s=size, color=look.color, marker=look.marker, label=name)
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte, least", ylabel="GFLOP/s")
    axis.set_title(textwrap.fill(_title(lines[0]), 100), fontsize=8)
    axis.grid(visible=True, which="both", alpha=0.3)
    if axis.has_data():
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _gflop_s(cell: Cell, outcome: Mapping[str, Any]) -> float:
    """Of the GEMMs over the tokens that count; the bare GEMMs multiply all."""
    flop = cell.all_flop if outcome["is_floor"] else cell.least_flop
    return float(flop / outcome["median_ms"] * 1e-6)


def _cell(line: Line) -> Cell:
    import torch

    return Cell(
        Shape(line["rows"], line["dim"], line["vocab_size"]),
        getattr(torch, line["dtype"]),
        Job(line["job"]),
        Distribution(line["distribution"]),
        line["masked_percent"],
    )
