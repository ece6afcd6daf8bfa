"""What stands before every request: key, host, sizes, times, and one line in the log."""

import asyncio
import hmac
import ipaddress
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from graft.errors import UsageError
from graft.serve.metrics import Meter
from graft.serve.replies import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY = "GRAFT_API_KEY"
"""The environment variable of the key; the command line can be seen by every user of a machine."""
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_NOTES = "graft.notes"


@dataclass(frozen=True)
class Limits:
    """Bounds on requests."""

    body_bytes: int = 4 * 2**20
    headers: int = 100
    read_seconds: float = 15.0
    """For the headers, and again for the body."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    host: str = "127.0.0.1"
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is not None and (len(self.key) < 8 or not self.key.isascii() or not self.key.isprintable()):
            raise UsageError("the API key must have at least 8 printable ASCII characters", "choose a longer one")
        if self.key is None and not is_local(self.host):
            raise UsageError(f"--host {self.host} is reached from other machines, which demands a key", f"set {KEY}")

    def check(self, headers: dict[bytes, bytes], path: str) -> None:
        """Raise `Refusal` for a request without the key or, where there is none, from a page of another origin: a
        web page may let its name point to this machine (DNS rebinding), but not choose the Host header.
        """
        if self.key is not None:
            given = headers.get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            right = hmac.compare_digest(token.strip(), self.key.encode())
            if path != "/health" and not (right and scheme.lower() == b"bearer"):
                said = "the API key is missing or wrong: send `Authorization: Bearer KEY`"
                raise Refusal(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            return
        allowed = _LOCAL | {self.host.lower()}
        origin = headers.get(b"origin")
        for name, host in (("Host", _host(headers.get(b"host", b""))), ("Origin", _host(origin, True))):
            if host is not None and host not in allowed:
                raise Refusal(403, f"{name} is not this machine; start the server with a key to be reached so")


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host.lower() in _LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(value: bytes | None, whole: bool = False) -> str | None:
    """The name in a Host or Origin header without its port; "" where it cannot be read, None without the header."""
    if value is None:
        return None
    with suppress(ValueError):
        text = value.decode("ascii", "replace")
        return (urlsplit(text if whole else f"//{text}").hostname or "").lower()
    return ""


def key_from(option: str | None) -> str | None:
    """The key: as given, or of the environment."""
    return option or os.environ.get(KEY) or None


def log_line(event: str, **told: Any) -> None:
    """One JSON object on standard error."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": event} | told), file=sys.stderr, flush=True)


def notes_of(scope: Scope) -> dict[str, Any]:
    """What the log tells of a request: model and figures, never texts, keys or paths."""
    notes: dict[str, Any] = scope.setdefault(_NOTES, {})
    return notes


class Guard:
    """The application behind these checks. Whatever fails inside becomes an answer, and never a traceback."""

    def __init__(self, inner: Application, access: Access, limits: Limits, meter: Meter, quiet: bool = False) -> None:
        self.inner, self.access, self.limits, self.meter, self.quiet = inner, access, limits, meter, quiet
        self.number = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":  # there is nothing to do at the start, and sockets are not offered
            return
        started = time.monotonic()
        status = 0
        self.number += 1
        number = self.number

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", f"{number}".encode())]
            await send(message)

        try:
            body = await self._checked(scope, receive)
            await self.inner(scope, _replayed(body, receive), watched)
        except Exception as error:
            if not isinstance(error, Refusal):
                self.meter.fault(error)
                error = Refusal(500, "the server failed at this request", code="internal_error")
            if not status:
                if error.status in (408, 413):  # the rest of the body is not read
                    error.headers["Connection"] = "close"
                await error.reply()(scope, receive, watched)
        finally:
            if status >= 400:
                self.meter.refused(status)
            if not self.quiet:
                seconds = round(time.monotonic() - started, 4)
                told = {"id": number, "path": _known(scope), "status": status or None, "seconds": seconds}
                log_line("request", **told, **notes_of(scope))

    async def _checked(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises `Refusal`."""
        if len(scope["headers"]) > self.limits.headers:
            raise Refusal(400, f"{len(scope['headers']):,} headers, {self.limits.headers} are allowed")
        headers = dict(scope["headers"])
        self.access.check(headers, scope["path"])
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated[:20]) > self.limits.body_bytes:
            raise self._too_large()
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b""
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > self.limits.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {self.limits.read_seconds:g} s") from None

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self.limits.body_bytes:,} bytes", code="body_too_large")


def _known(scope: Scope) -> str | None:
    """The route of a request; what a client made up is not logged."""
    route = scope.get("route")
    return getattr(route, "path", None)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, then what comes behind it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
