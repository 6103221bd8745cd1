"""The run directory: the interface between stages.

    runs/<name>/ recipe.yaml  plan.json  data/{data.json,rejected.jsonl}  events.jsonl
                 checkpoints/{best,last}/…  adapter/  eval.json  exports/<kind>/…

Every write is atomic: a file is written beside its place, flushed to disk and renamed; a folder likewise. So a
reader, or a run that is killed, finds the old state or the new one, never half of either.

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

import orjson
import psutil

__all__ = [
    "SCHEMA_VERSION",
    "RunDirectory",
    "atomic_folder",
    "cache_root",
    "flush_folder",
    "read_json",
    "recover_folder",
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


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` last beyond a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically, making its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
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
            _remove(left)
    return path.is_dir()


def _leftovers(path: Path) -> list[tuple[Path, int]]:
    """What lies beside `path` under the names that writing it takes, with the process of each."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.(?:tmp|old)", re.ASCII)
    found = ((left, name.fullmatch(left.name)) for left in path.parent.iterdir())
    return [(left, int(match[1])) for left, match in found if match]


def _remove(left: Path) -> None:
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `path` when the block ends well, and vanishes when it does not.

    An older `path` is kept beside until the new one is in place, so there is never a moment without a good one on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        older = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(older)
        beside.rename(path)
        flush_folder(path.parent)
        _remove(older)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
        """The folder of one export: `hf`, `gguf` or `ollama`."""
        return self.path / "exports" / kind
