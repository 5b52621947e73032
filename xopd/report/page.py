"""Puts the report of a run together: one HTML file that asks nothing of the network.

Every text that comes from a file is escaped, images are embedded, and the page forbids itself
scripts and requests by its own content security policy.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from xopd.report.inputs import Evaluation, RunInputs, number, read_run
from xopd.report.plots import DARK, LIGHT, Chart, learning_charts, probe_charts, task_charts
from xopd.report.samples import samples_html
from xopd.report.style import CSS

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MINUS = "\N{MINUS SIGN}"


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` and `run_dir/report/*.png`; returns the path of the page.

    Reads config.yaml, metrics.jsonl, samples.jsonl and eval/{before,after,step_*}.json. What is
    missing or unusable is named on the page. Raises ReportError where `run_dir` is no folder.
    """
    run = read_run(run_dir)
    chart_dir = run_dir / "report"
    chart_dir.mkdir(exist_ok=True)
    sections = [
        _notes_html(run.notes),
        _tiles_html(run),
        _table_html(run),
        _charts_html("By kind of question", task_charts(run) + probe_charts(run), chart_dir),
        _charts_html("Learning curves", learning_charts(run), chart_dir),
    ]
    if run.samples:
        sections.append(f"<h2>Sampled responses</h2>{samples_html(run.samples)}")
    if run.config_text is not None:
        config = f'<div class="card"><pre>{escape(run.config_text)}</pre></div>'
        sections.append(f"<h2>Configuration</h2><details><summary>config.yaml</summary>{config}")
        sections.append("</details>")
    page = run_dir / "report.html"
    partial = page.with_suffix(".html.partial")
    partial.write_text(_page_html(run, "".join(sections)), encoding="utf-8")
    os.replace(partial, page)  # a reader never sees half a page
    return page


def _page_html(run: RunInputs, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)} &ndash; X-OPD report</title><style>{CSS}</style></head><body>
<header><h1>{escape(run.name)}</h1><div class="quiet">{escape(_subtitle(run))}</div></header>
{body}
</body></html>
"""


def _subtitle(run: RunInputs) -> str:
    parts = ["Cross-modal on-policy distillation"]
    if run.metrics:
        tokens = sum(number(record, "tokens") or 0.0 for record in run.metrics)
        parts.append(f"{len(run.metrics)} steps, {tokens:,.0f} sampled tokens")
    evaluation = run.after or run.before
    if evaluation is not None:
        parts.append(f"evaluated on {evaluation.count} prompts of the {evaluation.split} split")
    return "; ".join(parts)


def _notes_html(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<div class="note card"><strong>This report is incomplete</strong><ul>{items}</ul></div>'
    )


Pick = Callable[[Evaluation], float | None]


def _speech(evaluation: Evaluation) -> float | None:
    return evaluation.speech.accuracy if evaluation.speech else None


def _text(evaluation: Evaluation) -> float | None:
    return evaluation.text.accuracy if evaluation.text else None


def _held_out(evaluation: Evaluation) -> float | None:
    return evaluation.held_out_voice.accuracy if evaluation.held_out_voice else None


def _teacher(evaluation: Evaluation) -> float | None:
    return evaluation.teacher_text.accuracy if evaluation.teacher_text else None


def _gap(evaluation: Evaluation) -> float | None:
    speech, text = _speech(evaluation), _text(evaluation)
    return None if speech is None or text is None else text - speech


def _drop_speech(evaluation: Evaluation) -> float | None:
    return evaluation.average_drop_speech


def _drop_text(evaluation: Evaluation) -> float | None:
    return evaluation.average_drop_text


def _pick(evaluation: Evaluation | None, pick: Pick) -> float | None:
    return None if evaluation is None else pick(evaluation)


def _tiles_html(run: RunInputs) -> str:
    tiles = [
        _tile("Speech accuracy", _pick(run.before, _speech), _pick(run.after, _speech), 1),
        _tile("Text accuracy", _pick(run.before, _text), _pick(run.after, _text), 1),
        _tile("Average drop, speech", *_pair(run, _drop_speech), -1),
        _tile("Average drop, text", *_pair(run, _drop_text), -1),
    ]
    shown = "".join(tile for tile in tiles if tile)
    return f'<div class="tiles">{shown}</div>' if shown else ""


def _pair(run: RunInputs, pick: Pick) -> tuple[float | None, float | None]:
    return _pick(run.before, pick), _pick(run.after, pick)


def _tile(label: str, before: float | None, after: float | None, better: int) -> str:
    if before is None or after is None:
        return ""
    return f"""<div class="tile card"><div class="quiet">{label}</div>
