"""The charts: small ones of one idea each, legible at the width of a telephone.

Each is drawn twice, for a light and for a dark page. Colours are from Okabe and Ito's palette, told
apart with every common colour vision; lines are labelled at their end instead of in a legend.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xopd.report.inputs import Evaluation, Record, RunInputs, number

_SIZE_INCHES = (4.2, 2.8)
_DPI = 200
_SMOOTH_FROM = 40  # points; a shorter line is drawn as it is
_LABEL_GAP = 0.1  # of the axes' height, between the labels of two lines


@dataclass(frozen=True)
class Theme:
    """Colours of one page background."""

    background: str
    ink: str
    faint: str
    text: str  # the text modality
    speech: str  # the speech modality
    neutral: str


LIGHT = Theme("#ffffff", "#1d2430", "#d9dee6", "#0072b2", "#d55e00", "#5b6675")
DARK = Theme("#171c24", "#e6eaf0", "#39424f", "#56b4e9", "#f0903c", "#9aa5b4")


class Line(NamedTuple):
    """One line of a chart over training steps."""

    label: str
    colour: str  # name of a Theme field
    step: Sequence[float]
    value: Sequence[float]


class Bars(NamedTuple):
    """Percentages by category before and after training, and marks to compare them with."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    mark: Mapping[str, float]  # drawn as a tick over each category; may be empty
    mark_label: str
    colour: str  # name of a Theme field


class Chart(NamedTuple):
    """One chart, ready to be drawn for any theme."""

    name: str  # file name without suffix
    title: str
    caption: str  # what it shows, for the page and as its text alternative
    draw: Callable[[Theme], bytes]


class _Curve(NamedTuple):
    name: str
    title: str
    unit: str
    caption: str
    keys: tuple[tuple[str, str, str], ...]  # label, Theme field, key of the metrics record
    scale: float = 1.0
    top: float | None = None


def _both(key: str) -> tuple[tuple[str, str, str], ...]:
    return (("text", "text", f"{key}_text"), ("speech", "speech", f"{key}_speech"))


_CURVES = (
    _Curve(
        "kl",
        "KL to the teacher",
        "nat per token",
        "Mean of student minus teacher log-probability over sampled tokens; 0 is a perfect copy.",
        _both("kl"),
    ),
    _Curve(
        "rollout_accuracy",
        "Accuracy of the rollouts",
        "percent",
        "Share of sampled training responses with the right answer.",
        _both("accuracy"),
        top=100.0,
    ),
    _Curve(
        "entropy",
        "Entropy of the student",
        "nat per token",
        "A fall to 0 means that the student has stopped exploring.",
        _both("entropy"),
    ),
    _Curve("length", "Response length", "tokens", "Mean length of a rollout.", _both("length")),
    _Curve(
        "clip_fraction",
        "Clipped tokens",
        "percent",
        "Share of tokens whose gradient the clip removes; 0 with one update per rollout batch.",
        _both("clip_fraction"),
        scale=100.0,
    ),
    _Curve(
        "finished",
        "Finished responses",
        "percent",
        "Share of rollouts that end by themselves before the length limit.",
        _both("finished"),
        scale=100.0,
        top=100.0,
    ),
    _Curve(
        "loss",
        "Loss",
        "policy loss",
        "A policy-gradient loss: it need not fall while the student learns.",
        (*_both("loss"), ("total", "neutral", "loss")),
    ),
    _Curve(
        "grad_norm",
        "Gradient norm",
        "L2 norm before clipping",
        "Global norm over all trained parameters.",
        (("", "neutral", "grad_norm"),),
    ),
    _Curve(
        "gradient_error",
        "Bound on what the gradient lacks",
        "share of the gradient",
        "Sparse gradients: the 1-norm of what was left out of the gradient of the logits, at most.",
        (("", "neutral", "gradient_error"),),
    ),
    _Curve(
        "dropped_mass", "Mass without a gradient", "share", "Mean per token.", _both("dropped_mass")
    ),
    _Curve(
        "tokens_per_s",
        "Throughput",
        "response tokens per second",
        "Sampled tokens over the wall time of the whole step.",
        (("", "neutral", "tokens_per_s"),),
    ),
    _Curve(
        "time",
        "Time of a step",
        "seconds",
        "Wall time of sampling, of the teacher and of the update.",
        (
            ("rollout", "speech", "rollout_s"),
            ("update", "text", "update_s"),
            ("teacher", "neutral", "teacher_s"),
        ),
    ),
)


