"""From a recipe's `data` to conversations: what it names is opened, and rows are read one at a time.

    open_sources    files, folders, bundled sets and hub data sets -> `OpenSource`s, their format recognised
    OpenSource.rows every row in order: a conversation, or what is wrong with the row (`BadRow`)

Nothing is guessed into shape and nothing is skipped: a row that cannot be used comes out with its file, line, column,
reason and remedy, in its place. Memory is constant, whatever the size of the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import orjson

from luthier.data.conversation import Conversation, Source
from luthier.data.folders import expand_bundled, files_of, open_error
from luthier.data.formats import FORMATS, Fields, RowError
from luthier.data.hub import is_hub_id, open_hub
from luthier.data.problems import BadRow, RowProblem
from luthier.data.rawrow import Broken, Fault, RawRow, Read, as_text
from luthier.data.readers import reader_of
from luthier.data.recognise import format_of, recognise, renamed
from luthier.data.turns import kind_of
from luthier.errors import DataError, Problem
from luthier.recipe.schema import DataSource

__all__ = ["SHOWN_PROBLEMS", "OpenSource", "SourceRows", "expand_bundled", "open_sources", "read_sources"]

SHOWN_PROBLEMS = 20
"""How many bad rows an error lists; the rest is counted."""

_LOOKED_AT = 20
"""Good rows by which a format is recognised."""
_BLOCK = 2**20


@dataclass(frozen=True)
class OpenSource:
    """One file, or one data set of the hub, that can be read again and again.

    Attributes:
        recipe: what the recipe says of it; `path` is this file's.
        path: the same.
        format: a name in `FORMATS`.
        recognised: the kind of file, and how the format was known, in words.
        notes: what a reader of the report would not expect.
    """

    recipe: DataSource
    path: str
    format: str
    recognised: str
    read: Read = field(repr=False)
    notes: tuple[str, ...] = ()
    version: str | None = None

    def digest(self) -> str:
        """SHA-256 of the content: of the file's bytes as they lie on disk; of a hub data set's name and version.

        Raises:
            DataError: the file cannot be read.
        """
        found = hashlib.sha256()
        if self.version is not None:
            found.update(self.version.encode())
            return found.hexdigest()
        try:
            with open(self.path, "rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    found.update(block)
        except OSError as error:
            raise open_error(self.path, error) from error
        return found.hexdigest()

    def rows(self, start: int = 0) -> Iterator[Conversation | BadRow]:
        """Every row in order, from the one with ordinal `start` on (from 0). Blank lines are no rows.

        Raises:
            DataError: the file cannot be read: it is gone, or the disk fails.
        """
        path, mapping = self.path, self.recipe.fields
        parse, make = FORMATS[self.format].read, tuple.__new__  # half the time of calling a named tuple's class
        row, line = start, 0
        try:
            for raw in self.read(path, start):
                line, _, value, _ = raw
                if value.__class__ is dict:
                    if mapping:
                        value = renamed(value, mapping)
                    try:
                        yield parse(value, make(Source, (path, line)))
                    except RowError as error:
                        yield self._refused(raw, row, error)
                else:
                    yield self._unreadable(raw, row)
                row += 1
        except Broken as error:
            yield from self._broken(row, line, error, start)
        except OSError as error:
            raise open_error(path, error) from error

    def _broken(self, row: int, line: int, error: Broken, start: int) -> Iterator[BadRow]:
        """The row at which the file breaks off, unless that is before `start`."""
        if row == start > 0:  # nothing was read but what was to be skipped, uncounted
            row = line = 0
            with suppress(Broken):
                for raw in self.read(self.path, 0):
                    line = raw[0]
                    row += 1
        if row >= start:
            yield BadRow(RowProblem(self.path, line + 1, None, row, error.reason, error.remedy), "")

    def _refused(self, raw: RawRow, row: int, error: RowError) -> BadRow:
        """A row that is not of the file's format."""
        line, column, fields, text = raw
        shown = orjson.dumps(fields, default=str, option=orjson.OPT_NON_STR_KEYS) if text is None else text
        if error.key is not None:
            line, column = _place_of(self.recipe.fields.get(error.key, error.key), error.occurrence, raw)
        place = (self.path, line, None if text is None else column, row)
        fitting = recognise(list(renamed(fields, self.recipe.fields)))  # type: ignore[arg-type]  # a dict, see rows
        remedy = error.remedy
        if fitting and self.format not in fitting:
            remedy = f"the row looks like {fitting[0]}, this file is read as {self.format}: put it into another file"
        return BadRow(RowProblem(*place, error.reason, remedy), as_text(shown).rstrip("\r\n"))

    def _unreadable(self, raw: RawRow, row: int) -> BadRow:
        """A row that is no JSON, no whole row of a table, or no object."""
        first_line, first_column, value, found = raw
        text = as_text(b"" if found is None else found).rstrip("\r\n")
        if isinstance(value, Fault):
            reason, remedy, line, column = value
            return BadRow(RowProblem(self.path, line, column, row, reason, remedy), text)
        kind = "a list" if isinstance(value, list) else f"{kind_of(value)} ({text.strip()[:20]})"
        reason = f"a row must be a JSON object, not {kind}"
        remedy = 'write its values under keys, such as {"question": …, "answer": …}'
        return BadRow(RowProblem(self.path, first_line, first_column, row, reason, remedy), text)


