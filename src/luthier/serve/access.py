"""What stands before every request: is it counted, is its host ours, does it have the key, is its body short enough.

Plain ASGI, each around the next:  Watched( Guarded( Bounded( the application )))

The host is looked at where there is no key: a page in a browser may give its own name the address 127.0.0.1 (DNS
rebinding), and would then be let in by the browser as if it were us. It needs a name for that, so addresses are taken.
With a key such a page lacks the key. A page of another origin cannot send application/json without asking first, and
is never told that it may (no CORS headers).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.guard.secrets import visible
from luthier.serve.limits import Limits
from luthier.serve.metrics import Metrics
from luthier.serve.refusals import Refusal, stopping
from luthier.serve.streaming import GONE

__all__ = ["OPEN", "PATHS", "Bounded", "Guarded", "Watched"]

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")
"""What there is; metrics count all else as one."""

OPEN = ("/health", "/ready")
"""Paths without a key: they say nothing but whether the server is well."""


class Watched:
    """Counts requests and tells `log` a line for each, where there is one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: Callable[[str], None] | None) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse_other(scope, receive, send)
            return
        began, status = time.monotonic(), GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path: str = scope["path"]
            known = path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
            seconds = time.monotonic() - began
            self._metrics.requests.labels(known, str(status)).inc()
            self._metrics.seconds.labels(known).observe(seconds)
            if self._log is not None:
                self._log(f"{scope['method']} {visible(path[:200])} {status} {seconds:.3f} s")


class Guarded:
    """Asks for the key, where there is one, and else for a host of ours."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str], stopping: Callable[[], bool]) -> None:
        """`hosts`: names that a Host header may hold beside addresses and localhost; "*": any."""
        self._app, self._stopping = app, stopping
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        refusal = self._wrong(scope["path"], headers)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response(scope, receive, send)

    def _wrong(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        if path in OPEN:
            return None
        if self._digest is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._digest):
                said = "Incorrect API key provided." if given else "No API key provided: send it as a bearer token."
                return Refusal(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        elif "*" not in self._hosts and not self._ours(_host(headers.get(b"host", b""))):
            said = "This server is not known by that host name. Start it with --allow-host NAME, or with a key."
            return Refusal(403, said, code="unknown_host")
        if self._stopping() and path.startswith("/v1"):
            return stopping()
        return None

    def _ours(self, host: str) -> bool:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host in self._hosts
        return True


class Bounded:
    """Reads the whole body before anything looks at it: 413 where it is too long, 408 where it does not come."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self._limits.body_seconds)
        except asyncio.TimeoutError:
            late = Refusal(408, f"The body did not come within {self._limits.body_seconds:g} seconds.", code="timeout")
            await late.response(scope, receive, send)
            return
        except Refusal as refusal:
            await refusal.response(scope, receive, send)
            return
        if body is None:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None where the client has gone. Raises Refusal where it is too long, once that is known."""
        most = self._limits.body
        close = {"Connection": "close"}  # what is left of it is not read
        too_long = Refusal(413, f"The body is longer than {most:,} bytes.", code="body_too_large", headers=close)
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and (len(said) > len(str(most)) or int(said) > most):
            raise too_long
        found = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            found += message.get("body", b"")
            if len(found) > most:
                raise too_long
            if not message.get("more_body", False):
                return bytes(found)


async def _refuse_other(scope: Scope, receive: Receive, send: Send) -> None:
    """Websockets: there are none."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000})


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, so that comparing tells nothing of it."""
    return hashlib.sha256(key).digest()


def _host(header: bytes) -> str:
    """The name in a Host header, without its port."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text
