"""The CPU benchmark: the wrong is not ranked, the slow not run, what is done not repeated."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import time

import pytest
import torch
from rich.console import Console

from benchmarks.cpu import measure, record, report
from benchmarks.cpu.__main__ import Options, main, parse_options, run
from benchmarks.cpu.measure import Limits, Outcome, Problems, Status, fractions, measure_cell
from benchmarks.cpu.memory import peak, recorded
from benchmarks.cpu.problem import IGNORED, Drawn, Job, solve
from benchmarks.cpu.providers import GEMM, REFERENCE, Provider, providers
from benchmarks.harness import Shape
from xopd_kernels.testing import Distribution

SHAPE = Shape("tiny", 24, 16, 300)
LIMITS = Limits(rounds=3, limit_s=60.0, cell_s=60.0)
DRAWN = functools.cache(
    lambda dtype, distribution, classes: Drawn.of(
        dataclasses.replace(SHAPE, vocab_size=classes), dtype, distribution, has_teacher=True
    )
)


def problems(job, dtype=torch.float32, distribution=Distribution.PEAKED, masked=50):
    sizes = (*fractions(SHAPE.vocab_size), SHAPE.vocab_size)
    return Problems(*(DRAWN(dtype, distribution, x).problem(job, masked) for x in sizes))


def named(job, name, dtype=torch.float32):
    return next(x for x in providers(job, dtype) if x.name == name)


def options(*arguments: str) -> Options:
    return parse_options(["--shapes", "24x16x300", "--threads", "1", *arguments])


def one_provider(job, dtype):
    return [named(job, GEMM, dtype), named(job, REFERENCE, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("job", Job)
def test_all_providers_but_the_compiled_are_right(job, dtype):
    listed = [x for x in providers(job, dtype) if x.name != "torch.compile"]
    for outcome in measure_cell(listed, problems(job, dtype), LIMITS):
        assert outcome.status in (Status.OK, Status.ABSENT), outcome
        if outcome.status is Status.ABSENT:
            assert outcome.reason
        else:
            assert outcome.rounds == 3
            assert outcome.p20_ms <= outcome.median_ms <= outcome.p80_ms
        if outcome.status is Status.OK and not outcome.is_floor:
            assert outcome.budget_used <= 1.0
            assert 0 < outcome.extra_bytes <= outcome.peak_bytes


@pytest.mark.parametrize("result", ["logprob", "d_hidden", "d_weight"])
@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_a_wrong_provider_is_flagged_and_not_timed(result, value):
    right = named(Job.POLICY_LOSS, "torch eager")

    def prepare(problem):
        def wrong():
            results = right.prepare(problem)()
            results[result].view(-1)[-1] *= value
            results[result].view(-1)[0] += 1e-3
            return results

        return wrong

    listed = [right, Provider("wrong", prepare)]
    good, bad = measure_cell(listed, problems(Job.POLICY_LOSS), LIMITS)
    assert good.status is Status.OK
    assert bad.status is Status.WRONG
    assert bad.median_ms is None
    assert "x its budget" in bad.reason


def test_what_is_wrong_at_full_size_alone_is_flagged():
    full = problems(Job.SCORING)
    small = DRAWN(torch.float32, Distribution.PEAKED, 64).problem(Job.SCORING, 50)
    right = named(Job.SCORING, "torch eager")

    def prepare(problem):
        factor = 1.01 if len(problem.weight) == SHAPE.vocab_size else 1.0
        return lambda: {"logprob": right.prepare(problem)()["logprob"] * factor}

    (outcome,) = measure_cell([Provider("wrong", prepare)], full._replace(small=small), LIMITS)
    assert outcome.status is Status.WRONG
    assert "of the full problem" in outcome.reason


def test_a_failing_provider_is_reported_and_the_others_run():
    def prepare(problem):
        raise RuntimeError("no such luck\nand a long trace")

    listed = [Provider("failing", prepare), named(Job.SCORING, REFERENCE)]
    failed, right = measure_cell(listed, problems(Job.SCORING), LIMITS)
    assert (failed.status, failed.reason) == (Status.FAILED, "RuntimeError: no such luck")
    assert right.status is Status.OK


def big_problems(monkeypatch, second_per_class, call_s=0.0, small=64):
    """Three vocabularies and a provider whose time and sizes a fake clock decides."""
    now = 0.0
    seen = []

    def prepare(problem):
        def timed():
            nonlocal now
            now += call_s + second_per_class * len(problem.weight)
            seen.append(len(problem.weight))
            return {}

        return timed

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    sizes = (16, small, 300)
    drawn = (DRAWN(torch.float32, Distribution.RANDOM, x) for x in sizes)
    return prepare, Problems(*(x.problem(Job.SCORING, 0) for x in drawn)), seen


def outcome_of(prepare, given) -> Outcome:
    return measure_cell([Provider("slow", prepare, is_floor=True)], given, LIMITS)[0]


def test_a_slow_provider_is_stopped_at_the_first_probe(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, second_per_class=1.0)
    outcome = outcome_of(prepare, given)
    assert outcome.status is Status.OVER_LIMIT
    assert outcome.reason == "over 60 s (estimated 300 s from V/19)"
    assert set(seen) == {16}


def test_a_slow_provider_is_stopped_at_the_second_probe(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, second_per_class=0.22)
    outcome = outcome_of(prepare, given)
    assert outcome.status is Status.OVER_LIMIT
    assert outcome.reason == "over 60 s (estimated 66 s from V/5)"
    assert set(seen) == {16, 64}


def test_what_each_call_costs_is_not_taken_for_what_each_class_costs(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, 0.05, call_s=6.0, small=32)
    assert outcome_of(prepare, given).status is Status.OK
    assert 300 in seen


def test_what_takes_longer_than_its_probes_said_is_stopped(monkeypatch):
    prepare, given, seen = big_problems(monkeypatch, second_per_class=0.1)
    right = named(Job.SCORING, "torch eager")

    def slow_at_last(problem):
        run = prepare(problem)
        at_last = len(problem.weight) == SHAPE.vocab_size

        def passes():
            for _ in range(5 if at_last else 1):
                run()
            return right.prepare(problem)()

        return passes

    (outcome,) = measure_cell([Provider("slow", slow_at_last)], given, LIMITS)
    assert outcome.status is Status.OVER_LIMIT
    assert outcome.reason == "over 60 s (its first pass took 150 s)"
    assert seen.count(300) == 5


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda: 10)
    prepare = named(Job.SCORING, REFERENCE).prepare
    (outcome,) = measure_cell([Provider("large", prepare)], problems(Job.SCORING), LIMITS)
    assert outcome.status is Status.TOO_LARGE
    assert "are free" in outcome.reason


def test_no_round_begins_after_the_time_of_a_cell(monkeypatch):
    prepare, given, _ = big_problems(monkeypatch, second_per_class=0.1)
    limits = Limits(rounds=9, limit_s=60.0, cell_s=100.0)
    (outcome,) = measure_cell([Provider("slow", prepare, is_floor=True)], given, limits)
    assert outcome.rounds == 4  # 30 s each


def test_half_of_the_tokens_are_masked_and_peaked_ones_are_peaked():
    drawn = Drawn.of(Shape("", 400, 1024, 2000), torch.float32, Distribution.PEAKED, False)
    assert drawn.problem(Job.SCORING, 0).is_live.all()
    half = drawn.problem(Job.SCORING, 50)
    assert (half.target == IGNORED).sum() == 200
    logprob = solve(drawn.problem(Job.SCORING, 0), is_exact=True)["logprob"]
    assert 0.4 < (logprob.exp() > 0.99).double().mean() < 0.6
    assert torch.equal(solve(half, is_exact=True)["logprob"] == 0, ~half.is_live)


def test_peak_counts_excluded_tensors_only_while_they_live():
    # 100 of workspace, released before the gradient of 100 is made and kept with 7 more.
    sizes = [40, 60, -40, -60, 100, 7]
    assert peak(sizes, {100: 1}) == (107, 100)
    assert peak([100, 7, 100, -7], {100: 1}) == (207, 107)
    assert peak([-8, 8, 8], {8: 1}) == (8, 0)


def test_an_allocation_is_recorded():
    result, sizes = recorded(lambda: torch.empty(1000).add(1))
    assert len(result) == 1000
    assert 8000 <= peak(sizes, {}).total_bytes < 8100  # both, and what the operator needs
    assert sum(sizes) == 4000  # the result is left


def measured(path, *arguments, listed=one_provider):
    given = options("--output", str(path), *arguments)
    return run(given, Console(file=io.StringIO()), listed)


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    path = tmp_path / "new" / "cpu.jsonl"
    few = ("--jobs", "scoring", "--dtypes", "float32", "--rounds", "3")
    first = measured(path, *few, "--masked", "0")
    assert len(record.read(path)) == len(first) == 2
    calls = []

    def counted(job, dtype):
        calls.append(job)
        return one_provider(job, dtype)

    second = measured(path, *few, "--masked", "0", "50", listed=counted)
    assert len(calls) == 2  # of four cells
    assert [x for x in second if x["masked_percent"] == 0] == first
    assert len(record.read(path)) == 4
    measured(path, *few, "--masked", "0", "--limit-s", "59", listed=counted)
    assert len(calls) == 4  # another limit is another measurement


@pytest.mark.parametrize("field", ["commit", "device", "torch", "kernel_hash", "threads"])
def test_a_cell_of_another_origin_is_not_taken_for_done(field):
    line = dict.fromkeys((*record.CELL_FIELDS, "commit", "device", "torch", "date"), "x")
    line |= {"kernel_hash": "x", "threads": "x", "outcomes": []}
    assert record.key(line) == record.key({**line, "date": "later", "outcomes": [1]})
    assert record.key(line) != record.key({**line, field: "y"})


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "cpu.jsonl"
    line = {**dict.fromkeys(record.CELL_FIELDS, 1), "outcomes": []}
    record.append(path, line)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"shape": "cut o')
    assert record.read(path) == [line]
    record.append(path, line)
    assert record.read(path) == [line, line]


def test_a_file_of_something_else_is_refused_by_line(tmp_path):
    path = tmp_path / "cpu.jsonl"
    path.write_text('{"shape": 1}\n')
    with pytest.raises(ValueError, match=r"cpu\.jsonl:1 is no cell"):
        record.read(path)
    path.write_text("hello\n")
    with pytest.raises(ValueError, match=r"cpu\.jsonl:1 is not JSON"):
        record.read(path)


def line_of(*outcomes: Outcome) -> record.Line:
    cell = next(options("--dtypes", "bfloat16", "--jobs", "scoring").cells())
    return record.cell_line(record.origin(LIMITS), cell, outcomes)


def test_the_report_ranks_what_is_right_and_shows_the_rest():
    line = line_of(
        Outcome("torch.mm", Status.OK, "", True, 20.0, 19.0, 21.0, 3),
        Outcome("torch.mm fp32", Status.OK, "", True, 4.0, 3.9, 4.1, 3),
        Outcome("torch eager", Status.OK, "", False, 30.0, 29.0, 31.0, 3, 9_000_000, 1, 1e-3, 0.3),
        Outcome("TRL chunked", Status.WRONG, "relative error 1.0, 99 x its budget"),
        Outcome("torch.compile", Status.OVER_LIMIT, "over 60 s (estimated 70 s from V/64)"),
        Outcome("ours native", Status.OK, "", False, 5.0, 4.9, 5.1, 3, 2_000_000, 1, 1e-3, 0.3),
    )
    json.dumps(line, allow_nan=False)
    table = report.markdown([{**line, "commit": "old"}, line, line])
    assert table.count("\n## ") == 1  # two runs, the second after a blank line
    assert "| **ours native** | **5 [4.9, 5.1]** | 0.25 | 1.25 | 2.0 | 1.0e-03 (0.30) |" in table
    assert "| TRL chunked | wrong: relative error 1.0, 99 x its budget |" in table
    assert "| torch.compile | over limit: over 60 s (estimated 70 s from V/64) |" in table
    assert "| 4 | 30 (7.50 x) | torch eager: 30 (7.50 x) | - | 5 (1.25 x) | 6.00 x |" in table
    # Each is shown once in each run, though the last was measured twice.
    assert table.count("| TRL chunked |") == 2


def test_a_report_needs_no_measurement(tmp_path, capsys):
    path = tmp_path / "cpu.jsonl"
    record.append(path, line_of(Outcome("torch.mm", Status.FAILED, "RuntimeError: a | b")))
    main(parse_options(["--report", str(path)]))
    assert "| torch.mm | failed: RuntimeError: a / b |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no"):
        main(parse_options(["--report", str(tmp_path / "none")]))
    assert report.markdown([]) == "No cell has been measured.\n"


def test_the_full_run_has_every_cell_of_the_table():
    cells = list(parse_options([]).cells())
    assert len(cells) == len(set(cells)) == 3 * 2 * 2 * 2 * 3
    assert {(x.shape.rows, x.shape.dim, x.shape.vocab_size) for x in cells} == {
        (512, 1024, 32_000),
        (1024, 2048, 151_936),
        (256, 3584, 152_064),
    }


@pytest.mark.parametrize(
    "arguments",
    [["--shapes", "1x2"], ["--shapes", "0x1x99"], ["--masked", "100"], ["--limit-s", "0"]],
)
def test_a_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert "error: " in capsys.readouterr().err


def test_a_provider_that_this_torch_lacks_is_listed_with_its_reason(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    absent = named(Job.SCORING, "F.linear_cross_entropy chunked")
    assert absent.prepare is None
    assert "came with 2.13" in absent.absent
    (outcome,) = measure_cell([absent], problems(Job.SCORING), LIMITS)
    assert (outcome.status, outcome.reason) == (Status.ABSENT, absent.absent)


def test_what_was_far_over_the_limit_is_not_tried_with_other_inputs(tmp_path):
    path = tmp_path / "cpu.jsonl"
    probed = []

    def slow(job, dtype):
        def prepare(problem):
            def run():
                probed.append(len(problem.weight))
                time.sleep(0.02)
                return {}

            return run

        return [Provider("slow", prepare, is_floor=True), named(job, REFERENCE, dtype)]

    few = ("--jobs", "scoring", "--dtypes", "float32", "--rounds", "3", "--limit-s", "0.001")
    lines = measured(path, *few, "--masked", "0", "50", listed=slow)
    assert [x["outcomes"][0]["status"] for x in lines] == ["over limit"] * 4
    assert len(probed) == 1  # of four cells
    assert "with other inputs" in lines[1]["outcomes"][0]["reason"]
    estimates = [x["outcomes"][0]["estimate_s"] for x in lines]
    assert estimates == [estimates[0]] * 4
