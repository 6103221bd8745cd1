"""Tokenised rows on disk, memory-mapped: made once, found again by what they were made from.

    <key>/
        rows.bin        one ROW record a row: where its tokens and fields lie, where it came from, what it says
        ids.bin         int32 token ids of all rows, one after another
        trained.bin     uint8, one a token: 1 where it is trained
        fields.bin      the rows' text fields as JSON objects, for rows that may be held out
        group.bin       int64, one a row: the smallest row that says the same or nearly (duplicates.py)
        rejected.jsonl  the rows that cannot be used, each with its reason
        store.json      the sizes of all of these, and a digest of the tokens

A store is written as `<key>.building`: its files only grow, and now and then they are flushed and their sizes and the
place reached in the sources noted in `progress.json`. After a kill, files are cut back to the noted sizes and reading
goes on from the noted place. Only when all is written and flushed is the folder renamed, so `<key>` is always whole.
One process at a time builds a key: it holds a lock that the system takes back when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import TypeAdapter

from luthier.data.duplicates import PERMUTATIONS, find_groups
from luthier.data.problems import RowProblem
from luthier.runs import SCHEMA_VERSION, flush_folder, read_json, write_json

__all__ = ["ROW", "Counts", "Part", "Rejected", "Store", "StoreWriter", "building", "open_store"]

ROW = np.dtype(
    [
        ("offset", "<i8"),  # of the first token in ids.bin, in tokens
        ("length", "<i4"),  # tokens
        ("labelled", "<i4"),  # trained tokens, the row's first not counted: nothing comes before it
        ("answer", "<i4"),  # tokens before the last answer; `length` where it cannot be told from its prompt
        ("source", "<i4"),  # which of the sources
        ("line", "<i8"),  # in its file, from 1
        ("content", "<u8"),  # first 8 bytes of SHA-256 of what is said, see split.py
        ("group_key", "<u8"),  # the same of the value of the key that `split_by` names; 0 without
        ("fields_at", "<i8"),  # in fields.bin, in bytes
        ("fields_size", "<i4"),
    ]
)
_GROWING = ("rows.bin", "ids.bin", "trained.bin", "fields.bin", "signatures.bin", "rejected.jsonl")
_KEPT = ("rows.bin", "ids.bin", "trained.bin", "fields.bin", "group.bin", "rejected.jsonl")
_BLOCK = 2**22

Scalar = TypeVar("Scalar", bound=np.generic)


class Rejected(NamedTuple):
    """A line of rejected.jsonl. `problem.file` is the file as it was named when the store was made."""

    source: int
    problem: RowProblem
    raw: str


_REJECTED = TypeAdapter(Rejected)


@dataclass
class Counts:
    """What was counted while the store was made. `read` and `rejected` are by source."""

    read: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    parted: int = 0
    systems_lost: int = 0
    exact: int = 0
    near: int = 0
    forms: int = 0


@dataclass(frozen=True)
class Part:
    """Some rows, in order, as they are added to a store. `rows` lacks its offsets, which the store knows."""

    rows: NDArray[np.void]
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    fields: bytes
    signatures: NDArray[np.uint16]
    rejected: bytes


@dataclass(frozen=True)
class Store:
    """A whole store, read-only. The arrays lie on disk: a row is read when it is looked at."""

    folder: Path
    rows: NDArray[np.void]
    ids: NDArray[np.int32]
    trained: NDArray[np.uint8]
    texts: NDArray[np.uint8]
    group: NDArray[np.int64]
    counts: Counts
    digest: str

    def fields(self, row: int) -> dict[str, str]:
        """The text fields of a row."""
        start, size = int(self.rows["fields_at"][row]), int(self.rows["fields_size"][row])
        found: dict[str, str] = orjson.loads(self.texts[start : start + size].tobytes() or b"{}")
        return found

    def rejected(self) -> Iterator[Rejected]:
        """The rows that could not be used, in the order of their sources and lines."""
        with (self.folder / "rejected.jsonl").open("rb") as file:
            for line in file:
                yield _REJECTED.validate_json(line)


def _mapped(path: Path, dtype: np.dtype[Scalar]) -> NDArray[Scalar]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def open_store(folder: Path) -> Store | None:
    """The store in `folder`; None where there is none, or where its files are not what they were when it was made."""
    try:
        document = read_json(folder / "store.json")
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA_VERSION:
        return None
    sizes = document["sizes"]
    if any(not (folder / name).is_file() or (folder / name).stat().st_size != sizes[name] for name in _KEPT):
        return None
    return Store(
        folder=folder,
        rows=_mapped(folder / "rows.bin", ROW),
        ids=_mapped(folder / "ids.bin", np.dtype(np.int32)),
        trained=_mapped(folder / "trained.bin", np.dtype(np.uint8)),
        texts=_mapped(folder / "fields.bin", np.dtype(np.uint8)),
        group=_mapped(folder / "group.bin", np.dtype(np.int64)),
        counts=Counts(**document["counts"]),
        digest=document["digest"],
    )


@contextmanager
def building(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Be the only process that builds `folder`; `waiting` is called once if another one has to end first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class StoreWriter:
    """Builds a store at `folder`, or goes on building it. Hold `building(folder)` meanwhile.

    Attributes:
        counts: what was counted up to here; the caller's to raise.
        source, row: the place in the sources up to which rows are in the store: all before `source`, and the first
            `row` of it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._beside = folder.with_name(f"{folder.name}.building")
        self.counts, self.source, self.row = Counts(), 0, 0
        sizes = self._recover()
        self._files = {name: (self._beside / name).open("ab") for name in _GROWING}
        self._sizes = {name: sizes.get(name, 0) for name in _GROWING}

    def _recover(self) -> dict[str, int]:
        """Cut the files back to what progress.json vouches for; begin anew where it vouches for nothing."""
        note = self._beside / "progress.json"
        if note.is_file():
            document = read_json(note)
            assert isinstance(document, dict)  # noqa: S101  written whole or not at all, by us, under the lock
            sizes: dict[str, int] = document["sizes"]
            files = {name: self._beside / name for name in _GROWING}
            if document["schema"] == SCHEMA_VERSION and all(
                file.is_file() and file.stat().st_size >= sizes[name] for name, file in files.items()
            ):
                for name, file in files.items():
                    os.truncate(file, sizes[name])
                self.counts = Counts(**document["counts"])
                self.source, self.row = document["source"], document["row"]
                return sizes
        shutil.rmtree(self._beside, ignore_errors=True)
        self._beside.mkdir(parents=True)
        return {}

    @property
    def written(self) -> int:
        """Rows in the store so far."""
        return self._sizes["rows.bin"] // ROW.itemsize

    def add(self, part: Part) -> None:
        """Append rows. `source`, `row` and `counts` are the caller's to move on."""
        rows = part.rows.copy()
        ends = np.cumsum(rows["length"], dtype=np.int64)
        rows["offset"] = self._sizes["ids.bin"] // 4 + ends - rows["length"]
        field_ends = np.cumsum(rows["fields_size"], dtype=np.int64)
        rows["fields_at"] = self._sizes["fields.bin"] + field_ends - rows["fields_size"]
        self._append("rows.bin", rows.tobytes())
        self._append("ids.bin", part.ids.astype("<i4", copy=False).tobytes())
        self._append("trained.bin", part.trained.tobytes())
        self._append("fields.bin", part.fields)
        self._append("signatures.bin", part.signatures.tobytes())
        self._append("rejected.jsonl", part.rejected)

    def _append(self, name: str, content: bytes) -> None:
        try:
            self._files[name].write(content)
        except OSError as error:
            raise _at(error, self._beside / name) from error
        self._sizes[name] += len(content)

    def _flush(self) -> None:
        for name, file in self._files.items():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise _at(error, self._beside / name) from error

    def save(self) -> None:
        """Vouch for all that was added: after a kill, building goes on from here."""
        self._flush()
        write_json(
            self._beside / "progress.json",
            {
                "schema": SCHEMA_VERSION,
                "source": self.source,
                "row": self.row,
                "sizes": self._sizes,
                "counts": asdict(self.counts),
            },
        )

    def close(self) -> None:
        """Let go of the files; what was saved stays."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk was told when it was written to
                file.close()

    def finish(self) -> None:
        """Find what says the same, seal the store and put it in its place."""
        self._flush()
        self.close()
        rows = _mapped(self._beside / "rows.bin", ROW)
        signature = _mapped(self._beside / "signatures.bin", np.dtype(np.uint16)).reshape(-1, PERMUTATIONS)
        groups = find_groups(rows["content"].copy(), signature)
        self.counts.exact, self.counts.near, self.counts.forms = groups.exact, groups.near, groups.forms
        with (self._beside / "group.bin").open("wb") as file:
            groups.group.astype("<i8").tofile(file)
            file.flush()
            os.fsync(file.fileno())
        write_json(
            self._beside / "store.json",
            {
                "schema": SCHEMA_VERSION,
                "sizes": {name: (self._beside / name).stat().st_size for name in _KEPT},
                "digest": _digest(self._beside),
                "counts": asdict(self.counts),
            },
        )
        del rows, signature
        for name in ("signatures.bin", "progress.json"):
            (self._beside / name).unlink(missing_ok=True)
        if self._folder.exists():  # a damaged one, or `open_store` would have given it
            shutil.rmtree(self._folder)
        self._beside.rename(self._folder)
        flush_folder(self._folder.parent)


def _digest(folder: Path) -> str:
    """SHA-256 over the lengths, ids and labels of all rows: the same one, the same training data."""
    found = hashlib.sha256()
    found.update(_mapped(folder / "rows.bin", ROW)["length"].tobytes())
    for name in ("ids.bin", "trained.bin"):
        with (folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
    return found.hexdigest()


def _at(error: OSError, path: Path) -> OSError:
    """The error with the file it is about, for the message: a write does not know its file's name."""
    return OSError(error.errno or errno.EIO, error.strerror or "cannot be written", str(path))