_SIGN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_COLON = re.compile(r"\s*:")


def _place_of(key: str, occurrence: int | None, raw: RawRow) -> tuple[int, int]:
    """Line and column of one of the row's keys, or of a key of its turns; of the row where it writes out none such."""
    line, column, _, found = raw
    text = found.decode("utf-8", errors="replace") if isinstance(found, bytes) else found or ""
    wanted, left = (1, 0) if occurrence is None else (3, occurrence)  # a turn is an object in a list in the row
    depth = 0
    for sign in _SIGN.finditer(text):
        found_sign = sign.group()
        if found_sign in "[{":
            depth += 1
        elif found_sign in "]}":
            depth -= 1
        elif depth == wanted and found_sign == f'"{key}"' and _COLON.match(text, sign.end()):
            if left == 0:
                before = text[: sign.start()]
                lines = before.count("\n")
                return line + lines, len(before) - before.rfind("\n") if lines else column + len(before)
            left -= 1
    return line, column


def open_sources(sources: Sequence[DataSource]) -> tuple[OpenSource, ...]:
    """Everything that a recipe's `data` names, ready to be read. Only the first rows are looked at.

    Raises:
        DataError: files or data sets are missing, unreadable, empty or of no known format: all of them at once.
    """
    if not sources:
        raise DataError("the recipe names no data", "add `data: rows.jsonl` to it")
    opened: list[OpenSource] = []
    failed: list[tuple[str, DataError]] = []
    for source in expand_bundled(sources):
        try:
            files, note = ([source.path], None) if is_hub_id(source.path) else files_of(source.path)
        except DataError as error:
            failed.append((source.path, error))
            continue
        for file in files:
            try:
                found = _open(source.model_copy(update={"path": file}))
            except DataError as error:
                failed.append((file, error))
                continue
            opened.append(found if note is None else replace(found, notes=(note,)))
            note = None  # said once for a folder
    if len(failed) == 1:
        raise failed[0][1]
    if failed:
        problems = [
            Problem(path, None, error.message.removeprefix(f"{path}: "), error.remedy) for path, error in failed
        ]
        shown = f"; the first {SHOWN_PROBLEMS} are" if len(failed) > SHOWN_PROBLEMS else ""
        message = f"{len(failed)} files or data sets cannot be used{shown}:"
        raise DataError(message, "correct these or take them out of `data`", problems[:SHOWN_PROBLEMS])
    return tuple(opened)


def _open(source: DataSource) -> OpenSource:
    """The source, once its format is known.

    Raises:
        DataError: it cannot be read or used at all.
    """
    path = source.path
    version = None
    try:
        if is_hub_id(path):
            kind, read, version = open_hub(source)
        else:
            kind, read = reader_of(path, tuple(source.fields.values()))
        name, how = _recognised(source, read)
    except OSError as error:
        raise open_error(path, error) from error
    except Broken as error:
        raise DataError(f"{path}: {error.reason}", error.remedy) from error
    if kind == "a text file" and name != "text":
        raise DataError(f"{path} is a text file: one row of format text, not of {name}", "take `format` out")
    return OpenSource(source, path, name, f"{kind}, {how}", read, version=version)


def _recognised(source: DataSource, read: Read) -> tuple[str, str]:
    """The format of the rows, and how it was known, by the first rows that are objects."""
    looked_at: list[Fields] = []
    where, rows = "", 0
    try:
        for line, _, value, _ in read(source.path, 0):
            rows += 1
            if isinstance(value, dict):
                where = where or str(Source(source.path, line))
                looked_at.append(value)
                if len(looked_at) == _LOOKED_AT:
                    break
    except Broken:  # reading all of it tells; here what came before is enough
        rows += 1
    if rows == 0:
        raise DataError(f"{source.path} is empty", 'write one JSON object a line, such as {"question": …, "answer": …}')
    if not looked_at:  # every row will be refused, with its own reason
        return ("text" if source.format == "auto" else source.format), "but no row of it can be read"
    return format_of(source, where, looked_at)


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What one source gave when it was read whole: its conversations, its format, and how that was known."""

    source: DataSource
    format: str
    recognised: str
    conversations: tuple[Conversation, ...]


def read_sources(sources: Sequence[DataSource]) -> tuple[SourceRows, ...]:
    """All rows of a recipe's `data` in memory: for small sets and for tests.

    Raises:
        DataError: a source cannot be used; or rows cannot: all of them, over all files.
    """
    loaded: list[SourceRows] = []
    problems: list[Problem] = []
    count = 0
    for opened in open_sources(sources):
        rows = list(opened.rows())
        count += len(rows)
        problems += [row.problem.as_problem() for row in rows if isinstance(row, BadRow)]
        good = tuple(row for row in rows if isinstance(row, Conversation))
        loaded.append(SourceRows(opened.recipe, opened.format, opened.recognised, good))
    if problems:
        shown = f"; the first {SHOWN_PROBLEMS} are" if len(problems) > SHOWN_PROBLEMS else ""
        raise DataError(
            f"{len(problems)} of {count} row{'s' if count != 1 else ''} cannot be used{shown}:",
            "correct or remove these rows and run again",
            problems[:SHOWN_PROBLEMS],
        )
    return tuple(loaded)
