"""The files of a GGUF export: whether there is room, written beside, and moved to their place when they are whole.

Parts are NAME-00001-of-0000N.gguf, as the gguf library and llama.cpp name them. llama.cpp is given the first of them,
so that one is moved last: a kill in between leaves parts that nothing loads, never a mixture of two exports.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import FitError
from luthier.export.gguf_tensors import Planned, TensorBytes, final_size
from luthier.export.gguf_types import K_QUANTS, Quantize
from luthier.runs import flush_folder

__all__ = ["GB", "check_room", "folder_beside", "place", "written"]

GB = 1_000_000_000


def check_room(folder: Path, planned: Sequence[Planned], quantize: Quantize, keys: int) -> None:
    """Say before the first byte that the disk is too small."""
    final = sum(final_size(tensor, quantize) for tensor in planned) + keys
    between = sum(TensorBytes(tensor).nbytes for tensor in planned) + keys if quantize in K_QUANTS else 0
    free = shutil.disk_usage(folder).free
    if free >= final + between:
        return
    needs = f"{final / GB:.2f} GB" if not between else f"{final / GB:.2f} GB and {between / GB:.2f} GB for a while"
    raise FitError(
        f"{quantize} needs {needs} in {folder}, and its disk has {free / GB:.2f} GB left: nothing was written",
        f"Free {(final + between - free) / GB:.2f} GB"
        + (", or take q8_0 or q4_0, which are written in one step." if between else ", or take a smaller --quantize."),
    )


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder on the same disk for what is being written; it is removed with what is left in it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.mkdir(mode=0o700)
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _part_names(path: Path) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(path.name)}|{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}\.gguf", re.ASCII)


def written(path: Path) -> list[Path]:
    """The file at `path`, or the parts it was written in, in order."""
    name = _part_names(path)
    return sorted(found for found in path.parent.iterdir() if name.fullmatch(found.name))


def place(beside: Path, path: Path) -> list[Path]:
    """Move what was written in `beside` to where it belongs, in the place of what is there by this name."""
    made = written(beside / path.name)
    for part in made:
        with part.open("rb") as file:
            os.fsync(file.fileno())
    places = [path.parent / (part.name if len(made) > 1 else path.name) for part in made]
    if len(made) > 1:
        for old in written(path):  # parts of two exports would load, and be no model
            old.unlink()
    for part, its in reversed(list(zip(made, places, strict=True))):
        part.replace(its)
    for old in written(path):
        if old not in places:
            old.unlink()
    flush_folder(path.parent)
    return places
