"""`xopd serve`: what it would start, and what it refuses."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from xopd.cli import main
from xopd.models import load_student

CONFIG = "model: {student: STUDENT, teacher: TEACHER}\ndata: {path: corpus}\n"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_the_student(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["server.url=http://127.0.0.1:8123", "vllm.max_model_len=512"]
    assert main(["serve", "student", config, *overrides, "--print"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"VLLM_SERVER_DEV_MODE=1 {sys.executable} -m vllm.")
    assert "--host 127.0.0.1 --port 8123" in text
    assert "--max-model-len 512" in text


def test_the_second_teacher(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    urls = "teacher.urls=http://127.0.0.1:8001,http://127.0.0.1:8002"
    assert main(["serve", "teacher", config, urls, "--replica", "1", "--print"]) == 0
    text = capsys.readouterr().out
    assert "--model TEACHER --host 127.0.0.1 --port 8002" in text
    assert "DEV_MODE" not in text
    assert main(["serve", "teacher", config, urls, "--replica", "2", "--print"]) == 2
    assert "give 0 to 1" in capsys.readouterr().err


def test_no_teacher_is_served(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "teacher", config, "--print"]) == 2
    assert "set teacher.urls" in capsys.readouterr().err


def test_an_exported_student_is_a_plain_language_model(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = repository / "xopd/assets/demo/student", tmp_path / "out"
    assert main(["export", str(source), str(out), "--dtype", "fp32"]) == 0
    student = load_student(str(source))
    exported = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(12, 40)[None]
    with torch.no_grad():
        expected = student.model(input_ids=ids).logits
        torch.testing.assert_close(exported(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert main(["export", str(source), str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["student", "teacher"])
def test_an_address_elsewhere_needs_to_be_allowed(
    config: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["server.url=http://0.0.0.0:8000", "teacher.urls=http://0.0.0.0:8001"]
    assert main(["serve", what, config, *urls, "--print"]) == 2
    assert "http.allow_remote" in capsys.readouterr().err
    assert main(["serve", what, config, *urls, "http.allow_remote=true", "--print"]) == 0
    assert "--host 0.0.0.0" in capsys.readouterr().out


def test_a_server_needs_vllm_here(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("xopd.vllm.local.version", missing)
    assert main(["serve", "teacher", config, "teacher.urls=http://127.0.0.1:8001"]) == 2
    assert "pip install vllm" in capsys.readouterr().err
