"""From files to conversations, with every bad row reported at once.

A file is read line by line (JSONL: one JSON object a line, UTF-8, with or without a byte-order mark, LF or CRLF, blank
lines skipped) and never held whole. Nothing is guessed into shape: a row that cannot be used is a problem with its
file, line and reason, and all of them come in one `DataError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import orjson

from luthier.data.conversation import Conversation, Source
from luthier.data.formats import FORMATS, Format, Record, RowError, nearest_format, recognise
from luthier.errors import DataError, Problem
from luthier.recipe.schema import BUNDLED_DATA, DataSource

__all__ = ["SHOWN_PROBLEMS", "SourceRows", "expand_bundled", "read_records", "read_sources"]

SHOWN_PROBLEMS = 20
"""How many bad rows an error lists; the rest is counted."""

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"PAR1": "Parquet", b"PK\x03\x04": "a zip archive"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What one source of the recipe gave: its conversations, the format they were read as, and how it was known."""

    source: DataSource
    format: str
    recognised: str
    conversations: tuple[Conversation, ...]


def expand_bundled(sources: Sequence[DataSource]) -> tuple[DataSource, ...]:
    """Put the files of a bundled data set in the place of its name.

    A bundled set comes with its own split. With `split: eval` (say) only that part of it is taken.
    """
    expanded: list[DataSource] = []
    for source in sources:
        if source.path not in BUNDLED_DATA:
            expanded.append(source)
            continue
        folder = Path(str(resources.files("luthier"))) / "assets" / "data" / source.path
        for split in ("train", "eval", "test"):
            if source.split in ("all", split):
                path = str(folder / f"{split}.jsonl")
                expanded.append(source.model_copy(update={"path": path, "split": split}))
    return tuple(expanded)


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a JSONL file, one at a time.

    Raises:
        DataError: the file is missing, unreadable, empty or not JSONL; after the last good record, one error that
            lists the lines that are not JSON objects.
    """
    problems: list[Problem] = []
    for found in _scan(Path(path)):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            yield found
    if problems:
        raise _rows_error(problems, None)


def read_sources(sources: Sequence[DataSource]) -> tuple[SourceRows, ...]:
    """Read all sources of a recipe (bundled names included) into conversations.

    Raises:
        DataError: a file cannot be read, is empty or of no known format; or rows are bad: all of them, over all files.
    """
    if not sources:
        raise DataError("the recipe names no data", "add `data: rows.jsonl` to it")
    problems: list[Problem] = []
    loaded: list[SourceRows] = []
    rows = 0
    for source in expand_bundled(sources):
        found = list(_scan(Path(source.path)))
        rows += len(found)
        records = [_renamed(item, source) for item in found if isinstance(item, Record)]
        problems += [item for item in found if isinstance(item, Problem)]
        if not records:
            continue
        name, how = _format_of(source, records)
        conversations, bad = _convert(FORMATS[name], name, records)
        problems += bad
        loaded.append(SourceRows(source, name, how, conversations))
    if problems:
        raise _rows_error(problems, rows)
    return tuple(loaded)


def _rows_error(problems: Sequence[Problem], rows: int | None) -> DataError:
    count = f"{len(problems)}" + (f" of {rows}" if rows is not None else "")
    shown = f"; the first {SHOWN_PROBLEMS} are" if len(problems) > SHOWN_PROBLEMS else ""
    return DataError(
        f"{count} row{'s' if (rows or len(problems)) != 1 else ''} cannot be used{shown}:",
        "correct or remove these rows and run again",
        problems[:SHOWN_PROBLEMS],
    )


def _open_error(path: Path, error: OSError | None = None) -> DataError:
    if path.is_dir():
        return DataError(f"{path} is a folder, not a file", "name the JSONL file inside it")
    if error is not None and path.exists():
        return DataError(f"{path} cannot be read: {error.strerror}", "check who may read it (ls -l)")
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*names, *BUNDLED_DATA], n=1)
    where = "" if path.parent.is_dir() else f"; its folder {path.parent} does not exist either"
    meant = f"did you mean {near[0]}?" if near else f"give a JSONL file, or a bundled set: {', '.join(BUNDLED_DATA)}"
    return DataError(f"there is no file {path}{where}", meant)


def _scan(path: Path) -> Iterator[Record | Problem]:
    """Each row of the file as a record, or as what is wrong with its line."""
    if not path.is_file():
        raise _open_error(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            for magic, kind in _MAGIC.items():
                if start.startswith(magic):
                    raise DataError(f"{path} is {kind}; data is read from plain JSONL", "unpack or convert it first")
            file.seek(0)
            rows = 0
            for number, line in enumerate(file, 1):
                line = (line.removeprefix(_BOM) if number == 1 else line).strip()
                if not line:
                    continue
                rows += 1
                found = _parse(line, str(path), number)
                if rows == 1 and isinstance(found, Problem) and line.startswith(b"["):
                    raise _array_error(path)
                yield found
    except OSError as error:
        raise _open_error(path, error) from error
    if rows == 0:
        raise DataError(f"{path} is empty", 'write one JSON object a line, such as {"question": …, "answer": …}')


def _array_error(path: Path) -> DataError:
    remedy = f"convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl"
    return DataError(f"{path}:1: the file is one JSON array; a row must be one object on one line (JSONL)", remedy)


def _parse(line: bytes, file: str, number: int) -> Record | Problem:
    try:
        value: object = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Problem(file, number, f"not JSON: {error.msg} (column {error.colno})")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else f"the value {line[:20].decode(errors='replace')}"
        return Problem(file, number, f"a row must be a JSON object, not {kind}")
    return Record(Source(file, number), value)


def _renamed(record: Record, source: DataSource) -> Record:
    """The record with its columns under the format's names: `source.fields` is {the format's name: the file's}."""
    if not source.fields:
        return record
    renamed = {key: value for key, value in record.fields.items() if key not in source.fields.values()}
    for ours, theirs in source.fields.items():  # a mapped column wins over one that happens to have the name already
        if theirs in record.fields:
            renamed[ours] = record.fields[theirs]
    return replace(record, fields=renamed)


