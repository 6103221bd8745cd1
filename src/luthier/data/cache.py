"""Where prepared data is kept between runs, and how a file's content is known without reading it again.

    $LUTHIER_CACHE, else $XDG_CACHE_HOME/luthier, else ~/.cache/luthier
        tokens/<key>/        a store, see store.py: tokenised rows, found again by what they were made from
        digests/<path>.json  what a file's content was, with the size and time it had then

A file whose size, times of change and inode are those of the last look is taken to be the same, as git does; where it
was changed within two seconds of that look, a change could hide behind the clock, and it is read again.

Stores that were not used for 30 days are removed when a new one is made.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from luthier.errors import UsageError
from luthier.runs import cache_root, make_private, read_json, write_json

__all__ = ["cache_folder", "content_digest", "mark_used", "remove_unused"]

_RACY = 2_000_000_000
"""Nanoseconds between a file's change and our look at it within which a second change could go unseen."""

_UNUSED_DAYS = 30


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache, made if missing.

    Raises:
        UsageError: it cannot be written to.
    """
    folder = cache_root() / name
    try:
        make_private(folder)  # the rows of the user's files are in it
    except OSError as error:
        message = f"prepared data cannot be kept in {folder}: {error.strerror}"
        raise UsageError(message, "set LUTHIER_CACHE to a folder that can be written to") from error
    return folder


def content_digest(path: Path, digest: Callable[[], str]) -> str:
    """`digest()` of the file at `path`, or what it was at an earlier look if the file has not changed since."""
    found = path.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    note = cache_folder("digests") / f"{name}.json"
    known = _known(note)
    if known is not None and known[0] == state:
        return known[1]
    now = time.time_ns()
    made = digest()
    if now - found.st_mtime_ns > _RACY and path.stat().st_mtime_ns == found.st_mtime_ns:
        write_json(note, {"path": str(path), "state": state, "digest": made})
    return made


def _known(note: Path) -> tuple[list[object], str] | None:
    try:
        document = read_json(note)
    except (OSError, ValueError):  # not there, or not whole: the file is read again
        return None
    if isinstance(document, dict) and isinstance(document.get("state"), list) and isinstance(document["digest"], str):
        return document["state"], document["digest"]
    return None


def mark_used(store: Path) -> None:
    """Note that a store was used now: the time of its folder."""
    os.utime(store)


def remove_unused(stores: Path) -> None:
    """Remove the stores in this folder, whole or half-built, that were not used for 30 days."""
    oldest = time.time() - _UNUSED_DAYS * 24 * 3600
    for store in stores.iterdir():
        with suppress(FileNotFoundError):  # another process may be at it too
            if store.is_dir() and store.stat().st_mtime < oldest:
                shutil.rmtree(store, ignore_errors=True)
