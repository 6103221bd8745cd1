"""Rows in tables: CSV, TSV and Parquet. The columns' names are the rows' keys.

A cell of CSV is text, whatever it says; a cell with line breaks or separators stands in double quotes (RFC 4180).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

from luthier.data.packed import BOM, open_bytes
from luthier.data.rawrow import ROW_LIMIT, Broken, Fault, RawRow
from luthier.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["read_parquet", "read_table"]

_BATCH = 256


class _Lines:
    """Lines of text for the csv module, which takes as many as a row needs.

    Attributes:
        number: lines given so far.
        taken: those of the row that is being read.
        fault: what is wrong with one of them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.number = 0
        self.taken: list[str] = []
        self.fault: Fault | None = None
        self._size = 0

    def next_row(self) -> int:
        """Begin a row, and give its line."""
        self.taken, self.fault, self._size = [], None, 0
        return self.number + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(ROW_LIMIT + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(BOM)
        self._size += len(line)
        if self._size > ROW_LIMIT:
            while not line.endswith(b"\n") and (line := self._file.readline(ROW_LIMIT)):
                pass
            raise csv.Error(f"a row of more than {ROW_LIMIT // 2**20} MiB")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            text = line.decode("utf-8", errors="replace")
            column = len(line[: error.start].decode("utf-8", errors="replace")) + 1
            reason = f"not UTF-8: the byte 0x{line[error.start]:02x} stands where no character can have it"
            remedy = "save the file as UTF-8 (iconv -f latin1 -t utf-8, if it is Latin-1)"
            self.fault = self.fault or Fault(reason, remedy, self.number, column)
        if (nul := text.find("\0")) >= 0:
            remedy = "write the file again; most often the disk was full while it was written"
            self.fault = self.fault or Fault("there is a NUL byte", remedy, self.number, nul + 1)
            text = text.replace("\0", "\ufffd")  # some versions of the csv module refuse it without a place
        self.taken.append(text)
        return text


def read_table(path: str, start: int = 0, *, separator: str = ",") -> Iterator[RawRow]:
    """CSV with a header. A row's line is the one it begins on.

    Raises:
        DataError: the header cannot be read, or names a column twice.
    """
    csv.field_size_limit(ROW_LIMIT + 1)
    with open_bytes(path) as file:
        lines = _Lines(file)
        rows = csv.reader(lines, delimiter=separator, strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            line = lines.next_row()
            fault: Fault | None = None
            try:
                cells = next(rows, None)
            except csv.Error as error:
                cells, fault = [], _quoting(error, line)
            else:
                fault = lines.fault
            if cells is None:
                return
            if not cells and fault is None:  # a blank line
                continue
            if header is None:
                header = _header(path, cells, fault, line)
                continue
            number += 1
            if number <= start:
                continue
            if fault is None and len(cells) != len(header):
                fault = _uneven(cells, header, line)
            value = fault or dict(zip(header, cells, strict=True))
            yield line, 1, value, "".join(lines.taken)


def _header(path: str, cells: Sequence[str], fault: Fault | None, line: int) -> list[str]:
    if fault is not None:
        raise DataError(f"{path}:{line}: the header cannot be read: {fault.reason}", fault.remedy)
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:{line}: the header names {twice[0]!r} twice", "give each column a name of its own")
    return names


def _quoting(error: csv.Error, line: int) -> Fault:
    if "end of data" in str(error) or "MiB" in str(error):
        reason = "a quote that opens in this row is not closed"
        remedy = 'a quote inside a quoted cell is doubled: ""; if the file is cut off, take the half row out'
        return Fault(reason, remedy, line, 1)
    return Fault(f"not CSV: {error}", 'a quote inside a cell is doubled, and the cell quoted: "say ""a"""', line, 1)


def _uneven(cells: Sequence[str], header: Sequence[str], line: int) -> Fault:
    count = f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
    remedy = (
        'put cells that hold the separator into double quotes: "one, two"'
        if len(cells) > len(header)
        else f"the header names {', '.join(header)}: write an empty cell for what a row does not have"
    )
    return Fault(f"the row has {count}, the header {len(header)}", remedy, line, 1)


def read_parquet(path: str, start: int = 0) -> Iterator[RawRow]:
    """Parquet, by row groups and within them by a few rows. A row's line is its number, from 1.

    Raises:
        DataError: the library for it is not installed, or the file is not what its first bytes say.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        message = f"{path} is Parquet, which needs the library pyarrow"
        raise DataError(message, 'pip install "luthier[data]", or convert it to JSONL') from error
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        remedy = "copy or download it again: a Parquet file that is cut off has lost its table of contents"
        raise DataError(f"{path} begins as Parquet but cannot be read: {error}", remedy) from error
    with file:
        first = 0
        for group in range(file.num_row_groups):
            size: int = file.metadata.row_group(group).num_rows
            if first + size > start:
                yield from _group(file, group, first, start)
            first += size


def _group(file: pq.ParquetFile, group: int, first: int, start: int) -> Iterator[RawRow]:
    import pyarrow as pa

    row = first
    try:
        for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group]):
            skipped = min(len(batch), max(0, start - row))
            row += skipped
            for value in _rows(batch.slice(skipped), row):
                row += 1
                yield row, 1, value, None
    except (pa.ArrowInvalid, OSError) as error:  # OSError: a page that cannot be unpacked
        raise Broken(f"the file is damaged here: {error}", "copy or download it again") from error


def _rows(batch: pa.RecordBatch, row: int) -> list[object]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_one(batch.slice(i, 1), row + i + 1) for i in range(len(batch))]


def _one(batch: pa.RecordBatch, line: int) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Fault(f"not UTF-8: {error.reason}", "write the file again, with UTF-8 in its text columns", line, None)
