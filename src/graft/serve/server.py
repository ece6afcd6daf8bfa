"""The server's process: its socket, its signals, and how it ends."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from graft.errors import ResourceError, UsageError
from graft.serve.app import Service, make_app
from graft.serve.security import Access, Guard, Limits, log_line

_HEADER_BYTES = 64 * 2**10
_MOST_CONNECTIONS = 1024
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address, before anything is loaded: who asks meanwhile waits. Raises `ResourceError`
    where it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host}: no such address", "give 127.0.0.1, or an address of this machine") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(_BACKLOG)  # or a second server could bind it too, and would fail when its model is loaded
    except OSError as error:
        found.close()
        said = f"port {port} of {host} cannot be used ({error.strerror})"
        raise ResourceError(said, "give another with --port") from None
    found.set_inheritable(True)
    return found


class _Impatient(H11Protocol):
    """uvicorn's protocol, which waits for a request's headers for ever, with a limit on that."""

    patience = 15.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._between():
            self._watch()
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _between(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self._between() and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    service: Service,
    listening: socket.socket,
    access: Access,
    limits: Limits,
    *,
    grace: float = 30.0,
    ready: Callable[[], None] = lambda: None,
    quiet: bool = False,
) -> int:
    """Serve until SIGTERM or Ctrl-C: then no more requests are taken, and those in flight go on for `grace` seconds.
    A second signal ends at once. Gives the exit code: 0, or 130 after Ctrl-C.
    """
    for name in ("uvicorn.error", "uvicorn.access", "uvicorn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it would quote requests
    guarded = Guard(make_app(service), access, limits, service.meter, quiet)
    protocol = type("Impatient", (_Impatient,), {"patience": limits.read_seconds})
    config = uvicorn.Config(
        guarded, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        h11_max_incomplete_event_size=_HEADER_BYTES, timeout_keep_alive=int(limits.read_seconds) or 1,
        timeout_graceful_shutdown=5, limit_concurrency=_MOST_CONNECTIONS, proxy_headers=False,
    )  # fmt: skip
    server = _Server(config)
    return asyncio.run(_serve(service, server, listening, grace, ready))


async def _serve(
    service: Service, server: uvicorn.Server, listening: socket.socket, grace: float, ready: Callable[[], None]
) -> int:
    loop = asyncio.get_running_loop()
    asked: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.put_nowait, int(number))
    service.engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    first = asyncio.create_task(asked.get())
    await asyncio.wait({first, serving}, return_when=asyncio.FIRST_COMPLETED)
    came = first.result() if first.done() else 0
    log_line("stopping", waiting=service.engine.open)
    stopping = asyncio.create_task(asyncio.to_thread(service.engine.stop, grace))
    again = asyncio.create_task(asked.get())
    await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
    if again.done():
        await asyncio.to_thread(service.engine.stop, 0.0)
    whole = await stopping
    again.cancel()
    first.cancel()
    server.should_exit = True
    await serving
    log_line("stopped", whole=whole)
    return 130 if came == signal.SIGINT else 0
