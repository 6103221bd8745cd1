"""A name that an index or an archive gives, and a file that a folder holds, stay in that folder.

A link is followed as far as it stays inside. One exception: in the cache of the Hugging Face hub a model's folder holds
links to where its files lie, and both are in one folder of the model's own:

    models--OWNER--NAME/snapshots/COMMIT/config.json  ->  models--OWNER--NAME/blobs/DIGEST
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PureWindowsPath

from luthier.errors import FileError

__all__ = ["check_folder", "check_inside", "inside", "is_name"]

_FETCH = "Fetch it again from a source that you trust; a file that is meant to be there, copy into the folder."
_LONGEST_NAME, _LONGEST_PART = 1024, 255
"""Bytes, and of each part of it; no more is possible on most systems."""
_READ = (".json", ".jinja", ".model", ".txt", ".md", ".safetensors")
"""Endings of the files of a model's folder that are read here, by the libraries, or copied into what is made of it."""
_COPIED = ("LICENSE", "NOTICE", "USE_POLICY")
_WHOLE = (
    *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
"""Names of those that are taken into memory at once. Other files, such as what a trainer left, may have any size."""
_WHOLE_ENDINGS = (".jinja", ".model")
_MOST_BYTES = 2**26
"""Of such a file; the largest tokenizers have half of it."""


def inside(folder: Path, name: str, source: Path) -> Path:
    """The file `name` of `folder`, where it is a plain file in it, not in a folder below: what is made of several files
    would have several of one name. `source` is what names it, for the message.

    Raises:
        FileError: the name leads out of the folder or further in, is no name, or there is no plain file of it.
    """
    if not is_name(name):
        raise FileError(source, f"names the file {name[:200]!r}, which leads out of its folder or is no name", _FETCH)
    if "/" in name:
        raise FileError(source, f"names the file {name[:200]!r}, which lies in a folder below", "Move it up.")
    check_inside(folder, folder / name)
    return folder / name


def is_name(name: str) -> bool:
    """Whether it names something below a folder, on any system: no way up, no root, no drive."""
    return (
        name.isprintable()  # also: no half of a surrogate pair, which no file system takes
        and len(name.encode()) <= _LONGEST_NAME
        and not any(part in ("", ".", "..") for part in name.split("/"))  # "": an absolute path begins with it
        and all(len(part.encode()) <= _LONGEST_PART for part in name.split("/"))
        and "\\" not in name
        and not PureWindowsPath(name).drive
    )


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a file of `folder` that is not there, not a plain file, or a link that leads out."""
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        mode = os.stat(real).st_mode
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise FileError(path, "is not there, or may not be read", _FETCH) from error
    if not real.is_relative_to(home) and not _same_hub_repository(home, real):
        raise FileError(path, "is a link that leads out of its folder, and is not followed", _FETCH)
    if not stat.S_ISREG(mode):
        raise FileError(path, "is not a plain file (a folder, a pipe or a device)", _FETCH)


def _same_hub_repository(home: Path, real: Path) -> bool:
    """Whether a snapshot's link leads to the blobs of its own repository in the hub's cache."""
    for folder in home.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return real.is_relative_to(folder.parent / "blobs")
    return False


def check_folder(folder: Path) -> None:
    """Refuse a model's or an adapter's folder in which a file that could be read is not a plain one of its own.

    A pickle (.bin, .pt, …) is not looked at, since none is ever opened.

    Raises:
        FileError: such a file leads out of the folder, is a pipe or a device, or is larger than any of its kind.
    """
    for path in _files(folder):
        if path.name.endswith(_READ) or path.name.startswith(_COPIED):
            if path.is_dir() and not path.is_symlink():
                continue
            check_inside(folder, path)
            size = path.stat().st_size
            if size > _MOST_BYTES and _is_read_whole(path.name):
                raise FileError(path, f"has {size:,} bytes; a file of this kind has at most {_MOST_BYTES:,}", _FETCH)


def _is_read_whole(name: str) -> bool:
    return name in _WHOLE or name.endswith(_WHOLE_ENDINGS) or name.startswith(_COPIED)


def _files(folder: Path) -> list[Path]:
    """What lies in the folder, and in the one below it that tokenizers read."""
    try:
        below = folder / "additional_chat_templates"
        if below.is_symlink():
            raise FileError(below, "is a link that leads out of its folder, and is not followed", _FETCH)
        found = sorted(folder.iterdir())
        return found + (sorted(below.iterdir()) if below.is_dir() else [])
    except OSError as error:
        raise FileError(folder, f"cannot be listed: {error.strerror}", "Look whether it may be read.") from error
