"""Tokenizers that say everything themselves, read without transformers, which takes seconds to import.

Llama 3 and what was made of it have the class `PreTrainedTokenizerFast` (`TokenizersBackend` since transformers 5): the
tokenizer is what tokenizer.json says, and tokenizer_config.json only names its special tokens. Anything beyond that (a
setting that is not known here, a special token that tokenizer.json lacks, files of older layouts) is left to
transformers. Tests hold what is read here against what transformers makes of the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from luthier.guard.documents import read_object
from luthier.guard.tokenizer import TOKENIZER_BYTES

__all__ = ["Plain", "read_plain"]

_Document: TypeAlias = Mapping[str, object]

_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_FAMILIES = (None, "llama")  # transformers mends the tokenizers of other families
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_SAY_NOTHING = (  # of how text becomes ids
    *("backend", "tokenizer_class", "chat_template", "added_tokens_decoder", "clean_up_tokenization_spaces"),
    *("is_local", "local_files_only", "model_input_names", "model_max_length", "padding_side"),
)


@dataclass(frozen=True)
class Plain:
    """A tokenizer and what its own file does not say of it. `special` by the names that templates use."""

    backend: Tokenizer
    special: dict[str, str]
    chat_template: str | None


def read_plain(folder: Path) -> Plain | None:
    """The tokenizer of a model's folder; None where transformers is needed to read it, or to say what is wrong.

    Raises:
        FileError: its settings or the model's are no JSON object that every program reads the same.
    """
    try:
        whole = _read(folder / "tokenizer.json")
    except (OSError, ValueError, RecursionError):
        return None
    if not (folder / "tokenizer_config.json").is_file():
        return None
    config = read_object(folder / "tokenizer_config.json", TOKENIZER_BYTES)
    model = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None
    special = {name: str(config[name]) for name in _NAMED if config.get(name) is not None}
    try:
        plain = _says_everything(folder, config, model, whole, special)
        backend = Tokenizer.from_file(str(folder / "tokenizer.json")) if plain else None
    except Exception:  # noqa: BLE001  tokenizers raises no narrower one: the file is damaged or newer than this version
        return None
    if backend is None or not (template is None or isinstance(template, str)):
        return None
    if backend.post_processor is None:  # transformers puts one there that adds nothing
        backend.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return Plain(backend, special, template)


def _says_everything(
    folder: Path, config: _Document, model: _Document, whole: _Document, special: Mapping[str, str]
) -> bool:
    """Whether transformers would add nothing to what tokenizer.json says."""
    return (
        config.get("tokenizer_class") in _CLASSES
        and model.get("model_type") in _FAMILIES
        and set(config) <= {*_NAMED, *_SAY_NOTHING}
        and _adds_nothing(folder, config, whole, special)
        and not (folder / "additional_chat_templates").exists()
    )


def _read(path: Path) -> _Document:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object")
    return document


def _adds_nothing(folder: Path, config: _Document, whole: _Document, special: Mapping[str, str]) -> bool:
    """Whether every special token is one of tokenizer.json, as it stands there."""
    listed = whole.get("added_tokens")
    if not isinstance(listed, list) or whole.get("truncation") is not None or whole.get("padding") is not None:
        return False
    own = {str(token["id"]): {name: token[name] for name in token if name != "id"} for token in listed}
    again = config.get("added_tokens_decoder")
    if again is None:  # then transformers reads these two, of an older layout
        if any((folder / name).is_file() for name in ("special_tokens_map.json", "added_tokens.json")):
            return False
    elif again != own:
        return False
    named = {token["content"] for token in own.values() if token["special"]}
    return all(isinstance(config[name], str) and text in named for name, text in special.items())
