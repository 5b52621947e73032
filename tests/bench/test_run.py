"""The command line, the loop over cells, the file and the report."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from xopd.cli import build_parser, main
from xopd_bench import plots, record, report
from xopd_bench.cell import Job
from xopd_bench.cli import parse_options
from xopd_bench.clock import Ceiling
from xopd_bench.errors import BenchError
from xopd_bench.measure import Limits, Outcome, Status
from xopd_bench.providers import providers
from xopd_bench.providers.ours import REFERENCE
from xopd_bench.providers.provider import Provider, Where
from xopd_bench.run import Options, run
from xopd_bench.targets import targets_table

LIMITS = Limits(rounds=3, limit_s=60.0, cell_s=60.0)
CEILING = Ceiling(tflop_s=0.2, gb_s=20.0, dtype="float32")


def options(*arguments: str) -> Options:
    tiny = ("--device", "cpu", "--shapes", "24x16x300", "--threads", "1")
    return parse_options(build_parser().parse_args(["bench", *tiny, *arguments]))


def one_provider(job, where):
    return [x for x in providers(job, where) if x.name in ("torch.mm", REFERENCE)]


def measured(path, *arguments, listed=one_provider):
    given = options(*(() if path is None else ("--output", str(path))), *arguments)
    return run(given, Console(file=io.StringIO()), listed)


def line_of(*outcomes: Outcome, job=Job.SCORING, masked="0", device="cpu") -> record.Line:
    given = options("--dtypes", "bfloat16", "--jobs", job.value, "--masked", masked)
    cell = next(given.cells())
    line = record.cell_line(record.origin(given.device, LIMITS), cell, outcomes, CEILING)
    return {**line, "device_type": device}


def ok(name: str, median_ms: float, extra: int = 2_000_000, is_floor: bool = False) -> Outcome:
    spread = (median_ms, median_ms * 0.95, median_ms * 1.05)
    return Outcome(
        name,
        Status.OK,
        "",
        "1.0",
        is_floor,
        *spread,
        rounds=3,
        beyond_bytes=extra,
        extra_bytes=extra,
        relative_error=1e-3,
        budget_used=0.3,
    )


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    path = tmp_path / "new" / "bench.jsonl"
    few = ("--jobs", "scoring", "--dtypes", "float32", "--rounds", "3")
    first, is_complete = measured(path, *few, "--masked", "0")
    assert is_complete
    assert len(record.read(path)) == len(first) == 2
    calls = []

    def counted(job, where):
        calls.append(job)
        return one_provider(job, where)

    second, _ = measured(path, *few, "--masked", "0", "50", listed=counted)
    assert len(calls) == 2  # of four cells
    assert [x for x in second if x["masked_percent"] == 0] == first
    assert len(record.read(path)) == 4
    measured(path, *few, "--masked", "0", "--limit-s", "59", listed=counted)
    assert len(calls) == 4  # another limit is another measurement


def test_a_run_that_is_stopped_goes_on(tmp_path):
    path = tmp_path / "bench.jsonl"
    few = ("--jobs", "scoring", "--dtypes", "float32", "--rounds", "3", "--masked", "0")
    lines, is_complete = measured(path, *few, "--stop-after-s", "1e-9")
    assert (lines, is_complete) == ([], False)
    lines, is_complete = measured(path, *few)
    assert len(lines) == 2
    assert is_complete


@pytest.mark.parametrize("field", ["commit", "device", "torch", "kernel_hash", "threads"])
def test_a_cell_of_another_origin_is_not_taken_for_done(field):
    line = dict.fromkeys((*record.CELL_FIELDS, "commit", "device", "torch", "date"), "x")
    line |= {"kernel_hash": "x", "threads": "x", "outcomes": []}
    assert record.key(line) == record.key({**line, "date": "later", "outcomes": [1]})
    assert record.key(line) != record.key({**line, field: "y"})


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "bench.jsonl"
    line = {**dict.fromkeys(record.CELL_FIELDS, 1), "outcomes": []}
    record.append(path, line)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"shape": "cut o')
    assert record.read(path) == [line]
    record.append(path, line)
    assert record.read(path) == [line, line]


def test_a_file_of_something_else_is_refused_by_line(tmp_path, capsys):
    path = tmp_path / "bench.jsonl"
    path.write_text('{"shape": 1}\n')
    with pytest.raises(BenchError, match=r"bench\.jsonl:1 is no line"):
        record.read(path)
    path.write_text("hello\n")
    with pytest.raises(SystemExit):
        main(["bench", "report", str(path)])
    assert "bench.jsonl:1 is not JSON" in capsys.readouterr().err


def test_the_report_ranks_what_is_right_and_shows_the_rest():
    line = line_of(
        ok("torch.mm", 20.0, is_floor=True),
        ok("torch.mm fp32", 4.0, is_floor=True),
        ok("torch eager", 30.0, extra=9_000_000),
        Outcome("TRL chunked", Status.WRONG, "relative error 1.0, 99 x its budget"),
        Outcome("torch.compile", Status.OVER_LIMIT, "over 60 s (estimated 70 s from V/64)"),
        Outcome("Liger FLCE", Status.INTERPRETED, "in Triton's interpreter, not timed"),
        ok("ours native", 5.0),
    )
    json.dumps(line, allow_nan=False)
    table = report.markdown([{**line, "commit": "old"}, line, line])
    assert table.count("\n## ") == 1  # two runs, the second after a blank line
    assert "| **ours native (1.0)** | **5 [4.75, 5.25]** | 0.25 | 1.25 |" in table
    assert "| TRL chunked | wrong: relative error 1.0, 99 x its budget |" in table
    assert "| torch.compile | over limit: over 60 s (estimated 70 s from V/64) |" in table
    assert "| Liger FLCE | verified only: in Triton's interpreter, not timed |" in table
    assert "| 4 | 30 (7.50 x) | torch eager: 30 (7.50 x) | - | 5 (1.25 x) | 6.00 x |" in table
    # Each is shown once in each run, though the last was measured twice.
    assert table.count("| TRL chunked |") == 2
    assert "stale" not in table
    assert "(stale: the kernels" in report.markdown([{**line, "kernel_hash": "0"}])


def test_rates_are_shares_of_what_the_device_can_do():
    line = line_of(ok("ours native", 5.0))
    (row,) = line["outcomes"]
    assert row["tflop_s"] == pytest.approx(2 * 24 * 16 * 300 / 5e-3 * 1e-12, abs=1e-4)
    assert row["gb_s"] == pytest.approx((24 + 300) * 16 * 2 / 5e-3 * 1e-9, abs=1e-4)


def large(*lines):
    """The same of a head that targets are about."""
    return [{**line, "shape": "24x16x32000"} for line in lines]


def test_targets_name_the_worst_cell():
    floor = ok("torch.mm", 10.0, is_floor=True)
    whole = line_of(floor, ok("ours native", 11.0), job=Job.POLICY_LOSS)
    half = line_of(
        floor, ok("ours native", 8.0), ok("TRL chunked", 4.0), job=Job.POLICY_LOSS, masked="50"
    )
    table = targets_table(large(whole, half))
    assert "| G1 policy loss / three GEMMs | <= 1.15 | 1.1 | policy loss, 24x16x32000" in table
    assert "| G2 half masked / unmasked | <= 0.6 | 0.727 |" in table
    assert "50 % | 0 of 1 |" in table
    assert "| G4 scoring / one GEMM | <= 1.15 | not measured |" in table
    assert "| fastest peer / ours at bf16 | >= 1 | 0.5 |" in table
    on_cuda = [{**whole, "device_type": "cuda"}]
    assert "| G7 extra memory, MB | <= 650 | not measured |" in targets_table(large(*on_cuda))


def test_targets_say_where_ours_has_no_figure():
    wrong = Outcome("ours native", Status.WRONG, "at full size: d_hidden")
    table = targets_table(large(line_of(wrong), line_of(ok("ours native", 5.0))))
    assert (
        "Ours has no figure in 1 of 2 cells: scoring, 24x16x32000, bfloat16, random, 0 %" in table
    )
    assert "wrong (at full size: d_hidden)" in table


def test_targets_are_not_about_tiny_heads():
    line = line_of(ok("torch.mm", 10.0, is_floor=True), ok("ours native", 50.0))
    assert "fewer than 4096 classes" in targets_table([line])


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "bench.jsonl"
    with pytest.raises(SystemExit):
        main(["bench", "--smoke", "--device", "cpu", "--output", str(path)])
    assert f"--output {path} cannot be written" in capsys.readouterr().err
    path = tmp_path / "bench.jsonl"
    record.append(path, line_of(ok("torch.mm", 1.0, is_floor=True)))
    with pytest.raises(SystemExit):
        main(["bench", "report", str(path), "--plots", str(tmp_path / "file")])
    assert "cannot be written" in capsys.readouterr().err


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['rich'] = None; from xopd_bench.cli import main; main()"
    command = [sys.executable, "-c", code, "--smoke", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this needs rich: pip install '.[bench]'" in done.stderr


@pytest.mark.parametrize("text", ["", '{"cut off'])
def test_a_file_without_a_finished_cell_is_no_report(tmp_path, capsys, text):
    path = tmp_path / "bench.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["bench", "report", str(path)])
    assert "bench.jsonl holds no finished cell" in capsys.readouterr().err


def test_a_report_needs_no_measurement(tmp_path, capsys):
    path = tmp_path / "bench.jsonl"
    record.append(path, line_of(Outcome("torch.mm", Status.FAILED, "RuntimeError: a | b")))
    assert main(["bench", "report", str(path)]) == 0
    assert "| torch.mm | failed: RuntimeError: a / b |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "report", str(tmp_path / "none")])
    assert "no such file" in capsys.readouterr().err
    assert report.markdown([]) == "No cell has been measured.\n"


def plots_of(tmp_path, capsys, *lines: record.Line) -> list[str]:
    path = tmp_path / "bench.jsonl"
    for line in lines:
        record.append(path, line)
    assert main(["bench", "report", str(path), "--plots", str(tmp_path / "plots")]) == 0
    plots = [Path(x) for x in capsys.readouterr().err.split()]
    assert all(x.read_bytes().startswith(b"\x89PNG") for x in plots)
    return sorted(x.name for x in plots)


@pytest.mark.parametrize("rows", [(16,), (16, 32)], ids=["bars", "lines"])
def test_plots_are_made_of_what_was_measured(tmp_path, capsys, rows):
    shapes = [f"{count}x16x300" for count in rows]
    given = ("--shapes", *shapes, "--dtypes", "float32", "--distributions", "peaked")
    lines, _ = measured(None, "--jobs", "scoring", "policy_loss", "--masked", "0", *given)
    names = plots_of(tmp_path, capsys, *lines)
    assert [x.split("_")[0] for x in names] == ["memory", "roofline", "time"]


def test_every_provider_has_a_look_of_its_own():
    where = Where(torch.device("cpu"), torch.bfloat16, is_interpreted=False)
    names = {x.name for job in Job for x in providers(job, where)}
    assert names == set(plots.NAMES)
    looks = plots._looks([{"outcomes": [{"provider": name} for name in plots.NAMES]}])
    assert len({look[:2] for look in looks.values()}) == len(names)


def test_runs_of_one_commit_on_two_machines_have_plots_of_their_own(tmp_path, capsys):
    line = line_of(ok("torch.mm", 10.0, is_floor=True), ok(REFERENCE, 12.0))
    names = plots_of(tmp_path, capsys, line, {**line, "device": "another"})
    assert [x.split("_")[1] for x in names] == ["run1", "run2"] * 3


def test_a_provider_is_left_out_by_name(tmp_path, capsys):
    few = ("--jobs", "scoring", "--dtypes", "float32", "--masked", "0", "--rounds", "3")
    lines, _ = measured(tmp_path / "bench.jsonl", *few, "--without", "torch.mm")
    outcomes = {x["provider"]: x for x in lines[0]["outcomes"]}
    assert outcomes["torch.mm"]["reason"] == "left out (--without)"
    assert outcomes[REFERENCE]["status"] == "ok"
    with pytest.raises(BenchError, match=r"--without names 'torch'; there are 'ours reference'"):
        measured(None, *few, "--without", "torch")


@pytest.mark.parametrize(("name", "code"), [("ours native", 1), ("TRL chunked", 0)])
def test_a_run_in_which_ours_failed_does_not_end_well(monkeypatch, capsys, name, code):
    def failing(problem):
        raise RuntimeError("no kernel")

    listed = [Provider(name, failing)]
    monkeypatch.setattr(run, "__defaults__", (lambda job, where: listed,))
    few = ("--device", "cpu", "--shapes", "24x16x300", "--jobs", "scoring", "--masked", "0")
    assert main(["bench", *few, "--dtypes", "float32"]) == code
    assert ("of ours, wrong or failed" in capsys.readouterr().err) == bool(code)


def test_the_full_run_has_every_cell_of_the_table():
    given = parse_options(build_parser().parse_args(["bench", "--device", "cpu"]))
    cells = list(given.cells())
    assert len(cells) == len(set(cells)) == 3 * 2 * 2 * 2 * 3
    assert {(x.shape.rows, x.shape.dim, x.shape.vocab_size) for x in cells} == {
        (512, 1024, 32_000),
        (1024, 2048, 151_936),
        (256, 3584, 152_064),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "1x2"],
        ["--shapes", "0x1x99"],
        ["--masked", "100"],
        ["--limit-s", "0"],
        ["--rounds", "0"],
        ["--jobs", "everything"],
        ["report"],
    ],
)
def test_a_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert "error: " in capsys.readouterr().err


def test_what_was_far_over_the_limit_is_not_tried_with_other_inputs(tmp_path):
    path = tmp_path / "cpu.jsonl"
    probed = []

    def slow(job, where):
        def prepare(problem):
            def run():
                probed.append(len(problem.weight))
                time.sleep(0.02)
                return {}

            return run

        return [Provider("slow", prepare, is_floor=True), *one_provider(job, where)]

    few = ("--jobs", "scoring", "--dtypes", "float32", "--rounds", "3", "--limit-s", "0.001")
    lines, _ = measured(path, *few, "--masked", "0", "50", listed=slow)
    assert [x["outcomes"][0]["status"] for x in lines] == ["over limit"] * 4
    assert probed == [128]  # of four cells; nothing compiles, so the long first pass counts
    assert "with other inputs" in lines[1]["outcomes"][0]["reason"]
    estimates = [x["outcomes"][0]["estimate_s"] for x in lines]
    assert estimates == [estimates[0]] * 4
