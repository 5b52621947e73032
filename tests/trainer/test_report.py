"""xopd.report: complete, self-contained, escaped, and useful for a run that broke."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from xopd.report import write_report
from xopd.report.inputs import ReportError, RunInputs, read_run
from xopd.report.page import _delta
from xopd.report.plots import LIGHT, Line, _label_ends, _new_axes, _running_mean, learning_charts
from xopd.report.samples import samples_html

EVIL = "<script>alert(1)</script>\"'&"
TASKS = ("calc", "sort")


def evaluation(step: int, speech: float, text: float, drop: float) -> dict[str, object]:
    def score(accuracy: float) -> dict[str, object]:
        return {"accuracy": accuracy, "by_task": dict.fromkeys(TASKS, accuracy)}

    return {
        "step": step,
        "split": "test",
        "count": 400,
        "speech": score(speech),
        "text": score(text),
        "held_out_voice": score(speech - 5),
        "teacher_text": score(98.5),
        "probes": {"speaker": 80.0 - step, "transcribe": 91.0},
        "average_drop_speech": drop,
        "average_drop_text": 2.5,
    }


def sample(**changes: object) -> dict[str, object]:
    record: dict[str, object] = {
        "step": 0,
        "prompt_id": "p",
        "modality": "speech",
        "task": "calc",
        "prompt": "what is two add two",
        "token": ["so", "five"],
        "advantage": [0.9, -7.0],
        "logprob": [-1.0, -0.1],
        "teacher_logprob": [-0.1, -7.1],
        "reference": "four",
        "response": "so five",
        "is_correct": False,
    }
    return record | changes


def write_run(directory: Path, metrics: list[dict[str, object]]) -> Path:
    (directory / "eval").mkdir(parents=True)
    (directory / "config.yaml").write_text("loss:\n  text_weight: 0.5\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    before, after = evaluation(0, 62.5, 90.0, 35.2), evaluation(8, 85.25, 89.0, 12.5)
    (directory / "eval" / "before.json").write_text(json.dumps(before))
    (directory / "eval" / "after.json").write_text(json.dumps(after))
    (directory / "samples.jsonl").write_text(json.dumps(sample()) + "\n")
    return directory


def metric_records(count: int) -> list[dict[str, object]]:
    return [
        {"step": i, "kl_text": 0.1, "kl_speech": 0.5 / (i + 1), "grad_norm": 1.0, "tokens": 1000}
        for i in range(count)
    ]


class _Tags(HTMLParser):
    """Collects addresses and checks that tags are balanced."""

    VOID = ("meta", "img", "source")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: Path) -> _Tags:
    tags = _Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    tags.close()
    assert tags.open == []
    return tags


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "run", metric_records(8)))


def test_the_page_asks_nothing_of_the_network(page: Path) -> None:
    tags = parse(page)
    assert len(tags.addresses) == 2 * 6  # light and dark of six charts
    assert all(address.startswith("data:image/png;base64,") for address in tags.addresses)
    assert not tags.names & {"script", "link", "iframe", "object"}
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_holds_the_headline_numbers(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    def cells(label: str) -> list[str]:
        match = re.search(rf"<tr><th>{re.escape(label)}</th>(.*?)</tr>", text)
        assert match is not None
        return [re.sub("<.*?>", "", cell) for cell in match[1].split("</td>")[:-1]]

    assert cells("Speech prompts (S)") == ["62.5", "85.2", "+22.8", ""]
    assert cells("Text prompts (T)") == ["90.0", "89.0", "\N{MINUS SIGN}1.0", ""]
    assert cells("Gap, text minus speech (T - S)")[:2] == ["27.5", "3.8"]
    assert cells("Speech, held-out voices")[0] == "57.5"
    assert cells("Teacher, text prompts")[0] == "98.5"
    assert cells("speaker") == ["80.0", "72.0", "\N{MINUS SIGN}8.0", "90 %"]
    assert cells("transcribe") == ["91.0", "91.0", "0.0", "100 %"]
    assert "8 steps, 8,000 sampled tokens" in text
    assert "95 % interval of 85.2 % is ±3.5 points" in text
    assert "text_weight: 0.5" in text
    assert "incomplete" not in text


def test_the_charts_lie_beside_the_page(page: Path) -> None:
    charts = {path.stem: path.read_bytes() for path in (page.parent / "report").iterdir()}
    assert set(charts) == {"accuracy", "kl", "grad_norm", "tasks_speech", "tasks_text", "probes"}
    assert all(png.startswith(b"\x89PNG\r\n\x1a\n") for png in charts.values())


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run", [])
    (run / "config.yaml").write_text(EVIL)
    texts = dict.fromkeys(("modality", "task", "prompt", "reference"), EVIL)
    (run / "samples.jsonl").write_text(json.dumps(sample(token=[EVIL, "x"], **texts)) + "\n")
    record = evaluation(0, 1.0, 1.0, 1.0) | {"split": EVIL, "probes": {EVIL: 1.0}}
    (run / "eval" / "after.json").write_text(json.dumps(record))
    (run / "eval" / "before.json").write_text(json.dumps({"step": EVIL}))
    page = write_report(run)
    assert not parse(page).names & {"script", "b"}
    assert page.read_text(encoding="utf-8").count("&lt;script&gt;") >= 8


def test_an_empty_run_gives_a_page_that_names_what_is_missing(tmp_path: Path) -> None:
    page = write_report(tmp_path)
    parse(page)
    text = page.read_text(encoding="utf-8")
    for name in ("config.yaml", "metrics.jsonl", "before.json", "after.json", "samples.jsonl"):
        assert f"<li>{name} is missing</li>" in text
    with pytest.raises(ReportError, match="no such folder"):
        write_report(tmp_path / "absent")


def notes_of(run: Path) -> str:
    return "\n".join(read_run(run).notes)


def test_unusable_inputs_are_named_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_records(2))
    (run / "eval" / "before.json").write_text(
        '{"step": 0, "count": 4, "speech": {"accuracy": NaN}}'
    )
    (run / "eval" / "after.json").write_text("{")
    (run / "eval" / "step_000004.json").write_text('{"step": 4, "count": 4, "probes": [1]}')
    good, short = json.dumps(sample()), json.dumps(sample(logprob=[1.0]))
    text = json.dumps(sample(advantage=["1", 2]))
    (run / "samples.jsonl").write_text(f"{short}\n{good}\n{text}\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    notes = notes_of(run)
    assert "before.json cannot be used: accuracy is nan, expected a finite number" in notes
    assert "after.json cannot be used" in notes
    assert "step_000004.json cannot be used: probes is a list, expected an object" in notes
    assert "samples.jsonl: record 1 left out: token fields differ in length" in notes
    assert "samples.jsonl: record 3 left out: advantage holds '1', expected finite" in notes
    assert "metrics.jsonl:3: not JSON" in notes
    loaded = read_run(run)
    assert (loaded.before, loaded.after, loaded.during) == (None, None, ())
    assert len(loaded.samples) == 1
    parse(write_report(run))


def test_a_run_still_going_shows_what_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_records(1))
    (run / "eval" / "after.json").unlink()
    text = write_report(run).read_text(encoding="utf-8")
    assert "<li>after.json is missing</li>" in text
    assert "<th>Speech prompts (S)</th><td>62.5</td><td>\N{EN DASH}</td>" in text


@pytest.mark.parametrize(
    ("before", "after", "better", "shown", "verdict"),
    [
        (60.0, 62.0, 1, "+2.0", "good"),
        (60.0, 58.0, 1, "\N{MINUS SIGN}2.0", "bad"),
        (30.0, 20.0, -1, "\N{MINUS SIGN}10.0", "good"),
        (30.0, 40.0, -1, "+10.0", "bad"),
        (30.0, 30.04, 1, "0.0", ""),
        (30.0, 40.0, 0, "+10.0", ""),
    ],
)
def test_change_and_its_verdict(
    before: float, after: float, better: int, shown: str, verdict: str
) -> None:
    expected = f'<span class="{verdict}">{shown}</span>' if verdict else shown
    assert _delta(before, after, better) == expected


def samples_of(tmp_path: Path, *records: dict[str, object]) -> RunInputs:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "samples.jsonl").write_text(text)
    return read_run(tmp_path)


def test_tokens_are_coloured_by_sign_and_size_of_the_advantage(tmp_path: Path) -> None:
    tokens = sample(
        token=["up", "none", "down"],
        advantage=[1.5, 0.001, -7.0],
        logprob=[-2.0, -1.0, -0.1],
        teacher_logprob=[-0.5, -1.0, -7.1],
    )
    html = samples_html(samples_of(tmp_path, tokens).samples)
    assert 'class="token up" style="--strength:0.33"' in html  # half of 0.65
    assert 'class="token" style="--strength:0.00"' in html
    assert 'class="token down" style="--strength:0.65"' in html  # no more than the strongest
    assert 'title="advantage -7.000, student -0.100, teacher -7.100 nat">down<' in html
    assert "✗ wrong" in html


def test_samples_of_the_first_and_last_step_by_modality(tmp_path: Path) -> None:
    records = [
        sample(step=step, modality=modality, prompt=f"{step} {modality} {i};")
        for step in (0, 5, 9)
        for modality in ("text", "speech")
        for i in range(8)
    ]
    html = samples_html(samples_of(tmp_path, *records).samples)
    found = re.findall(r"(\d) (text|speech) (\d);", html)
    wanted = [(s, m, str(i)) for s in "90" for m in ("speech", "text") for i in range(6)]
    assert found == wanted


def test_curves_skip_absent_and_null_values(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "entropy_text": null}\n{"step": 1, "entropy_text": 1.0, "loss": true}\n'
    )
    charts = learning_charts(read_run(tmp_path))
    assert [chart.name for chart in charts] == ["entropy"]
    assert charts[0].draw(LIGHT) == charts[0].draw(LIGHT)  # the same numbers, the same bytes


def test_running_mean_is_centred_and_shrinks_at_the_ends() -> None:
    assert _running_mean([1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, 11 / 3, 4.5]
    assert _running_mean([1.0, 2.0], 1) == [1.0, 2.0]


def test_labels_of_lines_that_end_together_are_pushed_apart() -> None:
    _, axes = _new_axes(LIGHT, "title", "unit")
    axes.set_ylim(0, 1)
    lines = [Line(name, "text", [0], [0.5]) for name in ("a", "b", "c")]
    _label_ends(axes, LIGHT, lines, window=1)
    heights = sorted(label.xy[1] for label in axes.texts)  # type: ignore[attr-defined]
    assert heights == pytest.approx([0.5, 0.6, 0.7])
