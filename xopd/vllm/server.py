"""A `vllm serve` that samples for the trainer: how it is started, called and given new weights.

Trajectories come from ``/v1/completions``, one call each, with the ids or, for speech, the
embeddings of the prompt. Weights come by way of a folder that both sides see, or from GPU to GPU.
The routes that control weights and caches are vLLM's development routes: they need
``VLLM_SERVER_DEV_MODE=1``, take no key, and so belong on a loopback address.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from xopd.sections import Dtype
from xopd.vllm.answers import Generated, generated
from xopd.vllm.engine import Call, Sampling
from xopd.vllm.folder import write_weights
from xopd.vllm.http import Deadline, HttpClient, Json, ServerError
from xopd.vllm.local import bias, common_settings
from xopd.vllm.nccl import NcclSender
from xopd.vllm.options import (
    DTYPE_NAMES,
    HttpConfig,
    ServerConfig,
    TeacherConfig,
    Transport,
    VllmConfig,
    checked_url,
)
from xopd.vllm.sync import Fingerprint, LanguageModel, check_fingerprint, fingerprint_request
from xopd.vllm.version import check_version

# The route clamps biases to this; a token's chance is below 1e-43 of the others'.
UNLIKELY = -100.0
START_S = 30.0  # a server that is there when a run starts answers sooner
A = TypeVar("A")
B = TypeVar("B")


class ServerBackend:
    """A server of the student; see `xopd.vllm.engine.Backend`."""

    def __init__(self, server: ServerConfig, http: HttpConfig, options: VllmConfig) -> None:
        """Refuses a server that is away, too old, or serves something else."""
        self._server, self._http = server, http
        self._client = HttpClient(server.url, http)
        self._nccl: NcclSender | None = None
        check_server(self._client, "student", server.model, options.max_model_len, http)

    def load(self, weights: LanguageModel, version: int) -> None:
        """See `Backend`."""
        deadline = Deadline(self._http.deadline_s)
        if self._server.transport is Transport.NCCL:
            if self._nccl is None:
                self._nccl = NcclSender(self._client, self._server, self._http, weights)
            self._nccl.send()
        else:
            write_weights(weights, Path(self._server.folder))
            body = {
                "method": "reload_weights",
                "kwargs": {"weights_path": str(Path(self._server.folder).resolve())},
            }
            # Large weights take as long as they take, and a second order would not hurry them.
            self._client.post("/collective_rpc", body, deadline, is_long=True)
        self._forget(deadline)
        self._client.post("/update_weight_version", {"new_version": str(version)}, deadline)

    def check(self, expected: dict[str, Fingerprint], version: int) -> None:
        """See `Backend`; a server that was restarted has neither label nor weights."""
        deadline = Deadline(self._http.deadline_s)
        label = self._client.get("/weight_info", deadline).get("weight_version")
        if label != str(version):
            raise ServerError(
                f"server {self._client.name} has weights {str(label)[:40]!r}, not {version}: it "
                "was restarted, or another run sends it weights. Resume this run with a server of "
                "its own."
            )
        body = {"method": "xopd_fingerprint", "args": [fingerprint_request(expected)]}
        reply = self._client.post("/collective_rpc", body, deadline)
        check_fingerprint(expected, _workers(self._client.name, reply.body))

    def generate(self, calls: Sequence[Call], sampling: Sampling) -> list[Generated]:
        """See `Backend`; the first call that fails ends the others that have not begun."""
        deadline = Deadline(self._http.deadline_s)
        common = common_settings(sampling) | {
            "model": self._server.model,
            "logit_bias": {str(token): v for token, v in bias(sampling, UNLIKELY).items()},
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        del common["detokenize"]  # a server always does

        def work(call: Call) -> Generated:
            body = common | _prompt(call) | {"seed": call.seed}
            reply = self._client.post("/v1/completions", body, deadline)
            ids = call.prompt_ids if call.embeds is None else None
            with naming(self._client, "a sample"):
                return generated(reply, sampling.wanted(call), ids)

        found = in_parallel(work, calls, self._http.connections, stop_at_first=True)
        return unless_failed(found)

    def rest(self) -> None:
        """A server has GPUs of its own."""

    def close(self) -> None:
        """The server lives on; only what holds its GPUs together with ours goes."""
        if self._nccl is not None:
            self._nccl.close()

    def _forget(self, deadline: Deadline) -> None:
        reply = self._client.post("/reset_prefix_cache", {}, deadline)
        if reply.body.get("success") is not True:
            raise ServerError(
                f"server {self._client.name} keeps its prefix cache, so requests of somebody else "
                "are under way: give this run a server of its own."
            )
        self._client.post("/reset_mm_cache", {}, deadline)
        self._client.post("/reset_encoder_cache", {}, deadline)


_SKIPPED = "not sent, because another call failed"


@contextmanager
def naming(client: HttpClient, what: str) -> Iterator[None]:
    """Name the server in the error of an answer that cannot be used."""
    try:
        yield
    except ServerError as error:
        raise ServerError(
            f"server {client.name} gave {what} that cannot be used: {error}."
        ) from error


def unless_failed(found: Sequence[B | ServerError]) -> list[B]:
    """All of them, or the error of the first that failed by itself."""
    answers: list[B] = []
    for one in found:
        if isinstance(one, ServerError):
            errors = [error for error in found if isinstance(error, ServerError)]
            raise next(error for error in errors if str(error) != _SKIPPED)
        answers.append(one)
    return answers


def in_parallel(
    work: Callable[[A], B], items: Sequence[A], connections: int, *, stop_at_first: bool
) -> list[B | ServerError]:
    """What `work` gives for each item, in order, or the error that it raised."""
    has_failed = Event()
    found: dict[int, B | ServerError] = {}
    numbers = iter(range(len(items)))
    lock = Lock()

    def loop() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            if has_failed.is_set():
                found[number] = ServerError(_SKIPPED)
                continue
            try:
                found[number] = work(items[number])
            except ServerError as error:
                if stop_at_first:
                    has_failed.set()
                found[number] = error

    # Daemons: a process that is told to end does not wait for calls that are under way.
    count = min(connections, len(items))
    threads = [Thread(target=loop, name="call", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < len(items):
        raise RuntimeError("a call failed in its thread, whose traceback is above")
    return [found[number] for number in range(len(items))]


def check_server(
    client: HttpClient, what: str, model: str, max_model_len: int, http: HttpConfig
) -> None:
    """Refuse a server that is away, too old, serves another name, or takes too few tokens.

    what: "student" or "teacher", of which it is the server.
    """
    urls, section = ("server.url", "vllm") if what == "student" else ("teacher.urls", "teacher")
    try:
        _check_server(
            client, model, max_model_len, section, Deadline(min(START_S, http.deadline_s))
        )
    except ServerError as error:
        raise ServerError(
            f"{error} ({urls} names it; `xopd serve {what} CONFIG` starts one)"
        ) from error


def _check_server(
    client: HttpClient, model: str, max_model_len: int, section: str, deadline: Deadline
) -> None:
    check_version(str(client.get("/version", deadline).get("version")), f"server {client.name}")
    cards = client.get("/v1/models", deadline).get("data")
    served = {
        str(card["id"]): card.get("max_model_len")
        for card in (cards if isinstance(cards, list) else [])
        if isinstance(card, dict) and "id" in card
    }
    if model not in served:
        raise ServerError(
            f"server {client.name} serves {sorted(served)}, not {model!r}: name what it serves, or "
            "start it with --served-model-name."
        )
    length = served[model]
    if not isinstance(length, int) or isinstance(length, bool) or length < max_model_len:
        raise ServerError(
            f"server {client.name} takes {length} tokens, and {section}.max_model_len is "
            f"{max_model_len}: start it with a higher --max-model-len, or lower "
            f"{section}.max_model_len."
        )


def serve_command(
    folder: str, server: ServerConfig, options: VllmConfig, *, allow_remote: bool = False
) -> tuple[list[str], dict[str, str]]:
    """The command line of a server of the student, and what its environment must hold.

    The key is no part of either: set VLLM_API_KEY in the environment, where `ps` does not show it.
    """
    command = _command(folder, server.url, server.model, options.dtype, allow_remote)
    for name, value in (
        ("--max-model-len", options.max_model_len),
        ("--max-num-seqs", options.max_num_seqs),
        ("--tensor-parallel-size", options.tensor_parallel),
        ("--gpu-memory-utilization", options.gpu_memory_utilization),
        ("--logprobs-mode", "processed_logprobs"),
        ("--worker-extension-cls", "xopd.vllm.worker.Fingerprints"),
    ):
        command += [name, str(value)]
    command += ["--enable-prompt-embeds"]
    if options.kv_cache_bytes is not None:
        command += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    if options.enforce_eager:
        command += ["--enforce-eager"]
    if server.transport is Transport.NCCL:
        command += ["--load-format", "dummy", "--weight-transfer-config", '{"backend": "nccl"}']
    return command, {"VLLM_SERVER_DEV_MODE": "1"}


def teacher_command(
    folder: str, url: str, options: TeacherConfig, dtype: Dtype, *, allow_remote: bool = False
) -> list[str]:
    """The command line of a server of the teacher, which needs none of the control routes."""
    command = _command(folder, url, options.model, dtype, allow_remote)
    command += ["--max-model-len", str(options.max_model_len)]
    command += ["--tensor-parallel-size", str(options.tensor_parallel)]
    command += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.kv_cache_bytes is not None:
        command += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    return [*command, *(["--enforce-eager"] if options.enforce_eager else [])]


def _command(folder: str, url: str, model: str, dtype: Dtype, allow_remote: bool) -> list[str]:
    """What both have in common. The module, because the CPU build has no working `vllm serve`."""
    parts = checked_url(url, allow_remote=allow_remote)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", str(parts.hostname), "--port", str(parts.port or 80)]
    command += ["--served-model-name", model, "--dtype", DTYPE_NAMES[dtype]]
    # Ids in and ids out: a tokenizer would only cost the server time.
    return [*command, "--generation-config", "vllm", "--skip-tokenizer-init"]


def _prompt(call: Call) -> dict[str, Any]:
    if call.embeds is None:
        return {"prompt": list(call.prompt_ids)}
    return {"prompt_embeds": encoded(call.embeds)}


def encoded(tensor: Tensor) -> str:
    """A tensor as vLLM reads one from JSON: `torch.save` in base64."""
    buffer = io.BytesIO()
    torch.save(tensor.contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _workers(name: str, body: Mapping[str, Json]) -> list[dict[str, list[str]]]:
    """What each worker of a server said to `xopd_fingerprint`."""
    results = body.get("results")
    workers: list[dict[str, list[str]]] = []
    for worker in results if isinstance(results, list) else []:
        if not isinstance(worker, dict):
            continue
        workers.append(
            {
                key: [str(value) for value in values]
                for key, values in worker.items()
                if isinstance(values, list)
            }
        )
    if not workers:
        raise ServerError(
            f"server {name} gives no fingerprint of its weights: start it with "
            "--worker-extension-cls xopd.vllm.worker.Fingerprints."
        )
    return workers
