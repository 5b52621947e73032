"""A server that speaks as vLLM does, and as it does when something is wrong with it.

Faults of transport can strike any route; a fault of content changes the proper answer of one. The
server reads weights from a folder and computes fingerprints of them, so that a restart with old
weights is a restart with old weights.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xopd.models import TextLM
from xopd.rollout import generate
from xopd.types import Modality, Prompt
from xopd.vllm.worker import bit_sum

MODEL, KEY = "student", "a-key-of-this-test"
VOCABULARY, EOS = 50, 1
RESERVED = (0, 2, 49)
HANG_S = 30.0  # far beyond every deadline of the tests

START = ("/version", "/v1/models")
CALL = ("/v1/completions",)
SYNC = ("/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/weight_info")
PHASES = {"start": START, "call": CALL, "sync": SYNC}

Body = dict[str, Any]
Content = Callable[[Body], object]
Scores = Callable[[list[int]], list[float]]
Answers = Callable[[list[int], int], list[int]]


@dataclass
class State:
    """What the server holds, and how it misbehaves."""

    folder: Path
    transport: str | None = None  # a name in TRANSPORT
    content: Content | None = None  # changes a proper answer in place, or returns another
    routes: tuple[str, ...] = ()  # where the fault strikes
    spared: int = 0  # requests before it strikes for the first time
    strikes: int = 10**9  # how often
    version: str = "0.32.0"
    model: str = MODEL
    max_model_len: object = 64
    label: str = "default"
    weights: dict[str, list[str]] = field(default_factory=dict)
    scores: Scores | None = None  # a model's; None: made up
    refuses: Callable[[list[int]], bool] | None = None  # prompts that it answers with status 400
    answers: Answers | None = None  # greedy ones of a model; None: made up
    requests: list[tuple[str, Body]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_struck(self, route: str) -> bool:
        """Whether the fault strikes this request."""
        with self.lock:
            if route not in self.routes or self.strikes <= 0:
                return False
            if self.spared > 0:
                self.spared -= 1
                return False
            self.strikes -= 1
            return True

    def restart(self) -> None:
        """Lose what was sent, as a server does that came back with its first weights."""
        self.label, self.weights = "default", {}


class FakeServer(ThreadingHTTPServer):
    """Its `state` may change while it runs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # all connections of some ranks at once, on a busy machine

    def __init__(self, state: State) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = state

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is what the tests are about."""


@contextmanager
def running(folder: Path) -> Iterator[tuple[FakeServer, str]]:
    """A server and its address."""
    server = FakeServer(State(folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self._answer(json.loads(self.rfile.read(length)))

    def _answer(self, body: Body) -> None:
        state = self.server.state
        state.requests.append((self.path, body))
        self.close_connection = True
        if state.is_struck(self.path):
            if state.transport is not None:
                TRANSPORT[state.transport](self)
                return
            answer = self._proper(body)
            if state.content is not None:
                changed = state.content(answer)
                answer = answer if changed is None else changed
            self.send_json(json.dumps(answer).encode())
            return
        is_score = body.get("prompt_logprobs") is not None
        if is_score and state.refuses is not None and state.refuses(body["prompt"]):
            self.send_json(b'{"error": "too hard"}', status=400)
            return
        if self.path.startswith("/v1/") and self.headers["Authorization"] != f"Bearer {KEY}":
            self.send_json(b'{"error": "Unauthorized"}', status=401)
            return
        self.send_json(json.dumps(self._proper(body)).encode())

    def send_json(
        self, content: bytes, *, status: int = 200, length: int | None = None, **headers: str
    ) -> None:
        """An answer with these headers besides its length and type."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in named.items():
            self.send_header(name, value)
        if "Transfer-Encoding" not in named:
            self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        """End the connection with an RST, as the kernel does for a process that died."""
        self.wfile.flush()
        option = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()

    def hang(self) -> None:
        """Say nothing more until the client has long gone."""
        self.wfile.flush()
        self.server.state.ended.wait(HANG_S)

    def _proper(self, body: Body) -> Any:
        state = self.server.state
        if self.path == "/version":
            return {"version": state.version}
        if self.path == "/v1/models":
            return {"data": [{"id": state.model, "max_model_len": state.max_model_len}]}
        if self.path == "/weight_info":
            return {"weight_version": state.label}
        if self.path == "/reset_prefix_cache":
            return {"success": True}
        if self.path == "/update_weight_version":
            state.label = body["new_version"]
            return {"success": True, "new_version": state.label}
        if self.path == "/collective_rpc":
            return {"results": [self._rpc(body)]}
        if self.path == "/v1/completions":
            identity = f"cmpl-{self.headers['X-Request-Id']}"
            return completion(body, identity, state)
        return {}

    def _rpc(self, body: Body) -> Any:
        state = self.server.state
        if body["method"] == "reload_weights":
            folder = Path(body["kwargs"]["weights_path"])
            state.weights = {
                name: [str(tensor.numel()), str(bit_sum(tensor))]
                for file in sorted(folder.glob("*.safetensors"))
                for name, tensor in load_file(file).items()
            }
            return None
        names = json.loads(body["args"][0])
        return {name: state.weights[name] for name in names if name in state.weights}


