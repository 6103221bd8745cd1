"""What an adapter was trained on, and what a merged folder was made of: a small file beside each.

    adapter/base.json          the base's name and the fingerprint of its files
    exports/hf/luthier.json    the fingerprints of base and adapter, and which weights the adapter was merged into

So an adapter is not merged into another base of the same shapes, and an export is not made from a merge that is older
than its adapter. An adapter that PEFT wrote has no such file; its shapes alone are held against the base then.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from luthier.guard.documents import read_object
from luthier.model.adapter import WEIGHTS
from luthier.model.fingerprint import fingerprint
from luthier.runs import SCHEMA_VERSION, write_json

__all__ = ["is_merged_from", "merged_onto", "note_base", "note_merge", "other_base"]

BASE, MERGED = "base.json", "luthier.json"


def note_base(folder: Path, name: str, weights: str) -> None:
    """Write beside an adapter which base it belongs to: its `name`, and the fingerprint `weights` of its files."""
    write_json(folder / BASE, {"schema": SCHEMA_VERSION, "name": name, "weights": weights})


def other_base(adapter: Path, base: Path) -> str | None:
    """What says that `adapter` was trained on other files than those in `base`; None where nothing does."""
    path = adapter / BASE
    if not path.is_file():
        return None
    noted = read_object(path)
    then, now = noted.get("weights"), fingerprint(base)
    if not isinstance(then, str) or then == now:
        return None
    name = str(noted.get("name", "the base"))[:200]
    return f"its fingerprint is {now[:12]}…, and that of {name}, which the adapter was trained on, was {then[:12]}…"


def note_merge(folder: Path, base: Path, adapter: Path, onto: str) -> None:
    """Write into a merged `folder` what it was made of; `onto`: `16-bit` or `nf4`, the weights that were added to."""
    made = {"base": fingerprint(base), "adapter": _digest(adapter), "onto": onto}
    write_json(folder / MERGED, {"schema": SCHEMA_VERSION, **made})


def is_merged_from(folder: Path, adapter: Path) -> bool:
    """Whether the merged `folder` is there and was made of the adapter as it is now."""
    if not (folder / "config.json").is_file() or not (folder / MERGED).is_file():
        return False
    return read_object(folder / MERGED).get("adapter") == _digest(adapter)


def merged_onto(folder: Path) -> str:
    """`16-bit` or `nf4`: what the adapter was added to in the merged `folder`."""
    path = folder / MERGED
    return str(read_object(path).get("onto", "16-bit")) if path.is_file() else "16-bit"


def _digest(adapter: Path) -> str:
    found = hashlib.sha256()
    with (adapter / WEIGHTS).open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()
