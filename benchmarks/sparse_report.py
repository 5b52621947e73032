"""The sparse study's file as a Markdown table and as plots."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xopd_bench.errors import BenchError
from xopd_bench.record import Line
from xopd_bench.report import number, run_key, run_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GEMM, _GEMM_FP32, _EXACT = "torch.mm", "torch.mm fp32", "exact"
_HEADER = (
    "| inputs | entropy, nat | gradient | ms | x bare GEMM | x exact | entries a row, mean (most) "
    "| rows dense / left out, % | bound | d_hidden error (cosine) | d_weight error (cosine) |\n"
    "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
_NOTES = """\
ms: median [p20, p80] of interleaved rounds, forward and backward. x bare GEMM: of one torch.mm in
the dtype of the inputs; in brackets in fp32, the honest floor of a CPU without instructions for
bf16. Inputs: the exponent s of logits -s log(rank) + N(0, 1), or `peaked`: half of the rows with
p > 0.99. Entries: of rows with a list. bound: gradient_error. Errors: relative, in the 2-norm,
against the gradients of plain torch in {truth}; `exact` shows what rounding alone costs."""

Provider = Mapping[str, Any]


class _Point(NamedTuple):
    """A sparse provider of one cell."""

    line: Line
    provider: Provider

    @property
    def error(self) -> float:
        return float(self.provider["max_error"])

    @property
    def entropy(self) -> float:
        return float(self.line["entropy_nat"])


def groups(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Cells by run, shape, dtype and rounds; of those that were measured twice the last."""
    found: dict[str, dict[str, Line]] = {}
    for line in lines:
        key = "|".join((*run_key(line), line["shape"], line["dtype"], str(line["errors"])))
        found.setdefault(key, {})[line["family"]] = line
    return {key: list(families.values()) for key, families in found.items()}