<div class="value"><span class="from">{_percent(before)} →</span> {_percent(after)}</div>
<div>{_delta(before, after, better)} points</div></div>"""


def _table_html(run: RunInputs) -> str:
    """Before, after and change; for the probes also the share of the skill that is left."""
    if run.before is None and run.after is None:
        return ""
    rows = [
        _row("Speech prompts (S)", *_pair(run, _speech), 1),
        _row("Text prompts (T)", *_pair(run, _text), 1),
        _row("Gap, text minus speech (T - S)", *_pair(run, _gap), -1),
        _row("Speech, held-out voices", *_pair(run, _held_out), 1),
        _row("Teacher, text prompts", *_pair(run, _teacher), 0),
        _group("Average drop against the teacher's text accuracy (lower is better)"),
        _row("Speech prompts", *_pair(run, _drop_speech), -1),
        _row("Text prompts", *_pair(run, _drop_text), -1),
    ]
    before = run.before.probes if run.before else {}
    after = run.after.probes if run.after else {}
    probes = list(dict.fromkeys([*before, *after]))
    if probes:
        rows.append(_group("Forgetting probes"))
        rows += [_row(name, before.get(name), after.get(name), 1, True) for name in probes]
    head = "".join(f"<th>{h}</th>" for h in ("", "before", "after", "change", "retention"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        '<h2>Before and after</h2><p class="quiet">Accuracy in percent, change in points.'
        f'{_uncertainty(run)}</p><div class="card scroll">{table}</div>'
    )


def _group(title: str) -> str:
    return f'<tr class="group"><th colspan="5">{escape(title)}</th></tr>'


def _row(
    label: str,
    before: float | None,
    after: float | None,
    better: int,
    has_retention: bool = False,
) -> str:
    retention = ""
    if has_retention and before and after is not None:
        retention = f"{100.0 * after / before:.0f} %"
    cells = (_percent(before), _percent(after), _delta(before, after, better), retention)
    shown = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr><th>{escape(label)}</th>{shown}</tr>"


def _uncertainty(run: RunInputs) -> str:
    evaluation = run.after or run.before
    accuracy = _pick(evaluation, _speech)
    if evaluation is None or accuracy is None or evaluation.count < 1:
        return ""
    share = accuracy / 100.0
    half_width = 196.0 * math.sqrt(max(share * (1.0 - share), 0.0) / evaluation.count)
    return (
        f" With {evaluation.count} prompts, the 95 % interval of {_percent(accuracy)} % is "
        f"±{half_width:.1f} points."
    )


def _charts_html(title: str, charts: Sequence[Chart], chart_dir: Path) -> str:
    if not charts:
        return ""
    shown = "".join(_chart_html(chart, chart_dir) for chart in charts)
    return f'<h2>{escape(title)}</h2><div class="charts">{shown}</div>'


def _chart_html(chart: Chart, chart_dir: Path) -> str:
    light, dark = chart.draw(LIGHT), chart.draw(DARK)
    (chart_dir / f"{chart.name}.png").write_bytes(light)
    caption = escape(chart.caption)
    return f"""<figure class="card"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">
<img src="{_data_uri(light)}" alt="{escape(chart.title)}. {caption}"></picture>
<figcaption>{caption}</figcaption></figure>"""


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _percent(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.1f}".replace("-", _MINUS)


def _delta(before: float | None, after: float | None, better: int) -> str:
    """The change, coloured where it is for the better or worse; better: +1 up, -1 down, 0 neither.

    A change that rounds to zero has no colour.
    """
    if before is None or after is None:
        return ""
    change = round(after - before, 1)
    text = f"{change:+.1f}".replace("-", _MINUS) if change else "0.0"
    verdict = change * better
    if verdict == 0:
        return text
    return f'<span class="{"good" if verdict > 0 else "bad"}">{text}</span>'
