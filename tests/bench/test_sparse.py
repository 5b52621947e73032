"""The studies of sparse gradients: their inputs and truth, resuming, tables, plots, verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import sparse, sparse_training
from benchmarks.sparse_problem import (
    CENTRED,
    PEAKED,
    Inputs,
    draw,
    gradient_error,
    kept_entries,
    solve,
)
from benchmarks.sparse_report import groups, put_into, table, write_plots
from benchmarks.sparse_training_report import table as training_table
from benchmarks.sparse_training_report import verdicts, write_plot
from benchmarks.sparse_verify import policy_loss
from xopd_bench import record
from xopd_bench.cell import Shape
from xopd_bench.errors import BenchError
from xopd_kernels import Backend

CPU, SHAPE = torch.device("cpu"), Shape(40, 24, 300)
FAMILIES = ("0", "1.5", PEAKED, CENTRED)


def drawn(family: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return draw(SHAPE, dtype, family, CPU, torch.float64)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_truth_is_what_autograd_finds(family: str) -> None:
    inputs = drawn(family)
    truth = solve(inputs, torch.float64)
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
    logprob = (hidden @ weight.T).log_softmax(1).gather(1, inputs.target[:, None]).squeeze(1)
    advantage = (inputs.teacher_logprob.double() - logprob.detach()).clamp(-10, 10)
    loss = -(inputs.token_weight.double() * advantage * logprob).sum()
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    assert gradient_error(truth.d_hidden, d_hidden).relative < 1e-6
    assert gradient_error(truth.d_weight, d_weight).relative < 1e-6
    assert gradient_error(d_weight, d_weight).cosine == pytest.approx(1.0)


def test_families_differ_in_entropy_and_the_centred_one_only_in_the_weight() -> None:
    entropy = {x: draw(SHAPE, torch.float32, x, CPU, torch.float64)[1] for x in FAMILIES}
    assert entropy["0"].entropy_nat > entropy["1.5"].entropy_nat > 0
    assert entropy[PEAKED].entropy_nat == pytest.approx(entropy[CENTRED].entropy_nat, abs=1e-3)
    one, two = drawn(PEAKED), drawn(CENTRED)
    torch.testing.assert_close(one.target, two.target)
    exact = [solve(x, torch.float64).d_hidden for x in (one, two)]
    torch.testing.assert_close(*exact, atol=1e-5, rtol=1e-3)


def test_targets_are_sampled_from_the_softmax() -> None:
    """The mean probability of a sampled target is the mean of sum p^2."""
    shape = Shape(4000, 8, 50)
    inputs, found = draw(shape, torch.float32, "2", CPU, torch.float64)
    p = (inputs.hidden.detach() @ inputs.weight.detach().T).softmax(1)
    assert found.target_p == pytest.approx(float(p.square().sum(1).mean()), abs=0.02)


def test_the_mass_left_out_tells_how_many_entries_were_kept() -> None:
    inputs = drawn("1.5")
    truth = solve(inputs, torch.float64)
    p = (inputs.hidden.detach().double() @ inputs.weight.detach().double().T).softmax(1)
    others = p.scatter(1, inputs.target[:, None], 0.0).sort(1, descending=True).values
    counts = torch.arange(len(p)) % 20  # beside the target
    dropped = torch.stack([row[count:].sum() for row, count in zip(others, counts, strict=True)])
    found = kept_entries(inputs, truth.lse, dropped[None].float())
    assert torch.equal(found[0], counts + 1)


def options(output: Path | None, *arguments: str) -> sparse.Options:
    tiny = ("--shape", "40x24x300", "--device", "cpu", "--rounds", "3", "--threads", "1")
    few = ("--errors", "0.3", "0", "--exponents", "0", "2", "--no-peaked", "--dtypes", "float32")
    given = sparse._parse(["run", *tiny, *few, *arguments])
    return dataclasses.replace(sparse._options(given), output=output)


def measured(output: Path | None, *arguments: str) -> list[record.Line]:
    lines, is_complete = sparse.run(options(output, *arguments), lambda text: None)
    assert is_complete
    return lines


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sparse.jsonl"
    lines, is_complete = sparse.run(options(path, "--stop-after-s", "1e-9"), lambda text: None)
    assert (lines, is_complete) == ([], False)
    first = measured(path)
    assert [line["family"] for line in first] == ["0", "2"]
    assert measured(path, "--exponents", "2", "0") == first[::-1]
    assert len(record.read(path, sparse.FIELDS)) == 2
    measured(path, "--errors", "0.1")  # another question
    assert len(record.read(path, sparse.FIELDS)) == 4


def test_a_line_says_what_was_measured(tmp_path: Path) -> None:
    line = measured(None, "--exponents", "2", "--dtypes", "bfloat16")[0]
    json.dumps(line, allow_nan=False)
    names = [x["name"] for x in line["providers"]]
    assert names == ["torch.mm", "torch.mm fp32", "exact", "sparse 0", "sparse 0.3"]
    own, wide, exact, zero, some = line["providers"]
    assert (own["x_gemm"], wide["x_gemm_fp32"], exact["x_exact"]) == (1, 1, 1)
    assert zero["bound"] == 0 and zero["dense_share"] == 1 and zero["kept_mean"] is None
    assert zero["d_weight"]["relative"] < 1e-2  # bf16
    assert 0 < some["bound"] <= 0.3 and some["dense_share"] < 1
    assert 1 <= some["kept_mean"] <= some["kept_max"] <= 300
    assert exact["d_hidden"]["cosine"] > 0.999
    assert some["rounds"] == 3 and some["p20_ms"] <= some["median_ms"] <= some["p80_ms"]


def test_a_gemm_that_is_too_slow_is_left_out() -> None:
    line = measured(None, "--exponents", "0", "--limit-s", "1e-12")[0]
    assert "torch.mm: over 1e-12 s (estimated 0 s)" in line["left_out"]
    assert [x["name"] for x in line["providers"]] == ["exact", "sparse 0", "sparse 0.3"]
    assert all("x_gemm" not in x for x in line["providers"])
    assert "Left out: torch.mm" in table([line])


@pytest.mark.parametrize("error", [0.01, 0.1])
def test_the_bound_holds_for_the_truth_too(error: float) -> None:
    """||d_hidden - exact|| of each row against the bound on its logits' gradient, over all."""
    inputs = drawn("1.5")
    truth = solve(inputs, torch.float64)
    found = policy_loss(inputs, Backend.REFERENCE, error)
    assert found.dropped_mass is not None
    most = inputs.weight.detach().double().norm(dim=1).max()
    lacking = truth.coefficient.abs() * found.dropped_mass.double()
    off = (found.d_hidden.double() - truth.d_hidden).norm(dim=1)
    assert bool((off <= lacking * most * 1.001 + 1e-6 * truth.d_hidden.norm(dim=1)).all())


