"""JSON from elsewhere: of a bounded size and depth, and no key twice with two meanings.

A key that stands twice is read differently by different programs: what one checked is then not what another uses. The
same value twice means the same to all, and is let through.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NoReturn

import orjson

from luthier.errors import FileError
from luthier.guard.files import AGAIN, read_bounded
from luthier.guard.wrong import Wrong, once

__all__ = ["CONFIG_BYTES", "DEEPEST", "INDEX_BYTES", "read_object"]

CONFIG_BYTES = 2**24
INDEX_BYTES = 2**25
"""Indexes of models with 90,000 tensors have nine million bytes."""
DEEPEST = 32
_MOST_ENTRIES = 2_000_000
_LONGEST_NUMBER = 64
"""Digits. Tokenizers say 10^30 for "no length is too long"; what a number may be is its reader's to say."""


def read_object(path: Path, most: int = CONFIG_BYTES) -> dict[str, object]:
    """The JSON object in the file at `path`, of at most `most` bytes.

    Raises:
        FileError: the file cannot be read, is no JSON object, or is not one that every program reads the same.
    """
    text = read_bounded(path, most)
    try:
        return _parsed(text.removeprefix(b"\xef\xbb\xbf"))
    except Wrong as wrong:
        raise FileError(path, str(wrong), AGAIN) from None


def _parsed(text: bytes) -> dict[str, object]:
    if text.count(b",") > _MOST_ENTRIES or text.count(b"[") + text.count(b"{") > _MOST_ENTRIES:
        raise Wrong(f"has more than {_MOST_ENTRIES:,} entries")
    try:
        orjson.loads(text)  # the stricter of the two: UTF-8, no half of a surrogate pair, nothing but JSON
        found = json.loads(
            text,
            object_pairs_hook=partial(once, or_same=True),
            parse_int=_whole,
            parse_float=_number,
            parse_constant=_none,
        )
    except (ValueError, RecursionError) as error:
        raise Wrong(f"is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Wrong("does not hold a JSON object")
    _check_depth(found)
    return found


def _whole(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise Wrong(f"holds the number {text[:30]}, which is too large for what it may say")
    return int(text)


def _number(text: str) -> float:
    made = float(text)
    if made in (float("inf"), float("-inf")):
        raise Wrong(f"holds the number {text[:30]}, which is too large for what it may say")
    return made


def _none(name: str) -> NoReturn:
    raise Wrong(f"is not valid JSON: {name}")


def _check_depth(found: object) -> None:
    level: list[object] = [found]
    for _ in range(DEEPEST):
        level = [item for holder in level for item in _inside(holder)]
        if not level:
            return
    raise Wrong(f"is nested deeper than {DEEPEST} levels")


def _inside(holder: object) -> list[object]:
    """What `holder` holds that may hold something itself."""
    items = holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]
