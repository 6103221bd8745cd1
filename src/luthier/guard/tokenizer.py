"""A tokenizer.json looked through before the tokenizers library builds from it, and the library's panics as errors.

The library is compiled: where it allocates too much it ends the process, and where it meets what its authors did not
foresee it panics, which Python sees as an exception that is no Exception. So what may grow is bounded here before:

    ids of tokens              an array as long as the largest id is made
    added tokens               they become one regular expression
    replacements, prefixes     each multiplies the text, one after another
    padding                    to any length
    the normaliser's table     begins with a length that is believed

A regular expression that backtracks without end stops in the library after ten million tries, in a panic.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import orjson

from luthier.errors import FileError
from luthier.guard.files import AGAIN, read_bounded
from luthier.guard.wrong import Wrong

__all__ = ["MOST_TOKENS", "TOKENIZER_BYTES", "check_made", "check_tokenizer", "no_panic", "probe"]

TOKENIZER_BYTES = 2**26
MOST_TOKENS = 2**22
LONGEST_ADDED = 200
MOST_ADDED = 2**20
"""Characters of all added tokens together: they become one regular expression, a few microseconds each. Models that
speak have the most, 30,000 to 65,000 tokens for sounds: 700,000 characters."""
_LONGEST_TEXT = 8192
_LONGEST_INSERTED = 64
_MOST_GROWTH = 256
_MOST_STEPS = 256
_DEEPEST = 12
_LONGEST_PADDING = 2**20
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


class _Encodes(Protocol):
    def encode(self, sequence: str) -> object: ...


def check_tokenizer(path: Path) -> None:
    """Look through a tokenizer.json.

    Raises:
        FileError: it is no JSON object, or holds what would take memory or time without bound.
    """
    text = read_bounded(path, TOKENIZER_BYTES)
    try:
        if text.count(b"[") + text.count(b"{") > MOST_TOKENS:
            raise Wrong("holds more lists and objects than tokens need")
        try:
            document = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise Wrong(f"is not valid JSON: {error}") from None
        if not isinstance(document, dict):
            raise Wrong("does not hold a JSON object")
        _check_model(document.get("model"))
        _check_added(document.get("added_tokens"))
        _check_padding(document.get("padding"))
        for part in _PARTS:
            _check_steps(part, document.get(part))
    except Wrong as wrong:
        raise FileError(path, str(wrong), AGAIN) from None


def _check_model(model: object) -> None:
    if not isinstance(model, dict):
        raise Wrong("has no `model`")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, (dict, list)):
        raise Wrong("has no `model.vocab`")
    if len(vocabulary) > MOST_TOKENS:
        raise Wrong(f"has more than {MOST_TOKENS:,} tokens")
    if isinstance(vocabulary, dict):
        _check_ids(vocabulary.values())
        if len(set(vocabulary.values())) < len(vocabulary):
            raise Wrong("gives one id to two tokens")
    for key, value in model.items():
        if key not in ("vocab", "merges") and isinstance(value, str) and len(value) > _LONGEST_INSERTED:
            raise Wrong(f"has a `model.{key}` of {len(value):,} characters")


def _check_ids(ids: Iterable[object]) -> None:
    if any(type(one) is not int or not 0 <= one < MOST_TOKENS for one in ids):
        raise Wrong(f"has a token whose id is not a whole number below {MOST_TOKENS:,}")


def _check_added(added: object) -> None:
    if added is None:
        return
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise Wrong("has `added_tokens` that are not a list of objects")
    _check_ids(token.get("id") for token in added)
    _check_texts(token.get("content") for token in added)


def _check_texts(texts: Iterable[object]) -> None:
    total = 0
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_ADDED:
            raise Wrong(f"has an added token that is not a text of 1 to {LONGEST_ADDED} characters")
        total += len(text)
    if total > MOST_ADDED:
        raise Wrong(f"has added tokens of {total:,} characters together; at most {MOST_ADDED:,} are read")


def check_made(path: Path, ids: Iterable[int], added: Iterable[str]) -> None:
    """Look through what a library made of a tokenizer's files, of which each may add tokens: all ids, the added texts.

    Raises:
        FileError: an id, a text or the number of texts is larger than any; `path` names the tokenizer.
    """
    try:
        _check_ids(ids)
        _check_texts(added)
    except Wrong as wrong:
        raise FileError(path, str(wrong), AGAIN) from None


def _check_padding(padding: object) -> None:
    if padding is None:
        return
    if not isinstance(padding, dict):
        raise Wrong("has a `padding` that is no object")
    strategy = padding.get("strategy")
    fixed = strategy.get("Fixed") if isinstance(strategy, dict) else None
    for length in (fixed, padding.get("pad_to_multiple_of")):
        if length is not None and (type(length) is not int or not 0 < length <= _LONGEST_PADDING):
            raise Wrong(f"pads to {str(length)[:30]}; lengths are from 1 to {_LONGEST_PADDING:,}")


def _check_steps(part: str, top: object) -> None:
    """Look through a chain of steps: few, not deep, none that makes a text many times as long."""
    steps, growth = 0, 1
    level = [top]
    for _ in range(_DEEPEST):
        below: list[object] = []
        for holder in level:
            items = (
                holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
            )
            for key, value in items:
                steps += 1
                if isinstance(value, str):
                    growth *= _growth(part, str(key), value)
                else:
                    below.append(value)
        if steps > _MOST_STEPS * _DEEPEST or growth > _MOST_GROWTH:
            raise Wrong(f"has a `{part}` that can make a text more than {_MOST_GROWTH} times as long, or has no end")
        level = below
        if not level:
            return
    if any(isinstance(one, (dict, list)) and one for one in level):
        raise Wrong(f"has a `{part}` that is nested deeper than {_DEEPEST} levels")


def _growth(part: str, key: str, value: str) -> int:
    """How many times as long a text can become by this setting of a step."""
    if key == "precompiled_charsmap":
        return _table_growth(part, value)
    if len(value) > _LONGEST_TEXT:
        raise Wrong(f"has a text of {len(value):,} characters in its `{part}`")
    if key in ("content", "prepend", "replacement", "prefix", "suffix"):
        if len(value) > _LONGEST_INSERTED:
            raise Wrong(f"has a `{part}` that puts in {len(value):,} characters at once")
        return max(1, len(value)) if part == "normalizer" else 1
    return 1


def _table_growth(part: str, value: str) -> int:
    """Of SentencePiece's table: 4 bytes length of a tree, the tree, texts that end in a zero byte each."""
    try:
        table = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise Wrong(f"has a `{part}` whose table is not base64") from None
    tree = int.from_bytes(table[:4], "little")
    if len(table) < 4 or tree % 4 or tree > len(table) - 4:
        raise Wrong(f"has a `{part}` whose table claims {tree:,} bytes and has {max(0, len(table) - 4):,}")
    if max(map(len, table[4 + tree :].split(b"\0"))) > _LONGEST_INSERTED:
        raise Wrong(f"has a `{part}` whose table puts in more than {_LONGEST_INSERTED} bytes at once")
    return 1


