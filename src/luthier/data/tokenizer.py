"""Text to token ids, with one promise: what a row says never becomes a special token.

A chat template writes control tokens (`<|eot_id|>`) as text, and the content it writes them around may hold the same
text: in a row about chat formats, or in one made to break out of its turn. Once both stand in one string, no tokenizer
can tell them apart. So:

    1. `guard` breaks every control token inside contents with a mark, a character that stands nowhere in them;
    2. the template renders the guarded contents, so that an unbroken control token is the template's own;
    3. `encode_guarded` writes the template's own as secret strings, takes the marks out, and encodes the text with a
       twin of the tokenizer that knows only the secret strings: contents meet a tokenizer without control tokens.

Most rows hold no control token in their contents; they have no mark and are encoded by the tokenizer itself in batches.
The result is what the tokenizer makes of each text between the template's control tokens, merges included.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from luthier.data.conversation import Turn
from luthier.data.jinja_chat import render_chat
from luthier.data.tokenizer_cache import About, find_tokenizer, keep_tokenizer
from luthier.data.tokenizer_plain import read_plain
from luthier.errors import DataError, FileError, ModelError
from luthier.guard.documents import read_object
from luthier.guard.inside import check_folder
from luthier.guard.keys import Keys
from luthier.guard.tokenizer import (
    MOST_TOKENS,
    TOKENIZER_BYTES,
    check_made,
    check_tokenizer,
    no_panic,
    probe,
)

__all__ = ["ChatTokenizer", "Guarded", "Tokens", "has_tokenizer", "load_tokenizer"]

Guarded: TypeAlias = tuple[str, str]
"""A text rendered from guarded contents, and the mark that `guard` gave."""

_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xF1000))
"""Code points that Unicode gives no meaning to: where a mark is taken from."""

_READ_BY_TRANSFORMERS = (
    *("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    "chat_template.json",
)
"""JSON objects beside tokenizer.json, which has a check of its own."""

_Tree: TypeAlias = dict[str, "_Tree"]


class Tokens(Protocol):
    """What encoding gave. `ids` is a new list at each access."""

    @property
    def ids(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class _Plain:
    ids: list[int]


class ChatTokenizer:
    """A model folder's fast tokenizer, with its special tokens, stop ids and chat template.

    Attributes:
        backend: the tokenizer of the tokenizers library.
        folder: where it came from.
        special: the special tokens by the names templates use (`bos_token`, `eos_token`, …).
        bos_id: the id of `bos_token`, None where the tokenizer has none.
        eos_ids: every id that ends generation: of generation_config.json, config.json and the tokenizer, in this order.
        chat_template: the model's jinja chat template, or None.
        adds_bos: whether the tokenizer puts BOS before plain text by itself.
        controls: text -> id of the tokens that contents can never become: the special ones and the ends of turns.
    """

    def __init__(
        self,
        backend: Tokenizer,
        folder: Path,
        special: Mapping[str, str | list[str]],
        eos_ids: Sequence[int],
        chat_template: str | None,
        fingerprint: str | None = None,
    ) -> None:
        """`fingerprint`: where it is known from before, for it takes a while."""
        # A tokenizer.json may carry a length to cut at or to pad to; both would change data silently.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.folder = folder
        self.special = dict(special)
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        self._fingerprint = fingerprint
        bos = self.special.get("bos_token")
        self.bos_id: int | None = backend.token_to_id(bos) if isinstance(bos, str) else None
        self.adds_bos = self.bos_id is not None and self.bos_id in backend.encode("a").ids[:1]
        added = backend.get_added_tokens_decoder()
        # A control token of one character could not be broken by a mark inside it.
        self.controls: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if len(token.content) > 1 and (token.special or number in self.eos_ids)
        }

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a document: the tokenizer's own, else the model's first stop id."""
        own = self.special.get("eos_token")
        if isinstance(own, str):
            return own
        return self.backend.id_to_token(self.eos_ids[0]) if self.eos_ids else None

    def token_id(self, text: str) -> int | None:
        """The id of a token by its text, None where there is none."""
        return self.backend.token_to_id(text)

    def token_text(self, number: int) -> str | None:
        """A token's text by its id, None where there is none."""
        return self.backend.id_to_token(number)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing put around it. With `special`, control tokens in it are taken for what they are."""
        if special or not self.control_pattern.search(text):
            with no_panic(self.folder):
                return self.backend.encode(text, add_special_tokens=False).ids
        mark, (guarded,) = self.guard([text])
        return self.encode_guarded(guarded, mark)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; with `skip_special`, special tokens are left out of it."""
        with no_panic(self.folder):
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, control tokens taken for what they are; in parallel."""
        with no_panic(self.folder):
            return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def tokens(self, texts: Sequence[Guarded]) -> Sequence[Tokens]:
        """The tokens of texts rendered from guarded contents; in parallel, and Python is free meanwhile."""
        if not any(mark for _, mark in texts):
            with no_panic(self.folder):
                return self.backend.encode_batch_fast([text for text, _ in texts], add_special_tokens=False)
        unmarked = [i for i, (_, mark) in enumerate(texts) if not mark]
        guarded = [i for i, (_, mark) in enumerate(texts) if mark]
        twin, secret_of, id_of = self._twin
        found: dict[int, Tokens] = dict(zip(unmarked, self.tokens([texts[i] for i in unmarked]), strict=True))
        told = [self._told(*texts[i], secret_of) for i in guarded]
        with no_panic(self.folder):
            encoded = twin.encode_batch_fast(told, add_special_tokens=False)
        for i, tokens in zip(guarded, encoded, strict=True):
            found[i] = _Plain([id_of.get(number, number) for number in tokens.ids])
        return [found[i] for i in range(len(texts))]

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        """The turns as the model's own chat template writes them.

        Raises:
            DataError: the model has no chat template, or the template refuses the turns.
        """
        if self.chat_template is None:
            raise DataError(f"the model in {self.folder} has no chat template", "set `template: alpaca`, or a text")
        return render_chat(self.chat_template, turns, generation_prompt=generation_prompt, special=self.special)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token, the longest one there is at a place."""
        return re.compile(_any_of(self.controls) if self.controls else "(?!)")

    @cached_property
    def _control_starts(self) -> tuple[str, ...]:
        """The two characters that control tokens begin with: a text with none of them holds no control token."""
        return tuple(sorted({text[:2] for text in self.controls}))

    def _have_controls(self, texts: Sequence[str]) -> bool:
        for start in self._control_starts:  # a plain search each; hardly any text comes to the pattern
            for text in texts:
                if start in text and self.control_pattern.search(text):
                    return True
        return False

    @cached_property
    def is_control(self) -> NDArray[np.bool_]:
        """For each id, whether it is a control token's."""
        found = np.zeros(max(self.backend.get_vocab(with_added_tokens=True).values()) + 1, dtype=np.bool_)
        found[list(self.controls.values())] = True
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides ids: the tokenizer's own file, its control tokens, their names."""
        if self._fingerprint is not None:
            return self._fingerprint
        settings = (sorted(self.controls.items()), sorted(self.special.items()), self.eos_ids)
        return hashlib.sha256(f"{self.backend.to_str()}{settings}".encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """The ids of the control tokens."""
        return frozenset(self.controls.values())

    def guard(self, contents: Sequence[str], *, edges: bool = False) -> tuple[str, Sequence[str]]:
        """Break the control tokens in `contents`: the mark ("" where there was nothing to break), the new contents.

        With `edges` every content gets a mark at both ends too: for a template that puts contents where they
        could make a control token with its own text or with each other (`<{title}>`), see `completable`.
        """
        if not edges and not self._have_controls(contents):
            return "", contents
        used = set().union(*contents)
        mark = next((chr(point) for point in _PRIVATE if chr(point) not in used), "")
        if not mark:
            raise DataError("a row uses every private code point of Unicode", "remove it")
        edge = mark if edges else ""
        return mark, [edge + self._broken(content, mark) + edge for content in contents]

    def _broken(self, content: str, mark: str) -> str:
        # Again until nothing is left: breaking one token can leave another that overlapped it.
        while self._have_controls((content,)):
            content = self.control_pattern.sub(lambda found: found[0][0] + mark + found[0][1:], content)
        return content

    def completable(self, pieces: Sequence[str]) -> bool:
        """Whether contents standing between these pieces of a template's text could make a control token with them.

        A piece may end like a control token begins, begin like one ends, or stand inside one: a piece that is empty,
        so that one content follows another, always does.
        """
        beginnings = tuple({control[:k] for control in self.controls for k in range(1, len(control))})
        ends = tuple({control[k:] for control in self.controls for k in range(1, len(control))})
        return (
            any(piece.endswith(beginnings) for piece in pieces[:-1])
            or any(piece.startswith(ends) for piece in pieces[1:])
            or any(piece in control[1:-1] for piece in pieces[1:-1] for control in self.controls)
        )

    def encode_guarded(self, text: str, mark: str) -> list[int]:
        """Ids of a text rendered from guarded contents, with the `mark` that `guard` gave."""
        return self.tokens([(text, mark)])[0].ids

    def _told(self, text: str, mark: str, secret_of: Mapping[str, str]) -> str:
        """A guarded text as the twin reads it."""
        return self.control_pattern.sub(lambda found: secret_of[found[0]], text).replace(mark, "")

    @cached_property
    def _twin(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """The tokenizer with secret texts for its control tokens; control text -> secret; the twin's ids -> real ids.

        The secret is drawn at random, so no row can be written to contain it; it never shows in any result.
        """
        document = json.loads(self.backend.to_str())
        document["post_processor"] = None  # it names special tokens, and adds nothing here
        secret = secrets.token_hex(8)
        secret_of: dict[str, str] = {}
        real: dict[str, int] = {}
        for token in document["added_tokens"]:
            number, content = token["id"], token["content"]
            if content in self.controls:
                token["content"] = secret_of[content] = f"\ufdd0{secret}.{number}\ufdd1"
                token["normalized"] = False
            real[token["content"]] = number
        try:
            with no_panic(self.folder):
                twin = Tokenizer.from_str(json.dumps(document))
        except Exception as error:  # tokenizers raises no narrower one
            what = f"holds a tokenizer that cannot be built a second time: {str(error)[:300]}"
            raise FileError(self.folder, what, "check that its files are complete, and from one source") from error
        # A token that was in the model's own vocabulary under its old text gets a new id at the end.
        found = {content: twin.token_to_id(content) for content in real}
        return twin, secret_of, {at: real[content] for content, at in found.items() if at is not None}


def _any_of(words: Iterable[str]) -> str:
    """A regular expression for any of the words, as a tree of their letters: a hundred alternatives side by side would
    be tried one after another, wherever the first letters stand."""
    tree: _Tree = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _expression(tree)


def _expression(node: _Tree) -> str:
    branches = [re.escape(letter) + _expression(below) for letter, below in sorted(node.items()) if letter]
    if not branches:
        return ""
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")  # greedy: the longest wins


def _eos_ids(folder: Path) -> list[int]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        found += [number for number in Keys(read_object(path), str(path)).ids("eos_token_id") if number < MOST_TOKENS]
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds files that a tokenizer is made of."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a model folder. Nothing is downloaded and no code of the model's is run.

    Raises:
        ModelError: there is no tokenizer, it cannot be read, or it is not of the fast kind.
        FileError: a file of it is damaged, leads out of the folder, or would take memory or time without bound.
    """
    check_folder(folder)
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json)", "put the model's tokenizer files there")
    kept = find_tokenizer(folder)
    if kept is not None:
        backend, about = kept
        return ChatTokenizer(backend, folder, about.special, about.eos_ids, about.chat_template, about.fingerprint)
    whole = folder / "tokenizer.json"
    if whole.is_file():
        try:
            check_tokenizer(whole)
        except FileError as error:
            message = f"the tokenizer in {folder} cannot be loaded: {whole.name} {error.reason}"
            raise ModelError(message, error.remedy) from error
    with no_panic(whole):
        made = _load(folder)
    backend = made.backend
    added = (token.content for token in backend.get_added_tokens_decoder().values())
    check_made(folder, backend.get_vocab(with_added_tokens=True).values(), added)
    probe(backend, whole)
    about = About(made.special, made.eos_ids, made.chat_template, made.fingerprint)
    keep_tokenizer(folder, backend, about)
    return made


def _load(folder: Path) -> ChatTokenizer:
    """From its files, where they say it all; else by transformers, which knows what each model's files mean."""
    plain = read_plain(folder)
    if plain is None:
        return _load_by_transformers(folder)
    backend, special = plain.backend, plain.special
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return ChatTokenizer(
        backend, folder, special, [*_eos_ids(folder), *([] if eos is None else [eos])], plain.chat_template
    )


def _load_by_transformers(folder: Path) -> ChatTokenizer:
    for name in _READ_BY_TRANSFORMERS:  # which reads them with less care than we do
        if (folder / name).is_file():
            read_object(folder / name, TOKENIZER_BYTES)
    from transformers import AutoTokenizer  # here: it takes seconds

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the one place where transformers' and tokenizers' many kinds of error are mapped
        message = f"the tokenizer in {folder} cannot be loaded: {error}"
        raise ModelError(message, "check that its files are complete; a model's own code is not run") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"the tokenizer in {folder} has no tokenizer.json", "convert it to a fast tokenizer")
    special = {
        name: value
        for name, value in loaded.special_tokens_map.items()
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))
    }
    eos_ids = _eos_ids(folder)
    if isinstance(loaded.eos_token_id, int):
        eos_ids.append(loaded.eos_token_id)
    template = loaded.chat_template
    if isinstance(template, dict):  # several named ones; "default" is the one for plain chats
        template = template.get("default")
    return ChatTokenizer(backend, folder, special, eos_ids, template if isinstance(template, str) else None)
