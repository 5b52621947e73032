"""The command line, in this process: help, errors in one line, and what each command writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xopd.cli import build_parser, main
from xopd.config import Config, dump_config, load_config
from xopd.doctor import HeadShape, eager_logit_bytes, loss_memory
from xopd_kernels import Backend, native_library

MakeConfig = Callable[..., Config]
COMMANDS = (
    "demo",
    "data",
    "config",
    "train",
    "eval",
    "report",
    "plan",
    "serve",
    "export",
    "doctor",
)


@pytest.fixture
def config_file(make_config: MakeConfig, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config(tmp_path / "run")))
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must end with status 2 and one line; returns the line."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    # transformers may have shown the progress of loading models before.
    errors = [line for line in printed.err.splitlines() if line.startswith("xopd: error: ")]
    assert errors == printed.err.splitlines()[-1:]
    return errors[0]


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text
        assert f"xopd {command}" in text or command == "report"


@pytest.mark.parametrize("command", [*((c,) for c in COMMANDS), ("data", "synth")])
def test_each_command_has_help(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: xopd {' '.join(command)} ")


def test_train_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "loss.text_weight (float in [0, 1])" in text
    assert "Weight lambda of the text half" in text


def test_an_unknown_key_gets_a_suggestion(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "train", str(config_file), "optim.lerning_rate=1")
    assert "unknown key 'optim.lerning_rate'; did you mean 'optim.learning_rate'?" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps: expected int in [1, 10000000]"),
        ("model.student=./absent", "model folder './absent' has no config.json"),
        ("data.train_split=absent", "absent"),
        ("train.backend=triton", "backend TRITON cannot run: "),
    ],
)
def test_mistakes_are_one_line(
    config_file: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert message in fails(capsys, "train", str(config_file), override)


def test_missing_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read the config" in fails(capsys, "train", str(tmp_path / "absent.yaml"))
    assert "absent" in fails(capsys, "report", str(tmp_path / "absent"))


def test_config_prints_a_tree_that_reads_back(
    config_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", str(config_file), "train.steps=9"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load_config(again, []) == load_config(config_file, ["train.steps=9"])
    assert main(["config"]) == 0
    template = capsys.readouterr().out
    assert "  student: null" in template
    assert "default 2.0e-06" in template


def test_doctor_says_what_runs_and_why_not_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--tokens", "1024"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "transformers", "REFERENCE", "available", "NATIVE", "N=1024"):
        assert word in text
    assert "linear_policy_loss on TRITON, workspace" in text


def test_doctor_says_which_native_kernels_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The portable ones are there on every CPU, and several times slower."""
    objects = native_library.runnable_objects()
    if not objects:
        pytest.skip("no native library was built")
    name = objects[0].stem.removeprefix("_native_")
    assert native_library.instruction_set().startswith(name)
    monkeypatch.setattr(native_library, "runnable_objects", lambda: [Path("_native_portable.so")])
    monkeypatch.setattr(native_library, "_instruction_sets", lambda: ("avx512", "portable"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "portable, slower than the avx512 object" in native_library.instruction_set()
    assert "available: portable" in text
    assert "no-such-compiler not found" in text


def test_doctor_counts_what_the_kernels_plan() -> None:
    shape = HeadShape(hidden=2048, vocabulary=151_936, parameters=None)
    plan = loss_memory(8192, shape, Backend.TRITON)
    assert plan.workspace_bytes <= 640_000_000
    assert plan.accumulator_bytes == 151_936 * 2048 * 4
    # By hand: 16 bytes for each of 8192 * 151,936 logits.
    assert eager_logit_bytes(8192, shape.vocabulary) == 19_914_555_392


def test_eval_prints_and_writes_json(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # its default is 2
    config = load_config(config_file, [])
    out = tmp_path / "new" / "eval.json"
    arguments = ["eval", config.model.student, "--teacher", config.model.teacher]
    arguments += ["--data", config.data.path, "--limit", "3", "--max-new-tokens", "4"]
    assert main([*arguments, "--out", str(out)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(out.read_text())
    assert (record["count"], record["split"]) == (3, "test")
    assert {"speech", "text", "teacher_text", "held_out_voice", "probes"} <= set(record)


def test_data_synth_makes_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--align", "0", "--train", "2", "--dev", "0", "--test", "0"]
    sizes += ["--test-heldout-voice", "0"]
    out = tmp_path / "data"
    assert main(["data", "synth", "--out", str(out), *sizes, "--quiet"]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert [p.name for p in out.glob("*.parquet")] == ["train-00000.parquet"]


def test_the_installed_command_is_this_function() -> None:
    """What pyproject.toml's console script runs, with its exit status, in a process of its own."""
    code = "import sys; from xopd.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "config", "absent.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("xopd: error: absent.yaml: cannot read the config")


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
    assert build_parser().prog == "xopd"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "pip install '.[train]'"),
        (["train", "x.yaml", "--quiet"], 2, "this command needs yaml: pip install '.[train]'"),
        (["bench", "--help"], 0, "xopd bench report"),
    ],
)
def test_a_missing_package_is_named_and_the_other_commands_work(
    arguments: list[str], status: int, text: str
) -> None:
    code = "import sys; sys.modules['yaml'] = None; from xopd.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert text in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