def learning_charts(run: RunInputs) -> list[Chart]:
    """The curves of every metric that the run logged, and of its evaluations over steps."""
    charts = [chart for chart in [_evaluation_chart(run)] if chart is not None]
    for curve in _CURVES:
        lines = [
            line
            for label, colour, key in curve.keys
            if (line := _line(run.metrics, label, colour, key, curve.scale)) is not None
        ]
        if lines:
            charts.append(_line_chart(curve, lines))
    return charts


def task_charts(run: RunInputs) -> list[Chart]:
    """Accuracy by task family before and after, for speech and for text."""
    charts: list[Chart] = []
    for modality, title in (("speech", "Speech prompts"), ("text", "Text prompts")):
        scores = [_by_task(evaluation, modality) for evaluation in (run.before, run.after)]
        teacher = _by_task(run.after or run.before, "teacher_text")
        if any(scores):
            bars = Bars(scores[0], scores[1], teacher, "teacher on text", modality)
            caption = f"{title}: accuracy by task family; the tick is the teacher reading text."
            charts.append(_bar_chart(f"tasks_{modality}", title, caption, bars))
    return charts


def probe_charts(run: RunInputs) -> list[Chart]:
    """What the student could do with sound before training, and what is left of it."""
    before = run.before.probes if run.before else {}
    after = run.after.probes if run.after else {}
    if not before and not after:
        return []
    caption = "Questions about the sound itself, which no text of the prompt answers."
    bars = Bars(before, after, {}, "", "neutral")
    return [_bar_chart("probes", "Forgetting probes", caption, bars)]


def _by_task(evaluation: Evaluation | None, name: str) -> Mapping[str, float]:
    if evaluation is None:
        return {}
    scores = {
        "speech": evaluation.speech,
        "text": evaluation.text,
        "teacher_text": evaluation.teacher_text,
    }
    score = scores[name]
    return score.by_task if score else {}


def _line(
    metrics: Sequence[Record], label: str, colour: str, key: str, scale: float
) -> Line | None:
    points = [
        (step, value * scale)
        for record in metrics
        if (step := number(record, "step")) is not None
        and (value := number(record, key)) is not None
    ]
    if not points:
        return None
    return Line(label, colour, [step for step, _ in points], [value for _, value in points])


def _evaluation_chart(run: RunInputs) -> Chart | None:
    evaluations = [e for e in (run.before, *run.during, run.after) if e is not None]
    if len({evaluation.step for evaluation in evaluations}) < 2:
        return None
    lines: list[Line] = []
    for modality in ("text", "speech"):
        points = [
            (evaluation.step, score.accuracy)
            for evaluation in evaluations
            if (score := evaluation.text if modality == "text" else evaluation.speech)
        ]
        if points:
            steps, values = zip(*points, strict=True)
            lines.append(Line(modality, modality, steps, values))
    if not lines:
        return None
    caption = f"Accuracy on {evaluations[-1].count} prompts of the {evaluations[-1].split} split."
    curve = _Curve("accuracy", "Evaluation accuracy", "percent", caption, (), top=100.0)
    return _line_chart(curve, lines, marker="o")