def _formats_in_words() -> str:
    return "\n".join(f"    {name + ':':<19}{form.keys}   ({form.about})" for name, form in FORMATS.items())


def _format_of(source: DataSource, records: Sequence[Record]) -> tuple[str, str]:
    """The format's name, and in words how it was known."""
    for ours in source.fields:
        if not any(ours in record.fields for record in records):
            theirs = source.fields[ours]
            near = difflib.get_close_matches(theirs, list(records[0].fields), n=1)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(sorted(records[0].fields))}"
            raise DataError(f"{source.path}: `fields` takes {ours} from {theirs!r}, a key that no row has", hint)
    if source.format != "auto":
        return source.format, "as the recipe says"
    keys = list(records[0].fields)
    fitting = recognise(keys)
    if fitting:
        also = f"; {' and '.join(fitting[1:])} would fit too" if len(fitting) > 1 else ""
        return fitting[0], f"recognised by {' and '.join(FORMATS[fitting[0]].required)}{also}"
    shown = ", ".join(sorted(keys)) or "none"
    message = f"{records[0].source}: no format has these keys: {shown}\n  the formats are\n{_formats_in_words()}"
    raise DataError(message, _mapping_hint(keys))


def _mapping_hint(keys: Sequence[str]) -> str:
    near = nearest_format(keys)
    if near is None:
        return "say which of your keys is which: data: [{path: …, fields: {question: your-key, answer: another}}]"
    name, guessed = near
    unknown = {key: "your-key" for key in FORMATS[name].required if key not in keys}
    mapping = ", ".join(f"{ours}: {theirs}" for ours, theirs in (unknown | guessed).items())
    return f"nearest is {name}: say which of your keys is which, data: [{{path: …, fields: {{{mapping}}}}}]"


def _convert(form: Format, name: str, records: Sequence[Record]) -> tuple[tuple[Conversation, ...], list[Problem]]:
    conversations: list[Conversation] = []
    problems: list[Problem] = []
    for record in records:
        try:
            conversations.append(form(record))
        except RowError as error:
            other = next(iter(recognise(list(record.fields))), name)
            hint = f"the row looks like {other}; this file is read as {name}" if other != name else None
            problems.append(Problem(record.source.file, record.source.line, str(error), hint))
    return tuple(conversations), problems
