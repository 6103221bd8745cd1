"""The run directory: the interface between stages.

    runs/<name>/ recipe.yaml  plan.json  data/{data.json,rejected.jsonl}  events.jsonl
                 checkpoints/{step-000100/…,LATEST,BEST}  adapter/  eval.json  exports/<kind>/…

Every write is atomic: a file is written beside its place, flushed to disk and renamed; a folder likewise. So a
reader, or a run that is killed, finds the old state or the new one, never half of either.

A run directory is its user's alone: `make_private` gives it the mode 0700, and what is written into a private folder
by the functions here is private too (0600, folders 0700). A folder that the user made keeps the mode they gave it.

What is written beside a NAME is called `.NAME.PID.tmp`, and the older NAME, for the moment between two renames,
`.NAME.PID.old`. A killed process leaves them behind: `recover_folder` puts back what is needed and removes the rest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson
import psutil

from luthier.errors import FileError

__all__ = [
    "SCHEMA_VERSION",
    "RunDirectory",
    "atomic_folder",
    "cache_root",
    "check_places",
    "file_mode",
    "flush_folder",
    "make_private",
    "open_new",
    "read_json",
    "recover_folder",
    "remove_litter",
    "remove_path",
    "write_json",
    "write_text",
]

SCHEMA_VERSION = 1
"""Written as `schema` into every JSON document of a run; raised when a name in one changes its meaning."""


def cache_root() -> Path:
    """What is kept between runs: $LUTHIER_CACHE, else $XDG_CACHE_HOME/luthier, else ~/.cache/luthier. Not made here."""
    chosen = os.environ.get("LUTHIER_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
    return Path(chosen) if chosen else base


def make_private(folder: Path) -> None:
    """Make `folder`, for its user alone; one that is there stays as it is. Missing parents get the usual mode."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    flush_folder(folder.parent)


def file_mode(folder: Path) -> int:
    """The mode of a new file in `folder`, before the umask: others may read it where they may enter the folder."""
    return 0o666 if folder.stat().st_mode & 0o077 else 0o600


def _make_folders(folder: Path) -> None:
    """Make `folder` and its missing parents, private below a private one."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(mode=0o777 if file_mode(folder.parent) == 0o666 else 0o700, exist_ok=True)


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` last beyond a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing, as private as its folder. What has its name is replaced; through a link that lies
    there nothing is written."""
    path.unlink(missing_ok=True)
    mode = file_mode(path.parent)
    return open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, mode))


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically, making its folder if missing."""
    _make_folders(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open_new(beside) as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:  # a signal, or a full disk, where it would keep the room that others need
        beside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_json(path: Path, document: object) -> None:
    """Write a JSON document atomically: indented, keys in the order given, dataclasses as objects."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    write_text(path, orjson.dumps(document, option=options).decode())


def read_json(path: Path) -> object:
    """The JSON document at `path`."""
    document: object = orjson.loads(path.read_bytes())
    return document


def recover_folder(path: Path) -> bool:
    """Make good what a killed process left of `path`, a folder written by `atomic_folder`; whether it is there then.

    Where `path` is missing, the newest older one of it is put back: the kill fell between the two renames. What else
    is beside it by this name, of processes that are no more, is removed.
    """
    if not path.parent.is_dir():
        return False
    if not path.exists():
        older = [left for left, _ in _leftovers(path) if left.suffix == ".old" and left.is_dir()]
        if older:
            max(older, key=lambda folder: folder.stat().st_mtime_ns).rename(path)
            flush_folder(path.parent)
    for left, pid in _leftovers(path):
        # Our own number on a leftover is of a process before us: a container gives the same ones at every start.
        if pid == os.getpid() or not psutil.pid_exists(pid):
            remove_path(left)
    return path.is_dir()


def _leftovers(path: Path) -> list[tuple[Path, int]]:
    """What lies beside `path` under the names that writing it takes, with the process of each."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.(?:tmp|old)", re.ASCII)
    found = ((left, name.fullmatch(left.name)) for left in path.parent.iterdir())
    return [(left, int(match[1])) for left, match in found if match]


_LITTER = re.compile(r"\..+\.\d{1,9}\.tmp", re.ASCII)


def remove_litter(run: Path) -> None:
    """Remove what killed processes left half-written in a run directory, beside the files that it was to become.

    To be called with the run's lock held: nobody else writes there. Checkpoints are looked after by their keeper.
    """
    for folder in (run, run / "data", run / "exports", run / "exports" / "gguf"):
        if folder.is_dir() and not folder.is_symlink():
            for left in list(folder.iterdir()):
                if _LITTER.fullmatch(left.name):
                    remove_path(left)


def remove_path(left: Path) -> None:
    """Remove a folder with all in it, a file, or a link; what is not there is no matter."""
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `path` when the block ends well, and vanishes when it does not.

    An older `path` is kept beside until the new one is in place, so there is never a moment without a good one on disk.
    """
    _make_folders(path.parent)
    recover_folder(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    older = path.with_name(f".{path.name}.{os.getpid()}.old")
    beside.mkdir(mode=0o777 if file_mode(path.parent) == 0o666 else 0o700)
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            elif file.is_dir():
                flush_folder(file)
        flush_folder(beside)
        if path.exists():
            path.rename(older)
        beside.rename(path)
        flush_folder(path.parent)
        remove_path(older)
    finally:
        if older.is_dir() and not path.exists():  # a signal came between the two renames
            older.rename(path)
        shutil.rmtree(beside, ignore_errors=True)


_WRITTEN_THROUGH = (".lock", "events.jsonl", "checkpoints", "data", "exports", "exports/gguf")


def check_places(run: Path) -> None:
    """Refuse a run directory in which a place that is written into, not replaced, is a link: it may lead anywhere.

    Raises FileError.
    """
    for name in _WRITTEN_THROUGH:
        if (run / name).is_symlink():
            raise FileError(
                run / name,
                "is a link, and is not written through",
                "Remove it; where it is to save room, make the whole run directory (--out) where there is some.",
            )


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Nothing is created until something is written."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        return self.path / "data" / "data.json"

    @property
    def rejected(self) -> Path:
        return self.path / "data" / "rejected.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "eval.json"

    def export(self, kind: str) -> Path:
        """The folder of one export, such as `hf`, `gguf`, `ollama` or `mlx`."""
        return self.path / "exports" / kind
