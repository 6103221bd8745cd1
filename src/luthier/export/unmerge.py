"""From a merged model back to its base, to the last byte.

    recorded while merging:    difference = bits(W) - bits(W')   per tensor, as integers, compressed
    undone:                    bits(W) = bits(W') + difference

What is subtracted are bit patterns, not numbers: W' was rounded, so W' - s B A is not W, and the product s B A comes
out with other last bits on another machine. Integers do not. A tensor that the merge left as it was takes no room; one
that is in another dtype than in the base, or is not in the merged model at all, is kept whole.

    unmerge/<weights file>     compressed differences (U8), the base file's own header, its SHA-256
    unmerge/config.json …      the base's small files that a merge writes anew

The folder lies inside the merged one, where programs that read `*.safetensors` beside config.json do not find it.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from luthier.errors import ExportError
from luthier.export.room import check_room
from luthier.guard.header import BITS, LONGEST_HEADER, StoredTensor, check_safetensors
from luthier.model.locate import INDEX
from luthier.model.tensor_file import write_tensors
from luthier.runs import atomic_folder

__all__ = ["RECORD", "Unmerged", "record", "unmerge"]

RECORD = "unmerge"
SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", INDEX, "README.md")
"""Files that a merge writes anew."""
OURS = ("luthier.json", "verify.json")
"""Files that say what a merged folder is, and are nothing of its base."""
_HEADER, _HASH = "header", "sha256"
_DIFFERENCE, _WHOLE = "difference", "whole"
_LEVEL = 1
"""zlib's: higher levels take several times as long for a tenth of the size."""
_WORDS: Mapping[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_REMEDY = "merge again; the base itself is found by its name in recipe.yaml, at the commit in plan.json"


@dataclass(frozen=True)
class Unmerged:
    """A folder with the base's bytes, and how many weight files it has."""

    folder: Path
    files: int


def record(base: Path, merged: Path, file: str) -> None:
    """Write into `merged` what its weights file `file` lacks to be the base's, and the base's small files."""
    folder = merged / RECORD
    folder.mkdir(exist_ok=True)
    for name in SMALL:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    before, after = check_safetensors(base / file), check_safetensors(merged / file)
    kept: dict[str, torch.Tensor] = {}
    kinds: dict[str, str] = {}
    for name, stored in before.tensors.items():
        mine = _bytes(base / file, stored)
        same_kind = name in after.tensors and after.tensors[name].dtype == stored.dtype
        if same_kind:
            other = _bytes(merged / file, after.tensors[name])
            if np.array_equal(mine, other):
                continue
            words = _WORDS[_width(stored)]
            mine = (mine.view(words) - other.view(words)).view(np.uint8)
        kinds[name] = _DIFFERENCE if same_kind else _WHOLE
        kept[f"tensor.{name}"] = _compressed(mine)
    first = min((stored.start for stored in before.tensors.values()), default=(base / file).stat().st_size)
    with (base / file).open("rb") as opened:
        kept[_HEADER] = _compressed(np.frombuffer(opened.read(first), dtype=np.uint8))
    write_tensors(folder / file, kept, {_HASH: _hash_of(base / file), **{f"kind.{k}": v for k, v in kinds.items()}})


def unmerge(merged: Path, out: Path) -> Unmerged:
    """Write the base that `merged` was made of to the folder `out`, atomically; every file is held against its hash.

    Raises ExportError where `merged` has no record, or is no longer what it was when it was merged.
    """
    folder = merged / RECORD
    files = sorted(folder.glob("*.safetensors"))
    if not (merged / "config.json").is_file():
        raise ExportError(f"there is no merged model in {merged} to turn back", "luthier merge RUN makes one")
    if not files:
        raise ExportError(
            f"{merged} cannot be turned back: it was merged without a record of what was there before",
            "luthier merge RUN --reversible keeps one; the base itself is found by its name in recipe.yaml",
        )
    check_room(out, sum((merged / path.name).stat().st_size for path in files), "the base")
    with atomic_folder(out) as beside:
        for path in sorted(merged.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (*SMALL, *OURS):
                shutil.copyfile(path, beside / path.name)
        for path in folder.iterdir():
            if path.suffix != ".safetensors":
                shutil.copyfile(path, beside / path.name)
        for path in files:
            _restore(merged / path.name, path, beside / path.name)
    return Unmerged(out, len(files))


def _restore(merged: Path, recorded: Path, out: Path) -> None:
    held, after = check_safetensors(recorded), check_safetensors(merged)
    with safe_open(recorded, framework="pt") as opened, out.open("wb") as file:
        raw = _expanded(opened.get_tensor(_HEADER), LONGEST_HEADER + 8)
        file.write(raw.tobytes())
        for name, size in _in_order(raw.tobytes()):
            kind = held.metadata.get(f"kind.{name}")
            if kind is not None:
                found = _expanded(opened.get_tensor(f"tensor.{name}"), size)
            if kind != _WHOLE and name not in after.tensors:
                raise _changed(merged)
            if kind is None:
                found = _bytes(merged, after.tensors[name])
            elif kind == _DIFFERENCE:
                words = _WORDS[_width(after.tensors[name])]
                other = _bytes(merged, after.tensors[name])
                if other.nbytes != found.nbytes:
                    raise _changed(merged)
                found = (other.view(words) + found.view(words)).view(np.uint8)
            file.write(found.data)
    if _hash_of(out) != held.metadata.get(_HASH):
        raise _changed(merged)


def _changed(merged: Path) -> ExportError:
    return ExportError(f"{merged} is not the file that was merged, so it cannot be turned back", _REMEDY)


def _in_order(raw: bytes) -> list[tuple[str, int]]:
    """(name, bytes) of the tensors that a safetensors header names, in the order in which they lie in the file."""
    header = orjson.loads(raw[8:])
    places = [(*entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"]
    return [(name, stop - start) for start, stop, name in sorted(places)]


def _bytes(path: Path, stored: StoredTensor) -> NDArray[np.uint8]:
    """The tensor's bytes, read, not mapped: what is read of a mapping counts as memory until it is dropped."""
    with path.open("rb") as file:
        file.seek(stored.start)
        return np.frombuffer(file.read(stored.stop - stored.start), dtype=np.uint8)


def _width(stored: StoredTensor) -> int:
    return BITS[stored.dtype] // 8 or 1


def _compressed(found: NDArray[np.uint8]) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(found.tobytes(), _LEVEL)), dtype=torch.uint8)


def _expanded(packed: torch.Tensor, most: int) -> NDArray[np.uint8]:
    """What was compressed, which has at most `most` bytes."""
    return np.frombuffer(zlib.decompressobj().decompress(packed.numpy().tobytes(), most), dtype=np.uint8)


def _hash_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()