def table(lines: Sequence[Line]) -> str:
    """For each run, shape and dtype one table; "" without lines."""
    parts = []
    for cells in groups(lines).values():
        rows = [row for line in cells for row in _rows(line)]
        left_out = dict.fromkeys(line["left_out"] for line in cells if line["left_out"])
        remarks = [f"Left out: {'; '.join(left_out)}."] if left_out else []
        notes = _NOTES.format(truth=cells[0]["truth"])
        parts += [_title(cells[0]), "\n".join([_HEADER, *rows]), "\n".join([notes, *remarks])]
    return "".join(f"{part}\n\n" for part in parts).rstrip("\n") + "\n" * bool(parts)


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->` of a page.

    BenchError for a page without these marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    if begin not in old or end not in old:
        raise BenchError(f"{page} has no place for the table: {begin} and {end}")
    head, rest = old.split(begin, 1)
    tail = rest.split(end, 1)[1]
    page.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}", encoding="utf-8")


def _title(line: Line) -> str:
    return (
        f"N x D x V = {line['shape']}, {line['dtype']}, backend {line['backend']}, "
        f"{line['date'][:10]}; {run_title(line)}"
    ).partition(" (stale")[0]  # a page is about a commit, not about today's


def _rows(line: Line) -> Iterator[str]:
    family = line["family"] if "peaked" in line["family"] else f"exponent {line['family']}"
    for provider in line["providers"]:
        spread = f"[{number(provider['p20_ms'])}, {number(provider['p80_ms'])}]"
        cells = [
            family,
            f"{line['entropy_nat']:.2f}",
            _name(provider["name"]),
            f"{number(provider['median_ms'])} {spread}",
            _gemm_ratio(provider),
            _factor(provider, "x_exact") if not _is_gemm(provider) else "",
            *_figures(provider),
        ]
        yield f"| {' | '.join(cells)} |"


def _name(name: str) -> str:
    return f"bare GEMM, {name}" if name.startswith(_GEMM) else name


def _is_gemm(provider: Provider) -> bool:
    return bool(provider["name"] in (_GEMM, _GEMM_FP32))


def _gemm_ratio(provider: Provider) -> str:
    own, wide = (_factor(provider, field) for field in ("x_gemm", "x_gemm_fp32"))
    return f"{own} ({wide})" if wide else own


def _factor(provider: Provider, field: str) -> str:
    return f"{provider[field]:.2f}" if field in provider else ""


def _figures(provider: Provider) -> list[str]:
    """Lists, bound and errors; empty for a bare GEMM."""
    if "d_hidden" not in provider:
        return [""] * 5
    errors = [
        f"{provider[name]['relative']:.2g} ({provider[name]['cosine']:.6f})"
        for name in ("d_hidden", "d_weight")
    ]
    if provider["max_error"] is None:
        return ["", "", "", *errors]
    kept, most = provider["kept_mean"], provider["kept_max"]
    entries = "no list" if kept is None else f"{kept:.1f} ({most})"
    shares = [f"{100 * provider[name]:.1f}" for name in ("dense_share", "left_out_share")]
    return [entries, " / ".join(shares), f"{provider['bound']:.3g}", *errors]


def write_plots(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Three PNGs for each run, shape and dtype; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    stems: list[str] = []
    for count, cells in enumerate(groups(lines).values(), start=1):
        cells.sort(key=lambda line: -float(line["entropy_nat"]))
        about = f"{cells[0]['shape']}_{cells[0]['dtype']}_{cells[0]['device_type']}"
        stems.append(about if about not in stems else f"{about}_{count}")
        paths += _draw(cells, folder, stems[-1])
    return paths


def _draw(cells: Sequence[Line], folder: Path, stem: str) -> Iterator[Path]:
    from matplotlib import pyplot

    for kind, draw in _KINDS.items():
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8))
        draw(axes[0], axes[1], cells)
        for axis in axes:
            axis.grid(visible=True, alpha=0.3)
            axis.legend(fontsize=7)
        figure.suptitle(textwrap.fill(_title(cells[0]), 150), fontsize=8)
        figure.tight_layout()
        path = folder / f"{kind}_{stem}.png"
        figure.savefig(path, dpi=120, metadata={"Software": None})
        pyplot.close(figure)
        yield path


def _points(line: Line) -> list[_Point]:
    """Its sparse providers by threshold."""
    sparse = [x for x in line["providers"] if x["max_error"] is not None]
    return sorted((_Point(line, x) for x in sparse), key=lambda point: point.error)


def _label(line: Line) -> str:
    family = line["family"] if "peaked" in line["family"] else f"s = {line['family']}"
    return f"{family} ({line['entropy_nat']:.2g} nat)"


def _against_error(
    axis: Axes, cells: Sequence[Line], of: Callable[[_Point], float | None], style: str = "o-"
) -> None:
    """A line for each family over the threshold, which may be 0."""
    for number_of, line in enumerate(cells):
        found = [(point.error, of(point)) for point in _points(line)]
        shown = [(error, value) for error, value in found if value is not None]
        if shown:
            x, y = zip(*shown, strict=True)
            label = _label(line) if style == "o-" else None
            axis.plot(x, y, style, color=f"C{number_of}", label=label, markersize=4)
    errors = sorted({point.error for line in cells for point in _points(line)})
    axis.set_xscale("symlog", linthresh=min((error for error in errors if error), default=0.01))
    axis.set_xticks(errors, [f"{error:g}" for error in errors])
    axis.xaxis.minorticks_off()
    axis.set_xlabel("e = max_gradient_error")


def _against_entropy(
    axis: Axes, cells: Sequence[Line], of: Callable[[_Point], float | None]
) -> None:
    """For each threshold a line over the mean entropy of the power laws, stars for `peaked`."""
    points = [point for line in cells for point in _points(line)]
    for order, error in enumerate(sorted({point.error for point in points})):
        for is_peaked, style in ((False, "o-"), (True, "*")):
            found = [
                (p.entropy, of(p))
                for p in points
                if p.error == error and ("peaked" in p.line["family"]) == is_peaked
            ]
            shown = sorted((entropy, value) for entropy, value in found if value is not None)
            label = None if is_peaked else f"e = {error:g}"
            if shown:
                x, y = zip(*shown, strict=True)
                axis.plot(x, y, style, color=f"C{order}", label=label, markersize=4 + 5 * is_peaked)
    axis.set_xlabel("mean entropy of the rows, nat (stars: peaked, peaked-centred)")


def _ratio_field(cells: Sequence[Line]) -> tuple[str, str]:
    """The bare GEMM that times are shown against: the inputs' dtype, where it was measured."""
    has_own = all("x_gemm" in x for line in cells for x in line["providers"])
    return ("x_gemm", "x torch.mm") if has_own else ("x_gemm_fp32", "x torch.mm in fp32")


def _draw_kept(left: Axes, right: Axes, cells: Sequence[Line]) -> None:
    def kept(point: _Point) -> float | None:
        value: float | None = point.provider["kept_mean"]
        return value

    def dense(point: _Point) -> float:
        return 100.0 * float(point.provider["dense_share"])

    _against_error(left, cells, kept)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.set_ylabel("entries of a row with a list, mean")
    _against_entropy(right, cells, dense)
    right.set_ylabel("rows that stay dense, %")


def _draw_error(left: Axes, right: Axes, cells: Sequence[Line]) -> None:
    """Left the bound over the threshold; right the true error, d_weight dashed."""
    _against_error(left, cells, lambda point: point.provider["bound"])
    ends = sorted({point.error for line in cells for point in _points(line)})
    left.plot(ends, ends, "k:", linewidth=1, label="threshold")
    left.set_ylabel("bound that was reached (gradient_error)")
    least = min((error for error in ends if error), default=0.01)
    left.set_yscale("symlog", linthresh=least)
    _against_error(right, cells, lambda point: point.provider["d_hidden"]["relative"])
    _against_error(right, cells, lambda point: point.provider["d_weight"]["relative"], "s--")
    right.set_yscale("log")
    right.set_ylabel("true error, 2-norm: d_hidden; dashed d_weight", fontsize=8)


def _draw_time(left: Axes, right: Axes, cells: Sequence[Line]) -> None:
    """Of one bare GEMM: over the threshold with the exact loss dotted, and over the entropy."""
    field, label = _ratio_field(cells)

    def ratio(point: _Point) -> float | None:
        value: float | None = point.provider.get(field)
        return value

    _against_error(left, cells, ratio)
    for number_of, line in enumerate(cells):
        (exact,) = (x for x in line["providers"] if x["name"] == _EXACT)
        if field in exact:
            left.axhline(exact[field], color=f"C{number_of}", linestyle=":", linewidth=1)
    _against_entropy(right, cells, ratio)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.set_ylabel(f"time of forward and backward, {label}")
    left.set_title("dotted: exact", fontsize=8)


_KINDS: dict[str, Callable[[Axes, Axes, Sequence[Line]], None]] = {
    "kept": _draw_kept,
    "error": _draw_error,
    "time": _draw_time,
}
