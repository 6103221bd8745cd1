"""The run directory: the interface between stages.

    runs/<name>/ recipe.yaml  plan.json  data/data.json  events.jsonl
                 checkpoints/{best,last}/…  adapter/  eval.json  exports/<kind>/…

Every write is atomic: a file is written beside its place, flushed to disk and renamed; a folder likewise. So a
reader, or a run that is killed, finds the old state or the new one, never half of either.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

__all__ = ["SCHEMA_VERSION", "RunDirectory", "atomic_folder", "read_json", "write_json", "write_text"]

SCHEMA_VERSION = 1
"""Written as `schema` into every JSON document of a run; raised when a name in one changes its meaning."""


def _flush_folder(folder: Path) -> None:
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
    _flush_folder(path.parent)


def write_json(path: Path, document: object) -> None:
    """Write a JSON document atomically: indented, keys in the order given, dataclasses as objects."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    write_text(path, orjson.dumps(document, option=options).decode())


def read_json(path: Path) -> object:
    """The JSON document at `path`."""
    document: object = orjson.loads(path.read_bytes())
    return document


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `path` when the block ends well, and vanishes when it does not.

    An older `path` is kept beside until the new one is in place, so there is never a moment without a good one on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
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
        _flush_folder(path.parent)
        shutil.rmtree(older, ignore_errors=True)
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
