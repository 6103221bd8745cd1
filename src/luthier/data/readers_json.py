"""Rows written as JSON: one object a line (JSONL), or all of them in one list.

Both are read a piece at a time. A list is cut at the commas between its elements before anything is parsed, so that an
element that is not JSON costs that row and no other.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import IO

import orjson

from luthier.data.packed import BOM, open_bytes
from luthier.data.rawrow import ROW_LIMIT, Fault, RawRow

__all__ = ["json_fault", "read_json_lines", "read_json_list"]

_CUT_OFF = "the file seems cut off: it ends inside this row"
_CUT_OFF_REMEDY = "take the half row out, or copy or download the file again"
_BLOCK = 2**18


def read_json_lines(path: str, start: int = 0) -> Iterator[RawRow]:
    """JSONL: UTF-8, with or without a byte-order mark, LF or CRLF; blank lines are no rows."""
    loads = orjson.loads
    with open_bytes(path) as file:
        _skip_bom(file)
        lines = enumerate(iter(partial(file.readline, ROW_LIMIT + 1), b""), 1)
        _skip_rows(lines, file, start)
        for line, text in lines:
            if len(text) > ROW_LIMIT and text[-1:] != b"\n":
                _skip_line(file)
                yield line, 1, _too_long(line, 1, "a line", "a line break"), text
                continue
            try:
                value = loads(text)
            except orjson.JSONDecodeError:
                if not text.strip():
                    continue
                value = json_fault(text, line, last=text[-1:] != b"\n")
            yield line, 1, value, text


def _skip_bom(file: io.BufferedReader) -> None:
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))


def _skip_rows(lines: Iterator[tuple[int, bytes]], file: IO[bytes], count: int) -> None:
    while count:
        _, text = next(lines, (0, b""))
        if not text:
            return
        if len(text) > ROW_LIMIT and text[-1:] != b"\n":
            _skip_line(file)
        count -= bool(text.strip())


def _skip_line(file: IO[bytes]) -> None:
    while (piece := file.readline(_BLOCK)) and not piece.endswith(b"\n"):
        pass


def _too_long(line: int, column: int, what: str, missing: str) -> Fault:
    remedy = f"cut it into several rows; if it should be several, {missing} is missing"
    return Fault(f"{what} of more than {ROW_LIMIT // 2**20} MiB: no row may be longer", remedy, line, column)


def json_fault(text: bytes, line: int, column: int = 1, *, last: bool = False) -> Fault:
    """Why `text` is not JSON, where in it, and what to do. It begins at `line` and `column`.

    `last` says that the file ends with it, so that an end that comes too early is the file's and not the row's.
    """
    if (nul := text.find(b"\0")) >= 0:
        rest = "the disk was full, or the computer stopped, while it was written"
        place = _place(text, nul, line, column)
        return Fault("not JSON: there is a NUL byte", f"write the file again; most often {rest}", *place)
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place(text, error.start, line, column)
        if last and error.reason == "unexpected end of data":
            return Fault(_CUT_OFF, _CUT_OFF_REMEDY, *place)
        reason = f"not UTF-8: the byte 0x{text[error.start]:02x} stands where no character can have it"
        return Fault(reason, "save the file as UTF-8 (iconv -f latin1 -t utf-8, if it is Latin-1)", *place)
    try:
        orjson.loads(decoded)
    except orjson.JSONDecodeError as error:
        at = min(error.pos, len(decoded.rstrip()))  # not the line after, where a row ends too early
        place = _place(text, len(decoded[:at].encode()), line, column)
        return _explain(error, decoded, last, place)
    return Fault("not JSON", "write one JSON object", line, column)  # pragma: no cover  (the caller saw it fail)


_NOT_A_NUMBER = re.compile(r"-?(NaN|Infinity)")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def _explain(error: json.JSONDecodeError, text: str, last: bool, place: tuple[int, int]) -> Fault:
    """The fault behind a message of the parser: by what stands at the place, for its words change with its version."""
    ended = error.pos >= len(text.rstrip())
    if ended and last:
        return Fault(_CUT_OFF, _CUT_OFF_REMEDY, *place)
    if ended:
        remedy = "a line break inside a text is written \\n, and each row stands on one line"
        return Fault("not JSON: the row ends before it is complete", remedy, *place)
    if _SURROGATE.match(text, error.pos) or _SURROGATE.search(text, max(0, error.pos - 12), error.pos + 1):
        reason = "not JSON: half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        return Fault(reason, "write the other half too, or take it out; a text was cut inside an emoji", *place)
    if _NOT_A_NUMBER.match(text, error.pos):
        return Fault("not JSON: it has no NaN and no Infinity", "write null, or take the key out", *place)
    if _is_json(text[: error.pos]):
        remedy = "one row a line and nothing after it: no comma, no second row, and lines that end in LF or CRLF"
        return Fault("not JSON: more stands after the end of the row", remedy, *place)
    if text[error.pos] == "'":
        return Fault(f"not JSON: {error.msg}", 'texts and keys stand in double quotes: "', *place)
    return Fault(f"not JSON: {error.msg}", "correct it, or write the row with a JSON library", *place)


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _place(text: bytes, at: int, line: int, column: int) -> tuple[int, int]:
    """Line and column of byte `at` of a text that begins at `line` and `column`; columns are characters."""
    before = text[:at].decode("utf-8", errors="replace")
    lines = before.count("\n")
    if lines:
        return line + lines, len(before) - before.rfind("\n")
    return line, column + len(before)


_TEXT = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
# A text, an object with nothing but texts and the like in it, a sign that nests or parts; last, a quote whose text the
# block does not end.
_SIGN = re.compile(rb'%s|\{[^"\[\]{}]*(?:%s[^"\[\]{}]*)*\}|[\[\]{},]|"' % (_TEXT, _TEXT), re.DOTALL)
_BLANKS = re.compile(rb"\s*")
_INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


class _Cutter:
    """Cuts the list in `file` at the commas between its elements.

    Attributes:
        line, column: where the element begins that `cut` gave last.
        over: it was longer than ROW_LIMIT, and only its beginning was kept.
        closed: the list's end was found after it.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._buffer, self._at = b"", 0  # what was read, and where in it the next element begins
        self._next = (1, 1)
        self.line = self.column = 1
        self.over = self.closed = False
        _skip_bom(file)
        if self._skip_blanks():
            self._take(self._at + 1)  # the bracket that opens the list

    def _take(self, end: int) -> bytes:
        taken = self._buffer[self._at : end]
        self._at = end
        self._next = _place(taken, len(taken), *self._next)
        return taken

    def _skip_blanks(self) -> bool:
        """Whether anything comes after them."""
        while True:
            end = _BLANKS.match(self._buffer, self._at).end()  # type: ignore[union-attr]  # it matches anything
            self._take(end)
            if end < len(self._buffer):
                return True
            self._buffer, self._at = self._file.read(_BLOCK), 0
            if not self._buffer:
                return False

    def cut(self) -> bytes | None:
        """The next element without the blanks around it; None where the file ends in it."""
        if not self._skip_blanks():
            return None
        (self.line, self.column), self.over = self._next, False
        head, at, depth, in_text = b"", self._at, 0, False
        while True:
            if in_text:
                at = _INSIDE.match(self._buffer, at).end()  # type: ignore[union-attr]  # it matches anything
                if self._buffer[at : at + 1] == b'"':
                    at, in_text = at + 1, False
                    continue
            elif sign := _SIGN.search(self._buffer, at):
                at, kind = sign.end(), sign.group()
                if kind in b"]," and depth == 0:
                    break
                in_text = kind == b'"'
                depth += (kind in b"[{") - (kind in b"]}" and depth > 0)
                continue
            else:
                at = len(self._buffer)
            if at - self._at > ROW_LIMIT:  # the rest of it is looked through and forgotten
                taken, self.over = self._take(at), True
                head = head or taken[:ROW_LIMIT]
            if not (block := self._file.read(_BLOCK)):
                return None
            at -= self._at
            self._buffer, self._at = self._buffer[self._at :] + block, 0
        self.closed = kind == b"]"
        element = self._take(at)[:-1]
        return head or element.rstrip()

    def rest(self) -> bytes:
        """What follows the list, or its beginning."""
        self._skip_blanks()
        self.line, self.column = self._next
        return self._buffer[self._at :]


def read_json_list(path: str, start: int = 0) -> Iterator[RawRow]:
    """One list of objects. A row's line is the one it begins on."""
    with open_bytes(path) as file:
        cutter = _Cutter(file)
        number = 0
        while not cutter.closed:
            text = cutter.cut()
            place = (cutter.line, cutter.column)
            if text is None and number < start:
                return
            if text is None:
                fault = Fault("the file seems cut off: its list is not closed", _CUT_OFF_REMEDY, *place)
                yield *place, fault, b""
                return
            if not text and cutter.closed and number == 0:
                break
            number += 1
            if number <= start:
                continue
            if cutter.over:
                yield *place, _too_long(*place, "an element", "a quote"), text
                continue
            try:
                value = orjson.loads(text)
            except orjson.JSONDecodeError:
                value = json_fault(text, *place) if text else Fault("not JSON: a comma too many", "take it out", *place)
            yield *place, value, text
        if number >= start and (rest := cutter.rest()):
            remedy = "write one list, or one object a line without any list"
            fault = Fault("more stands after the end of the list", remedy, cutter.line, cutter.column)
            yield cutter.line, cutter.column, fault, rest
