"""The server's life: a port of its own, answers until it is told to stop, and an end that leaves nobody without a word.

listen       takes the port, before a model is loaded
Server.run   serves; blocks until `stop` has been called and all that was under way has ended
stop         new requests are refused, the port is closed, answers may end for `grace` seconds, then they are ended
stop_now     they are ended at once
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from luthier.errors import UsageError
from luthier.serve.access import Bounded, Guarded, Watched
from luthier.serve.app import Serving, make_app
from luthier.serve.limits import Limits
from luthier.serve.metrics import Metrics
from luthier.serve.models import Served
from luthier.serve.scheduler import Scheduler

__all__ = ["LOOPBACK", "Access", "Server", "listen"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine for itself."""

_AFTER = 2.0
"""Seconds after the answers' end in which what was said of it is still written."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port` (0: a free one). Raises UsageError where that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host {host}: there is no such address", "--host 127.0.0.1, or a name of this machine's"
        ) from error
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} of {host} is taken by another program",
                "--port with another number, or 0 for any free one",
            ) from error
        why = error.strerror or str(error)
        raise UsageError(
            f"{host} port {port} cannot be listened on: {why}", "choose another --host or --port"
        ) from error
    return found


@dataclass(frozen=True)
class Access:
    """Who may ask: `key` (None: no key is needed) and the host names by which the server may be called."""

    key: str | None = None
    hosts: Sequence[str] = LOOPBACK


class _Uvicorn(uvicorn.Server):
    """Without its own signal handlers: the command has some."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Server:
    """Serves `models` on a socket. `log` is told of what fails, `requests` a line for each request.

    `cut` counts requests that were ended because the server was to stop.
    """

    models: Mapping[str, Served]
    limits: Limits
    access: Access
    log: Callable[[str], None]
    requests: Callable[[str], None] | None = None
    cut: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    _asked: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _uvicorn: uvicorn.Server | None = None
    _serving: Serving | None = None

    def run(self, listening: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; `ready` is called once it does."""

        asyncio.run(self._run(listening, ready))

    async def _run(self, listening: socket.socket, ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        scheduler = Scheduler(self.models, self.limits, self.metrics, self.log)
        serving = self._serving = Serving(self.models, self.limits, self.metrics, scheduler)
        bounded = Bounded(make_app(serving), self.limits)
        guarded = Guarded(bounded, self.access.key, self.access.hosts, lambda: serving.stopping)
        config = uvicorn.Config(
            Watched(guarded, self.metrics, self.requests),
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
        )
        self._uvicorn = _Uvicorn(config)
        scheduler.start()
        try:
            ready()
            if self._asked:  # the signal came while the model was being made ready
                self._stop(self.limits.grace)
            await self._uvicorn.serve(sockets=[listening])
        finally:
            await asyncio.to_thread(scheduler.stop, _AFTER)

    def stop(self) -> None:
        """Begin to end. From any thread, and from a signal handler."""
        self._asked = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop, self.limits.grace)

    def stop_now(self) -> None:
        """End what is under way too."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop, 0.0)

    def _stop(self, grace: float) -> None:
        if self._serving is not None and self._uvicorn is not None and self._loop is not None:
            self._serving.stopping = self._uvicorn.should_exit = True
            self._loop.call_later(grace, self._end_all)

    def _end_all(self) -> None:
        if self._serving is not None and self._loop is not None:
            self.cut += self._serving.end_all()
            self._loop.call_later(_AFTER, self._leave)

    def _leave(self) -> None:
        """Close what is still open: a client that reads nothing, or sends a body without end."""
        if self._uvicorn is not None:
            for connection in list(self._uvicorn.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()
