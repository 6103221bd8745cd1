"""A file from elsewhere, opened only if it is a plain file, and read only up to a bound."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from luthier.errors import FileError

__all__ = ["AGAIN", "open_plain", "read_bounded"]

AGAIN = "Fetch it again: it is damaged, its download was not completed, or it is not what it claims to be."
"""The remedy for a file that came from elsewhere."""


@contextmanager
def open_plain(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """(the open file, its size in bytes).

    Raises:
        FileError: it is not there or may not be read; or it is a folder, a pipe or a device, which may never end.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits until somebody writes into it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(path, f"cannot be read: {said}", "Look whether it is there and may be read.") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(path, "is not a plain file (a folder, a pipe or a device)", AGAIN)
        yield file, status.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """All of a plain file of at most `most` bytes.

    Raises:
        FileError: as `open_plain`, or it is larger.
    """
    with open_plain(path) as (file, size):
        if size > most:
            raise FileError(path, f"has {size:,} bytes; a file of this kind has at most {most:,}", AGAIN)
        try:
            return file.read(most)  # not more, even if it grows meanwhile
        except OSError as error:
            raise FileError(path, f"cannot be read: {error.strerror}", "Look at the disk it is on.") from error
