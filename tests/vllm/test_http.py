"""Addresses, keys, settings and the command line of a server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.vllm.fake_server import EOS, KEY, VOCABULARY, FakeServer
from tests.vllm.shared import teacher_of
from xopd.schema import ConfigError
from xopd.sections import Dtype
from xopd.vllm.http import Deadline, HttpClient, ServerError
from xopd.vllm.options import (
    HttpConfig,
    ServerConfig,
    TeacherConfig,
    Transport,
    VllmConfig,
    VllmError,
)
from xopd.vllm.server import serve_command
from xopd.vllm.teacher import VllmTeacher
from xopd.vllm.version import check_version


@pytest.mark.parametrize(
    "url",
    [
        "http://192.168.1.2:8000",
        "http://example.com",
        "http://localhost.example.com:8000",
        "http://0.0.0.0:8000",
        "http://127.0.0.1.example.com",
        "http://[::2]:8000",
    ],
)
def test_another_machine_must_be_allowed(url: str) -> None:
    with pytest.raises(VllmError, match="allow_remote"):
        HttpClient(url, HttpConfig())
    HttpClient(url, HttpConfig(allow_remote=True))


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "http://",
        "http://127.0.0.1:70000",
        "http://127.0.0.1:port",
        "http://[::1",
        "http://user:secret@127.0.0.1:8000",
        "http://127.0.0.1:8000/?key=secret",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(VllmError) as caught:
        HttpClient(url, HttpConfig(allow_remote=True))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1/", "http://[::1]:1"])
def test_this_machine_is_allowed(url: str) -> None:
    HttpClient(url, HttpConfig())


def test_a_key_from_a_file(server: tuple[FakeServer, str], tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    client = HttpClient(server[1], HttpConfig(api_key_file=str(path)))
    assert "data" in client.get("/v1/models", Deadline(5.0))
    path.write_text("another")
    with pytest.raises(ServerError, match="api_key_file") as caught:
        HttpClient(server[1], HttpConfig(api_key_file=str(path))).get("/v1/models", Deadline(5.0))
    assert "another" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "two words", "a\nb", "k\u00e9y"])
def test_a_key_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setenv("XOPD_TEST_KEY", text)
    for options in (
        HttpConfig(api_key_file=str(path)),
        HttpConfig(api_key_env="XOPD_TEST_KEY"),
        HttpConfig(api_key_file=str(tmp_path / "absent")),
        HttpConfig(api_key_env="XOPD_TEST_ABSENT"),
    ):
        with pytest.raises(VllmError, match=r"api_key|variable"):
            HttpClient("http://127.0.0.1:1", options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: HttpConfig(api_key_file="a", api_key_env="b"),
        lambda: HttpConfig(deadline_s=0.0),
        lambda: HttpConfig(attempt_s=float("nan")),
        lambda: HttpConfig(retries=-1),
        lambda: VllmConfig(dtype="fp16"),  # type: ignore[arg-type]
        lambda: VllmConfig(max_model_len=0),
        lambda: VllmConfig(gpu_memory_utilization=1.5),
        lambda: VllmConfig(kv_cache_bytes=0),
        lambda: VllmConfig(probe_tolerance=0.0),
        lambda: ServerConfig(nccl_port=0),
        lambda: TeacherConfig(urls=","),
        lambda: TeacherConfig(urls="http://a, http://a"),
        lambda: TeacherConfig(max_dropped=1.0),
    ],
)
def test_settings_that_are_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ConfigError):
        build()


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0", "0.32.1+cpu", "0.33.0rc1", "1.0"])
def test_versions_that_are_taken(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version, "it")
    assert ("tested with" in caplog.text) != version.startswith("0.32")


@pytest.mark.parametrize("version", ["0.28.9", "0.9", "None", "", "v0.32"])
def test_versions_that_are_refused(version: str) -> None:
    with pytest.raises(VllmError):
        check_version(version, "it")


def test_the_command_line_holds_no_key() -> None:
    server = ServerConfig(url="http://127.0.0.1:8123", transport=Transport.NCCL)
    options = VllmConfig(dtype=Dtype.BF16, max_model_len=2048, kv_cache_bytes=10**9)
    command, environment = serve_command("folder", server, options)
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[4:9] == ["folder", "--host", "127.0.0.1", "--port", "8123"]
    assert not any("key" in word for word in command)
    assert environment == {"VLLM_SERVER_DEV_MODE": "1"}


def test_a_prompt_always_goes_to_the_same_replica(
    server: tuple[FakeServer, str], patient: HttpConfig
) -> None:
    port = server[1].rpartition(":")[2]
    urls = f"http://127.0.0.1:{port}, http://localhost:{port},http://127.0.0.1:{port}/"
    options = TeacherConfig(urls=urls, model="student", max_model_len=64)
    teacher = VllmTeacher(options, patient, classes=VOCABULARY, eos_id=EOS)
    picked = [teacher.replica(str(number)) for number in range(300)]
    assert picked == [teacher.replica(str(number)) for number in range(300)]
    assert all(60 < picked.count(i) < 140 for i in range(3))
    assert picked[:8] == [1, 2, 2, 1, 1, 2, 1, 1]  # of every run, on every machine


def test_greedy_answers_come_in_order(server: tuple[FakeServer, str], patient: HttpConfig) -> None:
    server[0].state.answers = lambda ids, limit: [*ids[:limit], EOS]
    prompts = [(5, 6), (7, 8), (9, 9)]
    assert teacher_of(server[1], patient).answer(prompts, 4) == [(*p, EOS) for p in prompts]
