"""`luthier serve`: what is checked before a model is loaded, the start message, and how it ends."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.markup import escape

from luthier.cli import console
from luthier.cli.loading import open_family
from luthier.errors import Interrupted, UsageError
from luthier.guard.secrets import printable
from luthier.train.signals import StopNow, handling, leave_terminal, terminals

if TYPE_CHECKING:
    from luthier.serve.limits import Limits
    from luthier.serve.server import Server

__all__ = ["KEY", "Door", "check_installed", "named_adapters", "run"]

KEY = "LUTHIER_API_KEY"
"""The environment's name for the key."""

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_NAME = re.compile(r"[\w][\w.:/-]{0,199}", re.ASCII)
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class Door:
    """Where the server listens and whom it lets in, as the command line says it."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    insecure: bool = False
    allowed: tuple[str, ...] = ()


def named_adapters(said: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` of each --adapter."""
    found: dict[str, Path] = {}
    for one in said:
        name, given, path = one.partition("=")
        if not given or not path or not _NAME.fullmatch(name):
            raise UsageError(f"--adapter {one} is no NAME=PATH", "e.g. --adapter pirate=runs/pirate")
        if name in found:
            raise UsageError(f"--adapter {name} is given twice", "give each its own name")
        found[name] = Path(path)
    return found


def run(target: Path, adapters: dict[str, Path], name: str | None, door: Door, limits: Limits, *, log: bool) -> None:
    """Serve until a signal comes; `log`: a line for each request. Raises Interrupted where answers were cut off."""
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(f"--name {name} cannot be a model's name", "letters, digits and . _ : / -")
    key = _key(door)
    from luthier.serve.server import Access, Server, listen

    with listen(door.host, door.port) as listening:
        address, port = listening.getsockname()[:2]
        if key is None and not door.insecure and not ipaddress.ip_address(address).is_loopback:
            raise UsageError(
                f"{door.host} can be reached from other machines, and there is no key: anybody there could use it",
                f"set {KEY}, or give --api-key-file; --insecure where something else guards the door",
            )
        from luthier.serve.models import Served

        voices = open_family(target, adapters, name)
        models = {voice.name: Served(voice.name, voice.decoder, voice.template, voice.parent) for voice in voices}
        access = Access(key, (door.host, *door.allowed))
        server = Server(models, limits, access, _say, _say if log else None)
        host = f"[{door.host}]" if ":" in door.host else door.host
        _run(server, listening, f"http://{host}:{port}/v1", keyed=key is not None)
    if server.cut:
        raise Interrupted(
            f"stopped: {server.cut} requests were cut off", "--grace SECONDS gives those under way more time"
        )


def _run(server: Server, listening: socket.socket, address: str, *, keyed: bool) -> None:
    """Serve; the first signal lets answers end, the second ends them, a third the process."""
    streams, seen = terminals(), 0

    def handler(number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        if number == signal.SIGHUP:
            leave_terminal(streams)
            if seen:
                return
        seen += 1
        if seen == 1:
            server.stop()
            said = f"{signal.Signals(number).name}: no new requests; {server.limits.grace:g} s for those under way\n"
            with suppress(OSError):  # not by way of sys.stderr: the signal may have come while that was written to
                os.write(2, said.encode())
        elif seen == 2:
            server.stop_now()
        else:
            raise StopNow(signal.Signals(number))

    with handling(handler):
        server.run(listening, lambda: _greet(server, address, keyed=keyed))


def _greet(server: Server, address: str, *, keyed: bool) -> None:
    names = list(server.models)
    console.say(f"serving on [bold]{escape(address)}[/]  (Ctrl-C ends)")
    console.say(f"models: {escape(', '.join(names))}")
    # In one piece: rich doubles a backslash at the end of what it escapes.
    console.say(escape("\n  ".join(["try:", *_example(address, names[0], keyed=keyed)])))


def _example(address: str, model: str, *, keyed: bool) -> list[str]:
    return [
        f"curl {address}/chat/completions \\",
        "  -H 'Content-Type: application/json' \\",
        *([f'  -H "Authorization: Bearer ${KEY}" \\'] if keyed else []),
        f"""  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'""",
    ]


def _say(line: str) -> None:
    console.say(escape(printable(line)))


def _key(door: Door) -> str | None:
    """The key, of the file or else of the environment. Raises UsageError for one that protects nothing."""
    if door.key_file is None:
        where, said = f"the environment's {KEY}", os.environ.get(KEY)
        if said is None:
            return None
    else:
        where = str(door.key_file)
        try:
            said = door.key_file.read_text(encoding="utf-8")
        except UnicodeError as error:
            raise UsageError(f"{where} is no text", "one line with the key") from error
    key = said.strip()
    if len(key) < _SHORTEST_KEY or not all("!" <= sign <= "~" for sign in key):
        raise UsageError(
            f"the key in {where} is none: one word of at least {_SHORTEST_KEY} ASCII characters is asked for",
            "openssl rand -hex 32 makes a good one",
        )
    return key


def check_installed() -> None:
    """Raise UsageError where the libraries for serving are not there."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serving needs {', '.join(missing)}", "pip install 'luthier[serve]'")
