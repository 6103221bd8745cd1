"""exports/KIND/verify.json: what verification found of each model in an export's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from luthier.guard.documents import INDEX_BYTES, read_object
from luthier.runs import SCHEMA_VERSION, RunDirectory, write_json

__all__ = ["document_path", "forget", "has_passed", "merge_document"]

Entry = dict[str, object]


def document_path(run: RunDirectory, kind: str) -> Path:
    """Where it stands."""
    return run.export(kind) / "verify.json"


def _entries(run: RunDirectory, kind: str) -> list[Entry]:
    path = document_path(run, kind)
    found = read_object(path, INDEX_BYTES).get("models") if path.is_file() else None
    return [cast("Entry", one) for one in (found if isinstance(found, list) else []) if isinstance(one, dict)]


def has_passed(run: RunDirectory, kind: str) -> bool:
    """Whether the export was verified, and every model of it is the one that was trained."""
    found = _entries(run, kind)
    return bool(found) and all(one.get("passed") is True for one in found)


def forget(run: RunDirectory, kind: str, gone: Callable[[str], bool]) -> None:
    """Take out what was found of files that are about to be written anew."""
    found = _entries(run, kind)
    left = [one for one in found if not gone(str(one.get("file")))]
    if not left:
        document_path(run, kind).unlink(missing_ok=True)
    elif len(left) < len(found):
        _write(run, kind, left, {})


def merge_document(
    run: RunDirectory, kind: str, new: Sequence[Entry], there: set[str], more: Entry | None = None
) -> None:
    """Write what was found now (`new`) beside what was found before of other files that are still `there`.

    A model that could not be asked now does not put out what was found of it before.
    """
    before = _entries(run, kind)
    known = {one.get("file") for one in before}
    new = [one for one in new if one["passed"] is not None or one["file"] not in known]
    named = {one["file"] for one in new}
    models = [*(one for one in before if one.get("file") in there - named), *new]
    if new:
        _write(run, kind, models, more or {})


def _write(run: RunDirectory, kind: str, models: Sequence[Entry], more: Entry) -> None:
    """On top what failed, where something did, else the last."""
    told = next((one for one in models if one.get("passed") is False), models[-1])
    document = {"schema": SCHEMA_VERSION, "kind": kind, **told, "models": list(models), **more}
    write_json(document_path(run, kind), document)
