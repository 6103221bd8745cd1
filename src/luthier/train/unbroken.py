"""Streams that cannot end what is being done: where one can no longer be written to, what is said goes nowhere.

Standard error may lead to a process that has ended or to a full disk. Training is not to end for that, least of all
without a checkpoint; events.jsonl has all that would have been shown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast

from luthier.train.signals import leave_terminal

__all__ = ["unbroken", "unbroken_streams"]


class _Unbroken:
    """A text stream whose `write` and `flush` do nothing from the first `fault` on; all else is the stream's own."""

    def __init__(self, stream: TextIO, fault: type[OSError]) -> None:
        self._stream, self._fault, self._broken = stream, fault, False

    def write(self, text: str) -> int:
        if not self._broken:
            try:
                return self._stream.write(text)
            except self._fault:
                self._leave()
        return len(text)

    def flush(self) -> None:
        if not self._broken:
            try:
                self._stream.flush()
            except self._fault:
                self._leave()

    def _leave(self) -> None:
        """What the stream still holds goes nowhere too, else Python's end would fail on it."""
        self._broken = True
        with suppress(OSError, ValueError):  # there is no file behind it
            leave_terminal((self._stream.fileno(),))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def unbroken(stream: TextIO, fault: type[OSError] = OSError) -> TextIO:
    """`stream`, but that it takes no more after a `fault`, and does not raise it."""
    return cast(TextIO, _Unbroken(stream, fault))


@contextmanager
def unbroken_streams() -> Iterator[None]:
    """In the block, standard error may break, and the reader of standard output go; other faults of that are errors,
    for it has the results."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = unbroken(sys.stdout, BrokenPipeError), unbroken(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
