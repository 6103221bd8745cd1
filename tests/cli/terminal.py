"""A `luthier` command on a terminal of its own: what a person types, and what they see."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PROMPT = "> "


class Terminal:
    """The command `luthier WORD…` on a terminal of `columns`, its results to `out` where that is given; in the end
    it is killed."""

    def __init__(self, folder: Path, *words: object, columns: int = 100, out: BinaryIO | None = None) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, sys.executable, "-m", "luthier", *map(str, words)],
            cwd=folder,
            env={**kept, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
            stdin=slave,
            stdout=slave if out is None else out,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._seen = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt, as late as a person does: Python's `input` passes over a signal that comes between
        its look for signals and its wait for a key, until the next key."""
        time.sleep(0.5)
        self.type(CTRL_C)

    def until(self, text: str, seconds: float = 180) -> str:
        """What is shown up to `text`, which comes within that time, from where the last `until` ended."""
        end = time.monotonic() + seconds
        while text.encode() not in self._seen:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} within {seconds} s in:\n{self._seen.decode(errors='replace')}"
            self._seen += self._read()
        before, _, self._seen = self._seen.partition(text.encode())
        return before.decode() + text

    def ended(self, seconds: float = 180) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(timeout=seconds)

    def _read(self) -> bytes:
        try:
            read = os.read(self._master, 4096)
        except OSError:  # Linux's word for a terminal that nobody has open any more
            read = b""
        assert read, f"it ended after:\n{self._seen.decode(errors='replace')}"
        return read


def shown(text: str) -> list[str]:
    """The lines that stand there in the end, where each was written over and over from its first column."""
    return [next((part for part in reversed(line.split("\r")) if part), "") for line in text.split("\n")]