def test_tables_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sparse.jsonl"
    lines = measured(path) + measured(path, "--dtypes", "bfloat16")
    assert len(groups(lines + lines)) == 2
    shown = table(lines)
    assert shown.count("| sparse 0.3 |") == 4
    assert "no list | 100.0 / 0.0 | 0 |" in shown
    names = sorted(p.name for p in write_plots(lines, tmp_path / "plots"))
    assert names == sorted(
        f"{kind}_40x24x300_{dtype}_cpu.png"
        for kind in ("kept", "error", "time")
        for dtype in ("float32", "bfloat16")
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study: begin -->\nold\n<!-- study: end -->\nafter\n")
    assert sparse.main(["plot", str(path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert shown in text and "old" not in text
    assert capsys.readouterr().out == shown
    with pytest.raises(BenchError, match="has no place for the table"):
        put_into(page, "training", "x")
    assert table([]) == ""


def test_the_page_has_a_place_for_both_studies(repository: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (repository / "docs" / "sparse-gradients.md").read_text(encoding="utf-8")
    page.write_text(text)
    for name in ("study", "training"):
        put_into(page, name, f"the {name} of today")
        assert f"the {name} of today" in page.read_text()


def test_what_is_none_of_ours_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"shape": 1}\n')
    for module in (sparse, sparse_training):
        with pytest.raises(SystemExit):
            module.main(["plot", str(path)])
        assert "other.jsonl:1 is no line of this benchmark" in capsys.readouterr().err
    for arguments in (["--errors", "nan"], ["--errors", "-1"], ["--exponents", "-1"]):
        with pytest.raises(SystemExit):
            sparse.main(["run", *arguments])
        assert "finite" in capsys.readouterr().err


# Training


def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of training: a folder of numbers that depend on seed and threshold."""
    folders: list[str] = []

    def train(config) -> Path:
        folder, error = Path(config.train.out_dir), config.loss.max_gradient_error or 0.0
        (folder / "eval").mkdir(parents=True)
        steps = [
            {"step": i, "kl_speech": config.train.seed + error + 1 / (i + 1), "update_s": 1.0}
            | ({"gradient_error": error / 2} if error else {})
            for i in range(config.train.steps)
        ]
        text = "".join(json.dumps(step) + "\n" for step in steps)
        (folder / "metrics.jsonl").write_text(text)
        ends = {"speech": {"accuracy": 50.0 + config.train.seed}, "text": {"accuracy": 90.0}}
        (folder / "eval" / "after.json").write_text(json.dumps(ends))
        starts = {"speech": {"accuracy": 40.0}, "text": {"accuracy": 80.0}}
        (folder / "eval" / "before.json").write_text(json.dumps(starts))
        folders.append(folder.name)
        return folder

    monkeypatch.setattr(sparse_training, "train", train)
    monkeypatch.setattr(sparse_training, "synthesize", lambda *given, **named: None)
    return folders


def test_runs_are_trained_once_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = trained(monkeypatch)
    path, runs = tmp_path / "training.jsonl", str(tmp_path / "runs")
    given = ["run", "--steps", "20", "--threads", "1", "--runs", runs, "--output", str(path)]
    assert sparse_training.main([*given, "--stop-after-s", "1e-9"]) == 3
    assert sparse_training.main(given) == 0
    assert len(folders) == 9
    assert set(folders) == {
        f"{name}_seed_{seed}"
        for seed in range(3)
        for name in ("exact", "sparse_0.01", "sparse_0.3")
    }
    capsys.readouterr()
    assert sparse_training.main(given) == 0
    assert len(folders) == 9  # nothing new
    shown = capsys.readouterr().out
    assert "| exact | 3 | 2.05 ± 1 |" not in shown  # figures are of the last tenth
    assert "| before training | 3 | - | 40 ± 0 | 80 ± 0 |" in shown
    assert "- sparse 0.3, KL, speech, nat: +0.3 to exact, within the seeds' spread of 1" in shown
    lines = record.read(path, sparse_training.FIELDS)
    assert lines[0]["figures"]["kl_speech"] == pytest.approx((1 / 19 + 1 / 20) / 2)
    assert write_plot(lines, tmp_path / "plots").stat().st_size > 10_000


def line_of(seed: int, error: float | None, kl: float) -> record.Line:
    about = record.origin(CPU, sparse_training._NO_LIMITS) | {"steps": 3, "curve": {}}
    name = sparse_training.gradient_name(error)
    return about | {"seed": seed, "gradient": name, "max_error": error, "figures": {"kl_text": kl}}


def test_a_difference_beyond_the_spread_is_said() -> None:
    exact = [line_of(seed, None, 1.0 + 0.1 * seed) for seed in range(3)]
    other = [line_of(seed, 0.3, 1.5) for seed in range(3)]
    said = verdicts([*exact, *other])
    assert said == "- sparse 0.3, KL, text, nat: +0.4 to exact, outside the seeds' spread of 0.1\n"
    assert "one seed has no spread" in verdicts([exact[0], other[0]])
    assert verdicts(exact) == verdicts(other) == ""
    assert "| exact | 3 | 1.1 ± 0.1 |" in training_table([*other, *exact])
    assert math.isfinite(exact[0]["figures"]["kl_text"])
