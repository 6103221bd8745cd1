"""Which kind of file it is, by its first bytes and then by its name; one table of the readers there are.

To add a kind of file: write its reader (rawrow.py says what that is), and have `reader_of` find it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import orjson

from luthier.data.packed import BOM, GZIP, ZSTD, open_bytes
from luthier.data.rawrow import ROW_LIMIT, Fault, RawRow, Read
from luthier.data.readers_json import read_json_lines, read_json_list
from luthier.data.readers_table import read_parquet, read_table
from luthier.data.recognise import recognise
from luthier.errors import DataError
from luthier.recipe.places import DATA_ENDINGS, TEXT_ENDINGS, ending_of

__all__ = ["Reader", "reader_of"]

_JSON = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv")
_SEPARATORS: Mapping[str, str] = {",": "commas", "\t": "tabs", ";": "semicolons"}
_HEAD = 2**16

_OTHER: Mapping[bytes, tuple[str, str]] = {
    b"PK\x03\x04": ("a zip archive (or a spreadsheet, .xlsx)", "unpack it, or save the sheet as CSV"),
    b"\xfd7zXZ": ("packed with xz", "unpack it first: xz -d"),
    b"BZh": ("packed with bzip2", "unpack it first: bzip2 -d"),
    b"ARROW1": ("Arrow (Feather)", "convert it to Parquet or JSONL"),
    b"SQLite format 3": ("an SQLite data base", "write the rows as JSONL or CSV"),
    b"%PDF": ("a PDF", "write its text into a .txt file"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8: iconv -f utf-16 -t utf-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8: iconv -f utf-16 -t utf-8"),
}
"""What is known and not read: its first bytes -> what it is, and what to do."""


class Reader(NamedTuple):
    """How a file is read: what kind it is, in words, and the function that gives its rows."""

    kind: str
    read: Read


def reader_of(path: str, columns: Sequence[str] = ()) -> Reader:
    """The reader for the file. `columns` are names that its header has if it is a table.

    Raises:
        DataError: it is of a kind that is not read.
        OSError: it cannot be opened.
        Broken: it is packed, and damaged from the start.
    """
    with open(path, "rb") as file:
        magic = file.read(4)
    with open_bytes(path) as stream:
        head = stream.read1(_HEAD)
    packed = "gzip" if magic.startswith(GZIP) else "Zstandard" if magic.startswith(ZSTD) else ""
    found = _reader(path, head, packed, columns)
    return found._replace(kind=f"{found.kind} in {packed}") if packed else found


def _reader(path: str, head: bytes, packed: str, columns: Sequence[str]) -> Reader:
    if head.startswith(b"PAR1"):
        if packed:
            raise DataError(f"{path} is Parquet inside {packed}", "unpack it first; Parquet is packed by itself")
        return Reader("Parquet", read_parquet)
    for magic, (what, remedy) in _OTHER.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}, which is not read", remedy)
    ending = ending_of(path)
    text = head.removeprefix(BOM).lstrip()
    first = text.split(b"\n", 1)[0].strip()
    if text.startswith(b"{") and (ending not in TEXT_ENDINGS or _is_object(first)):
        if first == b"{":
            message = f"{path}: a JSON object stands on several lines; a row is one object on one line (JSONL)"
            raise DataError(message, f"write each on one line: jq -c . {Path(path).name} > rows.jsonl")
        return Reader(_named("JSONL", ending in _JSON, ending), read_json_lines)
    if ending not in TEXT_ENDINGS and re.match(rb"\[\s*(\{|\]|\n|\Z)", text):
        return Reader(_named("a JSON list", ending in _JSON, ending), read_json_list)
    if ending in TEXT_ENDINGS:
        return Reader("a text file", read_text)
    if not text:
        return Reader("JSONL", read_json_lines)
    separator = _separator(text, ending)
    if ending in _TABLES or _is_header(first, separator, columns):
        kind = "TSV" if separator == "\t" else "CSV"
        kind += f" parted by {_SEPARATORS[separator]}" if separator == ";" else ""
        return Reader(_named(kind, ending in _TABLES, ending), partial(read_table, separator=separator))
    if ending in _JSON:
        return Reader("JSONL", read_json_lines)
    remedy = f"give it the ending of what it is: {', '.join(DATA_ENDINGS)}"
    raise DataError(f"{path}: neither its content nor its name says what kind of data it is", remedy)


def _named(kind: str, fits: bool, ending: str) -> str:
    return kind if fits or not ending else f"{kind}, though it is named {ending}"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _separator(text: bytes, ending: str) -> str:
    """The one that the first line has most of; the ending's own where it has none."""
    line = text.split(b"\n", 1)[0].decode("utf-8", errors="replace")
    usual = "\t" if ending == ".tsv" else ","
    return max((usual, *_SEPARATORS), key=line.count)


def _is_header(line: bytes, separator: str, columns: Sequence[str]) -> bool:
    """Whether a line that is not JSON names the columns of a format, or those that the recipe maps."""
    try:
        cells = next(csv.reader([line.decode("utf-8", errors="replace")], delimiter=separator), [])
    except csv.Error:  # a carriage return in the middle of it, or a cell longer than the library takes
        return False
    names = [cell.strip() for cell in cells]
    return bool(columns and set(columns) <= set(names)) or (len(names) > 1 and bool(recognise(names)))


def read_text(path: str, start: int = 0) -> Iterator[RawRow]:
    """A text file is one row: all of it, its line ends written as LF."""
    if start:
        return
    with open_bytes(path) as file:
        content = file.read(ROW_LIMIT + 1)
    if len(content) > ROW_LIMIT:
        reason = f"a text of more than {ROW_LIMIT // 2**20} MiB: a text file is one row, and no row may be longer"
        yield 1, 1, Fault(reason, "cut it into several files", 1, 1), content
        return
    content = content.removeprefix(BOM)
    if not content.strip():
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: the byte 0x{content[error.start]:02x} stands where no character can have it"
        remedy = "save the file as UTF-8 (iconv -f latin1 -t utf-8, if it is Latin-1)"
        yield 1, 1, Fault(reason, remedy, *_place(content, error.start)), content
        return
    if (nul := content.find(b"\0")) >= 0:
        fault = Fault(
            "there is a NUL byte: this is no text", "take the file out, or write it again", *_place(content, nul)
        )
        yield 1, 1, fault, content
        return
    yield 1, 1, {"text": text.replace("\r\n", "\n").replace("\r", "\n")}, content


def _place(content: bytes, at: int) -> tuple[int, int]:
    before = content[:at].decode("utf-8", errors="replace")
    return before.count("\n") + 1, len(before) - before.rfind("\n")
