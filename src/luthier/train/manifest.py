"""A folder's manifest: what belongs in it, to the byte, so that what is cut short, flipped or missing is found by name.

    manifest.json   {"schema", "kind", "step", "files": {NAME: {"bytes", "sha256"}, …}, "sha256"}

`sha256` at the end is of the text of the manifest without it, and the text has one form only (`_text`): so a byte that
is changed in the manifest itself is found as well. It guards against faults of disks, copies and hands, not against
somebody who can write into the folder: they can make a new one.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import orjson
from pydantic import TypeAdapter, ValidationError

from luthier.guard.inside import is_name
from luthier.guard.secrets import printable
from luthier.runs import flush_folder, write_text

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "Fault",
    "FileRecord",
    "Manifest",
    "check",
    "digest",
    "faults",
    "read",
    "seal",
    "strangers",
]

MANIFEST = "manifest.json"
SCHEMA = 2
"""Of checkpoints and finished adapters. 1 were `checkpoints/last` and `best`, without manifests; they are not read."""

_LONGEST = 2**20
_CHUNK = 2**20
_SHOWN = 5
_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE

Kind = Literal["checkpoint", "adapter"]


@dataclass(frozen=True)
class FileRecord:
    """What a file is: its size in bytes, and SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. `step`: updates done when it was written; `files` by their path in the folder, with `/`."""

    schema: int
    kind: Kind
    step: int
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Fault:
    """One thing in a folder that is not as it was written. `file` is its path in the folder."""

    file: str
    reason: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}: {self.found}, where {self.expected} was written"


class _UnreadableError(Exception):
    """The manifest itself is not whole."""

    def __init__(self, reason: str, expected: str, found: str) -> None:
        self.fault = Fault(MANIFEST, reason, expected, found)
        super().__init__(reason)


_MANIFEST = TypeAdapter(Manifest)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def seal(folder: Path, kind: Kind, step: int) -> None:
    """Write the manifest of what is in `folder` now. Raises OSError where that cannot be."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    records = {name: FileRecord((folder / name).stat().st_size, digest(folder / name)) for name in names}
    records.pop(MANIFEST, None)
    write_text(folder / MANIFEST, _text(Manifest(SCHEMA, kind, step, records)).decode())
    for inner in {(folder / name).parent for name in records}:
        flush_folder(inner)


def _text(manifest: Manifest) -> bytes:
    document: dict[str, object] = {
        "schema": manifest.schema,
        "kind": manifest.kind,
        "step": manifest.step,
        "files": dict(manifest.files),
    }
    own = hashlib.sha256(orjson.dumps(document, option=_OPTIONS)).hexdigest()
    return orjson.dumps({**document, "sha256": own}, option=_OPTIONS)


def read(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises ValueError, saying what is wrong, where it is not whole."""
    try:
        return _read(folder)
    except _UnreadableError as error:
        raise ValueError(str(error.fault)) from error


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise _UnreadableError("missing", "a manifest", "no such file")
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST + 1)
    except OSError as error:
        raise _UnreadableError("cannot be read", "a manifest", str(error.strerror)) from error
    if len(text) > _LONGEST:
        raise _UnreadableError("too long", f"at most {_LONGEST:,} bytes", f"more than {_LONGEST:,}")
    try:
        document = orjson.loads(text)
        stated = document.pop("sha256") if isinstance(document, dict) else None
        manifest = _MANIFEST.validate_python(document)  # lax: `_text` below allows one spelling only
    except (orjson.JSONDecodeError, KeyError, ValidationError, RecursionError) as error:
        raise _UnreadableError("not a manifest", "a manifest", str(error).splitlines()[0]) from error
    if _text(manifest) != text:
        own = hashlib.sha256(orjson.dumps(document, option=_OPTIONS)).hexdigest()
        raise _UnreadableError("changed", f"SHA-256 {stated}", f"SHA-256 {own}, or another spelling")
    outside = [name for name in manifest.files if not is_name(name) or name == MANIFEST]
    if outside:
        raise _UnreadableError("names a file outside its folder", "names below it", repr(outside[0]))
    return manifest


def check(folder: Path, kind: Kind, step: int | None = None) -> list[Fault]:
    """Everything in `folder` that is not as its manifest says; nothing where all is. Reads every byte.

    Args:
        folder: written by `seal`.
        kind: what it should be.
        step: of which it should be; None: of any.
    """
    try:
        manifest = _read(folder)
    except _UnreadableError as error:
        return [error.fault]
    if manifest.schema != SCHEMA:
        return [Fault(MANIFEST, "of another version of luthier", f"schema {SCHEMA}", f"schema {manifest.schema}")]
    if manifest.kind != kind:
        return [Fault(MANIFEST, "of something else", kind, manifest.kind)]
    if step is not None and manifest.step != step:
        return [Fault(MANIFEST, "of another step", f"step {step}", f"step {manifest.step}")]
    return faults(folder, manifest)


def strangers(folder: Path) -> str:
    """What lies in `folder`, which is whole, and is not in its manifest, to be shown; "" where there is nothing.

    None of it is ever opened.
    """
    known = {*read(folder).files, MANIFEST}
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(name for path in found if (name := path.relative_to(folder).as_posix()) not in known)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return printable(", ".join(names[:_SHOWN]) + more)


def faults(folder: Path, manifest: Manifest) -> list[Fault]:
    """Every file of the manifest that is not as it says."""
    found = (_fault(folder, name, record) for name, record in manifest.files.items())
    return [fault for fault in found if fault is not None]


def _fault(folder: Path, name: str, record: FileRecord) -> Fault | None:
    path = folder / name
    # A link, of the file or of a folder on the way to it, leads to what somebody else may change.
    if any((folder / part).is_symlink() for part in (name, *map(str, PurePosixPath(name).parents[:-1]))):
        return Fault(name, "a link", "a file", "a symbolic link")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return Fault(name, "not a file", "a file", "something else")
        if status.st_size != record.bytes:
            return Fault(name, "another size", f"{record.bytes:,} bytes", f"{status.st_size:,} bytes")
        own = digest(path)
    except FileNotFoundError:
        return Fault(name, "missing", f"{record.bytes:,} bytes", "no such file")
    except OSError as error:
        return Fault(name, "cannot be read", f"{record.bytes:,} bytes", str(error.strerror))
    if own != record.sha256:
        return Fault(name, "changed", f"SHA-256 {record.sha256}", f"SHA-256 {own}")
    return None
