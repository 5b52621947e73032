"""One small HTTP client for vLLM servers: JSON in, JSON out, and never past a deadline.

It is built on the standard library for what the common clients leave out: a deadline for a whole
exchange (a server that drips a byte a second resets the read timeout of the others for ever), no
proxies, no redirects, no cookies, a limit on what is read, and JSON without NaN or double keys.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

from xopd.vllm.options import HttpConfig, VllmError, checked_url

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
MAX_BACKOFF_S = 30.0
_PIECE = 1 << 16
_SHOWN = 300  # characters of a server's own words in an error


class ServerError(VllmError):
    """A server that did not answer, or whose answer cannot be used."""


class _AttemptError(Exception):
    """One try that failed; `ServerError` says so once no other is left."""

    def __init__(self, reason: str, *, may_retry: bool, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.may_retry, self.wait_s = may_retry, wait_s


class _Patience(NamedTuple):
    """With one call."""

    tries: int
    longest_s: float  # of each


class Deadline:
    """A moment by which something must be over; shared by all calls that belong together."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end_s = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds until then; 0 when it has passed."""
        return max(0.0, self._end_s - time.monotonic())


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered."""

    body: dict[str, Json]
    request_id: str  # the one that was sent


class HttpClient:
    """Calls to one server. Safe to share between threads: each call has its own connection."""

    def __init__(self, url: str, options: HttpConfig) -> None:
        self._parts = checked_url(url, allow_remote=options.allow_remote)
        self._options = options
        self._key = options.api_key()
        self._random = random.Random()  # its own: waiting must not move a seeded generator

    @property
    def name(self) -> str:
        """HOST:PORT, for messages."""
        return f"{self._parts.hostname}:{self._port}"

    @property
    def _port(self) -> int:
        return self._parts.port or (443 if self._parts.scheme == "https" else 80)

    def get(self, path: str, deadline: Deadline) -> dict[str, Json]:
        """The JSON object at a path."""
        patience = _Patience(self._options.retries + 1, self._options.attempt_s)
        return self._call("GET", path, None, deadline, patience).body

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        deadline: Deadline,
        *,
        may_repeat: bool = True,
        is_long: bool = False,
    ) -> Reply:
        """Send a JSON object and get one.

        may_repeat: whether the server may see it twice. is_long: a try has until the deadline.
        """
        content = json.dumps(body, allow_nan=False).encode()
        longest_s = deadline.seconds if is_long else self._options.attempt_s
        tries = self._options.retries + 1 if may_repeat else 1
        return self._call("POST", path, content, deadline, _Patience(tries, longest_s))

    def _call(
        self, method: str, path: str, body: bytes | None, deadline: Deadline, patience: _Patience
    ) -> Reply:
        tries, longest_s = patience
        reason = "no time was left to call it"
        for number in range(tries):
            limit_s = min(longest_s, deadline.left_s())
            if limit_s <= 0:
                break
            try:
                return self._attempt(method, path, body, limit_s)
            except _AttemptError as error:
                reason = str(error)
                if not error.may_retry or number + 1 == tries:
                    break
                wait_s = max(error.wait_s, self._backoff_s(number))
            if wait_s >= deadline.left_s():
                reason += f"; no time is left of {deadline.seconds:g} s for another try"
                break
            time.sleep(wait_s)
        raise ServerError(f"server {self.name}, {method} {path}: {reason}.")

    def _backoff_s(self, number: int) -> float:
        """Anything up to twice as long as last time: callers that failed together spread out."""
        longest_s: float = min(MAX_BACKOFF_S, self._options.backoff_s * 2.0**number)
        return self._random.uniform(longest_s / 2, longest_s)

    def _attempt(self, method: str, path: str, body: bytes | None, limit_s: float) -> Reply:
        connection = self._connection(limit_s)
        watchdog = _Watchdog(connection, limit_s)
        request_id = uuid.uuid4().hex
        try:
            with watchdog:
                return self._exchange(connection, method, path, body, request_id)
        except (OSError, http.client.HTTPException) as error:
            if watchdog.has_fired or isinstance(error, TimeoutError):
                reason = f"no complete answer within {limit_s:.3g} s"
                raise _AttemptError(reason, may_retry=True) from error
            words = str(error).rstrip(".") or "the connection ended"
            reason = f"{type(error).__name__}: {words[:_SHOWN]}"
            raise _AttemptError(reason, may_retry=not isinstance(error, ssl.SSLError)) from error
        finally:
            watchdog.stop()
            connection.close()

    def _connection(self, limit_s: float) -> http.client.HTTPConnection:
        host, port = str(self._parts.hostname), self._port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=limit_s, context=context)
        return http.client.HTTPConnection(host, port, timeout=limit_s)

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        request_id: str,
    ) -> Reply:
        headers = {"Accept": "application/json", "X-Request-Id": request_id}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
        response = connection.getresponse()
        content = self._content(response)
        if response.status != 200:
            _refuse_status(response, content)
        return Reply(_json_object(response, content), request_id)

    def _content(self, response: http.client.HTTPResponse) -> bytes:
        content = bytearray()
        while piece := response.read(_PIECE):
            content += piece
            if len(content) > self._options.max_response_bytes:
                raise _AttemptError(
                    f"its answer is longer than max_response_bytes "
                    f"{self._options.max_response_bytes}",
                    may_retry=False,
                )
        if response.length:  # what Content-Length still promises
            raise _AttemptError(
                f"its answer broke off {response.length} bytes early", may_retry=True
            )
        return bytes(content)


class _Watchdog:
    """Cuts a connection at its limit, in whatever state it is; a timeout of each read does not."""

    def __init__(self, connection: http.client.HTTPConnection, limit_s: float) -> None:
        self._connection = connection
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(limit_s, self._cut)
        self._timer.daemon = True
        self.has_fired = False

    def __enter__(self) -> None:
        self._timer.start()
        self._connection.connect()  # its own timeout ends it where there is no socket to cut
        # http.client lets go of the socket when the server ends the connection after its answer.
        self._socket = self._connection.sock
        if self.has_fired:
            raise TimeoutError

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.has_fired:  # a body that ends with its connection looks complete when it is cut
            raise TimeoutError

    def stop(self) -> None:
        """Fire no more; also where the connection was never made."""
        self._timer.cancel()

    def _cut(self) -> None:
        self.has_fired = True
        cut = self._socket or self._connection.sock
        if cut is not None:
            with contextlib.suppress(OSError):  # it may end by itself in this moment
                cut.shutdown(socket.SHUT_RDWR)


def _refuse_status(response: http.client.HTTPResponse, content: bytes) -> NoReturn:
    status = response.status
    if 300 <= status < 400:
        reason = f"it redirects (status {status}), which is not followed: name the server itself"
        raise _AttemptError(reason, may_retry=False)
    words = " ".join(content.decode("utf-8", "replace").split())[:_SHOWN]
    hint = {
        401: "; set http.api_key_file or http.api_key_env to the key that it was started with",
        404: "; it may be another program, another version of vLLM, or not started by xopd serve",
    }.get(status, "")
    raise _AttemptError(
        f"status {status}{hint}: {words!r}",
        may_retry=status in RETRIED,
        wait_s=_retry_after_s(response.getheader("Retry-After")),
    )


def _retry_after_s(header: str | None) -> float:
    """Seconds that a server asks to be left alone; its other form, a date, counts as none."""
    try:
        seconds = float(header or 0.0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _json_object(response: http.client.HTTPResponse, content: bytes) -> dict[str, Json]:
    if not content:
        # Some control routes of vLLM answer with a status alone.
        return {}
    kind = response.getheader("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _AttemptError(f"its answer is {kind!r}, not application/json", may_retry=False)
    try:
        found = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_no_double_keys)
    except (ValueError, RecursionError) as error:
        reason = f"its answer is no proper JSON ({str(error)[:_SHOWN]})"
        raise _AttemptError(reason, may_retry=True) from error
    if not isinstance(found, dict):
        raise _AttemptError("its answer is JSON, but no object", may_retry=False)
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _no_double_keys(pairs: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found
