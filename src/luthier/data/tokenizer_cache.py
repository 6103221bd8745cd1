"""A tokenizer as transformers loaded it, kept so that the next start need not import transformers, which takes seconds.

    tokenizers/<key>/   in the cache; the key is a digest of the folder's tokenizer files and the libraries' versions
        tokenizer.json  the tokenizer, whole
        about.json      what else transformers found: special tokens, end of sequence, chat template

Without a cache that can be written to, nothing is lost but the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer

from luthier.data.cache import cache_folder, mark_used, remove_unused
from luthier.errors import UsageError
from luthier.runs import atomic_folder, write_json

__all__ = ["About", "find_tokenizer", "keep_tokenizer"]

_VERSION = 2
"""Raised when ours makes other things of the same files, or refuses some that it made."""

_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json"),
)


@dataclass(frozen=True)
class About:
    """What a tokenizer's own file does not say. `special` by the names that templates use."""

    special: Mapping[str, str | list[str]]
    eos_ids: tuple[int, ...]
    chat_template: str | None
    fingerprint: str


_ABOUT = TypeAdapter(About)


def _place(folder: Path) -> Path:
    found = hashlib.sha256(f"{_VERSION};{version('transformers')};{version('tokenizers')}".encode())
    for name in _FILES:
        if (folder / name).is_file():
            found.update(f";{name};".encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found.update(extra.name.encode() + hashlib.sha256(extra.read_bytes()).digest())
    return cache_folder("tokenizers") / found.hexdigest()[:32]


def find_tokenizer(folder: Path) -> tuple[Tokenizer, About] | None:
    """The tokenizer of a model's folder, if it was kept when it was last loaded and its files are the same."""
    try:
        place = _place(folder)
        about = _ABOUT.validate_json((place / "about.json").read_bytes())
        mark_used(place)
    except (OSError, UsageError, ValidationError):  # not kept, or not by this version of ours
        return None
    return Tokenizer.from_file(str(place / "tokenizer.json")), about


def keep_tokenizer(folder: Path, backend: Tokenizer, about: About) -> None:
    """Keep what transformers made of a model's folder."""
    with suppress(OSError, UsageError):  # only the time is lost
        place = _place(folder)
        remove_unused(place.parent)
        with atomic_folder(place) as beside:
            backend.save(str(beside / "tokenizer.json"), pretty=False)
            write_json(beside / "about.json", asdict(about))