def completion(body: Body, identity: str, state: State) -> Body:
    """What `/v1/completions` answers: a trajectory that the seed decides, or scores."""
    prompt = body.get("prompt", [0] * 5)  # of embeddings only the number is known
    choice: Body = {"index": 0, "text": "", "prompt_token_ids": prompt}
    if body.get("prompt_logprobs") is not None:
        made_up = state.scores is None
        values = map(score_of, prompt) if made_up else state.scores(prompt)
        rows = [
            {str(token): {"logprob": value, "rank": 1}}
            for token, value in zip(prompt, values, strict=True)
        ]
        choice |= {"token_ids": [7], "prompt_logprobs": [None, *rows[1:]]}
    else:
        limit = body["max_tokens"]
        is_greedy = state.answers is not None and body["temperature"] == 0
        ids = state.answers(prompt, limit) if is_greedy else tokens_of(body.get("seed", 0), limit)
        is_finished = ids[-1] in body["stop_token_ids"]
        choice |= {
            "token_ids": ids,
            "finish_reason": "stop" if is_finished else "length",
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in ids],
                "token_logprobs": [score_of(token) for token in ids],
            },
        }
    count = len(choice["token_ids"])
    usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
    return {"id": identity, "model": body["model"], "choices": [choice], "usage": usage}


def tokens_of(seed: int, max_tokens: int) -> list[int]:
    """Even seeds end by themselves, odd ones are cut; no two seeds give the same."""
    body = [3 + (seed + i) % 40 for i in range(max_tokens)]
    return [*body[:-2], EOS] if seed % 2 == 0 else body


@torch.no_grad()
def scores_of(lm: TextLM, ids: list[int]) -> list[float]:
    """A model's log-probs of ids given those before them; of the first one any number."""
    logprob = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [0.0, *(float(logprob[i, token]) for i, token in enumerate(ids[1:]))]


def answer_of(lm: TextLM, ids: list[int], limit: int) -> list[int]:
    """A model's greedy response."""
    prompt = Prompt("", "", tuple(ids), tuple(ids), torch.zeros(0, 0), "", "")
    (response,) = generate(lm, [prompt], Modality.TEXT, max_new_tokens=limit)
    return list(response)


def score_of(token: int) -> float:
    """The log-prob of a token."""
    return -0.125 * (token + 1)


def _raw(text: bytes) -> Callable[[Handler], None]:
    def send(handler: Handler) -> None:
        handler.wfile.write(text)

    return send


def _json(content: bytes, status: int = 200, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.send_json(content, status=status, **headers)


def _after(text: bytes, act: Callable[[Handler], None]) -> Callable[[Handler], None]:
    def send(handler: Handler) -> None:
        handler.wfile.write(text)
        act(handler)

    return send


def _drip(handler: Handler, text: bytes) -> None:
    end_s = time.monotonic() + HANG_S
    for i in range(len(text)):
        if handler.server.state.ended.wait(0.02) or time.monotonic() > end_s:
            return
        handler.wfile.write(text[i : i + 1])


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
TRANSPORT: dict[str, Callable[[Handler], None]] = {
    "status_500": _json(b'{"error": "internal"}', 500),
    "status_503": _json(b'{"error": "starting"}', 503),
    "status_429_for_long": _json(b"{}", 429, Retry_After="1000"),
    "status_429_in_words": _json(b"{}", 429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"),
    "status_400": _json(b'{"error": "bad request"}', 400),
    "status_401": _json(b'{"error": "Unauthorized"}', 401),
    "status_404": _json(b'{"detail": "Not Found"}', 404),
    "status_204": _json(b"", 204),
    "redirect": _json(b"", 307, Location="http://127.0.0.2:9/elsewhere"),
    "reset_before_headers": lambda handler: handler.reset(),
    "reset_in_headers": _after(HEAD, lambda handler: handler.reset()),
    "reset_in_body": _after(HEAD + b'Content-Length: 100\r\n\r\n{"a', lambda h: h.reset()),
    "close_before_headers": _raw(b""),
    "hang_before_headers": lambda handler: handler.hang(),
    "hang_in_headers": _after(HEAD, lambda handler: handler.hang()),
    "hang_in_body": _after(HEAD + b'Content-Length: 100\r\n\r\n{"a', lambda h: h.hang()),
    "hang_in_open_body": _after(HEAD + b"Connection: close\r\n\r\n{}", lambda h: h.hang()),
    "drip_headers": lambda handler: _drip(handler, HEAD + b"X: " + b"y" * 10_000),
    "drip_body": lambda h: _drip(h, HEAD + b"Content-Length: 10000\r\n\r\n" + b" " * 10_000),
    "endless_continue": lambda h: _drip(h, b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "half_json": _json(b'{"id": "cmpl-'),
    "short_body": lambda handler: handler.send_json(b'{"a": 1}', length=50),
    "short_body_that_parses": lambda handler: handler.send_json(b"{}", length=50),
    "empty_object": _json(b"{}"),
    "html": _json(b"<html></html>", Content_Type="text/html"),
    "no_content_type": _raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
    "json_list": _json(b"[1, 2]"),
    "json_null": _json(b"null"),
    "not_a_number": _json(b'{"a": NaN}'),
    "double_key": _json(b'{"id": 1, "id": 2}'),
    "deep_json": _json(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "huge_number": _json(b'{"a": ' + b"9" * 10_000 + b"}"),
    "bad_utf8": _json(b'{"a": "\xff\xfe"}'),
    "huge_body": _json(b" " * 3_000_000),
    "endless_body": _after(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 40,
        lambda handler: handler.hang(),
    ),
    "broken_chunks": _raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}"),
    "chunk_size_in_words": _raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nfive\r\n{}"),
    "compressed": _json(b"\x1f\x8b\x08\x00", Content_Encoding="gzip"),
    "no_http": _raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "long_header": _raw(HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n{}"),
}
# What passes when it is tried again.
PASSING = (
    *("status_500", "status_503", "reset_before_headers", "reset_in_body", "close_before_headers"),
    *("hang_before_headers", "hang_in_body", "drip_body", "half_json", "short_body"),
)