@contextmanager
def no_panic(what: Path) -> Iterator[None]:
    """Around calls of compiled libraries: a panic in them is a FileError about the file that they work on."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library has a class of its own for it, which none exports
            raise
        said = f"makes the library that reads it fail: {str(error)[:300]}"
        raise FileError(what, said, AGAIN) from None


_PROBES = (
    "a" * 64 + "!",
    " " * 64 + "x",
    "1" * 32,
    "Hello, world! It's 3.14\n\n\tна́ 你好 🦙 \u0000\ufffd",
    "\r\n" * 16,
    "",
)
_PROBE_SECONDS = 1.0


def probe(tokenizer: _Encodes, path: Path) -> None:
    """Encode a few texts of a hundred characters, as bait for what fails or takes its time.

    Raises:
        FileError: the library fails, or takes more than a second of processor time.
    """
    began = time.thread_time()  # its own time: a machine busy with other things is not the tokenizer's fault
    for text in _PROBES:
        with no_panic(path):
            try:
                tokenizer.encode(text)
            except Exception as error:  # tokenizers raises no narrower one
                raise FileError(path, f"cannot encode a text: {str(error)[:300]}", AGAIN) from error
        if time.thread_time() - began > _PROBE_SECONDS:
            raise FileError(path, f"takes more than {_PROBE_SECONDS:g} s of processor time for a line of text", AGAIN)