def _line_chart(curve: _Curve, lines: Sequence[Line], marker: str = "") -> Chart:
    longest = max(len(line.value) for line in lines)
    window = 2 * (longest // 40) + 1 if longest >= _SMOOTH_FROM else 1  # odd: it has a middle
    note = f" Bold: mean of {window} steps." if window > 1 else ""

    def draw(theme: Theme) -> bytes:
        figure, axes = _new_axes(theme, curve.title, curve.unit)
        for line in lines:
            colour = getattr(theme, line.colour)
            if window > 1:
                axes.plot(line.step, line.value, color=colour, alpha=0.35, linewidth=0.8)
            smooth = _running_mean(line.value, window)
            axes.plot(line.step, smooth, color=colour, linewidth=1.8, marker=marker, markersize=4)
        values = [value for line in lines for value in line.value]
        if min(values) >= 0:
            axes.set_ylim(0, None if max(values) > 0 else 1)
        if curve.top is not None:
            axes.set_ylim(0, curve.top * 1.03)
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.margins(x=0.01)
        _label_ends(axes, theme, lines, window)
        return _png(figure)

    return Chart(curve.name, curve.title, curve.caption + note, draw)


def _label_ends(axes: Axes, theme: Theme, lines: Sequence[Line], window: int) -> None:
    """Writes each line's name and last value beside its end, pushed apart where they collide."""
    low, high = axes.get_ylim()
    ends = [(_running_mean(line.value, window)[-1], line) for line in lines]
    floor = -1.0
    for value, line in sorted(ends, key=lambda end: end[0]):
        height = max((value - low) / (high - low), floor + _LABEL_GAP)
        floor = height
        axes.annotate(
            f"{line.label} {_short(value)}".strip(),
            xy=(1.015, height),
            xycoords="axes fraction",
            va="center",
            fontsize=9.5,
            color=getattr(theme, line.colour),
        )


def _bar_chart(name: str, title: str, caption: str, bars: Bars) -> Chart:
    def draw(theme: Theme) -> bytes:
        figure, axes = _new_axes(theme, title, "accuracy, percent")
        full = getattr(theme, bars.colour)
        pale = _blend(full, theme.background, 0.4)
        categories = list(bars.before or bars.after)
        for shift, colour, ink, label, values in (
            (-0.2, pale, theme.ink, "before", bars.before),
            (0.2, full, theme.background, "after", bars.after),
        ):
            known = [(i, values[c]) for i, c in enumerate(categories) if c in values]
            for i, value in known:
                place = i + shift
                axes.bar(place, value, 0.37, color=colour, label=label if i == 0 else "_hidden")
                # Inside the bar, out of the way of the mark; a low bar has no room for it.
                is_low = value < 14
                axes.text(
                    place,
                    value + (2 if is_low else -2),
                    f"{value:.0f}",
                    ha="center",
                    va="bottom" if is_low else "top",
                    fontsize=9,
                    color=theme.ink if is_low else ink,
                )
        marks = [(i, bars.mark[c]) for i, c in enumerate(categories) if c in bars.mark]
        for i, (place, height) in enumerate(marks):
            span = ([place - 0.42, place + 0.42], [height, height])
            label = bars.mark_label if i == 0 else "_hidden"
            axes.plot(*span, color=theme.ink, linewidth=1.4, linestyle=(0, (2, 1)), label=label)
        axes.set_xticks(range(len(categories)), categories)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 103)
        axes.set_yticks(range(0, 101, 25))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.985),
            ncols=3,
            frameon=False,
            fontsize=9,
            labelcolor=theme.ink,
            handlelength=1.2,
            borderaxespad=0.0,
            columnspacing=1.2,
        )
        return _png(figure)

    return Chart(name, title, caption, draw)


def _blend(colour: str, background: str, share: float) -> str:
    # An opaque tint, since grid lines would show through a transparent one.
    pairs = zip(to_rgb(colour), to_rgb(background), strict=True)
    red, green, blue = (share * front + (1 - share) * back for front, back in pairs)
    return to_hex((red, green, blue))


def _new_axes(theme: Theme, title: str, unit: str) -> tuple[Figure, Axes]:
    # Figure without pyplot: no global state, no window system.
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    figure.set_facecolor(theme.background)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=theme.ink)
    axes = figure.add_subplot()
    axes.set_facecolor(theme.background)
    axes.set_ylabel(unit, fontsize=9.5, color=theme.neutral)
    axes.xaxis.label.set(fontsize=9.5, color=theme.neutral)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.neutral)
    axes.grid(axis="y", color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", labelsize=9.5, labelcolor=theme.ink, color=theme.neutral)
    axes.tick_params(axis="y", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    return figure, axes


def _running_mean(value: Sequence[float], window: int) -> list[float]:
    """Mean over `window` (odd) values around each point; fewer at the two ends."""
    half = window // 2
    means = []
    for i in range(len(value)):
        part = value[max(0, i - half) : i + half + 1]
        means.append(sum(part) / len(part))
    return means


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No metadata: the same numbers give the same file.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
