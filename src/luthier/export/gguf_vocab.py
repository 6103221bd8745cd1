"""A Hugging Face tokenizer as GGUF's vocabulary, such that llama.cpp gives the same ids.

llama.cpp has its own tokenizers. Two of them serve the Llama-shaped families:

    gpt2    byte-level BPE: tokens, merges, and `pre`, the name of a splitting rule built into llama.cpp
    llama   SentencePiece-style BPE with byte fallback: tokens and scores; the highest score merges first

A splitting rule that llama.cpp does not know, or a tokenizer that its algorithms do not reproduce, is refused: a file
with nearly the right ids would be a model that talks nonsense now and then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType
from transformers import AutoTokenizer

from luthier.errors import ExportError

__all__ = ["PRE_TOKENIZERS", "Vocabulary", "read_vocabulary"]

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_WORD = r"[^\r\n\p{L}\p{N}]?"

PRE_TOKENIZERS: Mapping[tuple[str, bool], str] = {
    # (split pattern, whether whole words skip the merges) -> llama.cpp's name for both
    (f"{_CUT}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (f"{_CUT}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}", False): "smaug-bpe",
    (f"{_CUT}|{_WORDS}|\\p{{N}}|{_REST}", False): "qwen2",
    (
        f"{_NOT_WORD}{_UPPER}*{_LOWER}+|{_NOT_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        True,
    ): "tekken",
    ("gpt2", False): "gpt-2",
    ("digits, gpt2", False): "smollm",
}
"""The splitting rules that llama.cpp has too."""

NEARLY = {"tekken": "llama.cpp splits words with combining marks (Hindi, Thai, …) otherwise: other ids there"}
"""What llama.cpp does differently under a name, and what to say of it; all others are the same letter for letter."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""

NO_SCORE = -1e6
"""For tokens that no merge makes: they lose against every other."""

_SPM_ONLY = "llama.cpp's tokenizer would give other ids for some texts"
_REMEDY = "export with --to hf instead; transformers and vLLM use the tokenizer as it is"


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF's `tokenizer.ggml.*` keys hold. `model` is gpt2 or llama; `merges` serve one, `scores` the other."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_prefix: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """What the vocabulary takes in a file, at most: a length before each text, a type and a score beside it."""
        texts = sum(len(text.encode()) + 8 for text in (*self.tokens, *self.merges))
        return texts + 8 * len(self.tokens)


class _Json:
    """A JSON object read with types; what is missing or of another type counts as absent."""

    def __init__(self, value: object) -> None:
        self.value: dict[str, object] = value if isinstance(value, dict) else {}

    def text(self, key: str) -> str:
        found = self.value.get(key)
        return found if isinstance(found, str) else ""

    def flag(self, key: str, default: bool = False) -> bool:
        found = self.value.get(key)
        return found if isinstance(found, bool) else default

    def inside(self, key: str) -> _Json:
        return _Json(self.value.get(key))

    def listed(self, key: str) -> list[object]:
        found = self.value.get(key)
        return found if isinstance(found, list) else []


def _document(folder: Path) -> _Json:
    """The tokenizer as it runs here, in the layout of tokenizer.json (which a class of transformers may complete)."""
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return _Json(json.loads(loaded.backend_tokenizer.to_str()))
    except Exception as error:  # transformers and tokenizers raise many kinds here
        raise ExportError(f"the tokenizer in {folder} cannot be read: {error}", "Merge the model again.") from error


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of the model in `folder`, filled up to the `rows` of its embedding.

    Raises ExportError for a tokenizer that llama.cpp does not reproduce.
    """
    document = _document(folder)
    model = document.inside("model")
    if model.text("type") != "BPE":
        raise ExportError(
            f"the tokenizer is of the kind {model.text('type') or 'unknown'}; GGUF export knows BPE, byte-level and "
            f"SentencePiece-style ({_SPM_ONLY})",
            _REMEDY,
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.text(key):
            raise ExportError(f"the tokenizer sets `{key}`: {_SPM_ONLY}", _REMEDY)
    tokens, types = _tokens(document, rows)
    if model.flag("byte_fallback"):
        return _sentencepiece(document, tokens, types)
    return _byte_level(document, tokens, types)


def _tokens(document: _Json, rows: int) -> tuple[list[str], list[int]]:
    vocab = {text: int(str(number)) for text, number in document.inside("model").inside("vocab").value.items()}
    added = [_Json(entry) for entry in document.listed("added_tokens")]
    by_id = {number: (text, TokenType.NORMAL) for text, number in vocab.items()}
    for entry in added:
        if beside := [key for key in ("lstrip", "rstrip", "single_word") if entry.flag(key)]:
            raise ExportError(f"the added token {entry.text('content')!r} sets `{beside[0]}`: {_SPM_ONLY}", _REMEDY)
        kind = TokenType.CONTROL if entry.flag("special") else TokenType.USER_DEFINED
        by_id[int(str(entry.value["id"]))] = (entry.text("content"), kind)
    if by_id and max(by_id) >= rows:
        raise ExportError(
            f"the tokenizer has ids up to {max(by_id)}, the model's embedding {rows} rows",
            "Take the tokenizer and the weights from one source.",
        )
    filled = [by_id.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(rows)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def _merges(model: _Json) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for entry in model.listed("merges"):
        left, right = entry if isinstance(entry, list) else str(entry).split(" ", 1)
        pairs.append((str(left), str(right)))
    return pairs


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def _split_rule(pre: _Json) -> str | None:
    """The split pattern before byte-level mapping, or a name where tokenizers has the rule built in; None: unknown."""
    steps = [_Json(step) for step in pre.listed("pretokenizers")] if pre.text("type") == "Sequence" else [pre]
    if not steps or steps[-1].text("type") != "ByteLevel" or steps[-1].flag("add_prefix_space", True):
        return None
    own = steps[-1].flag("use_regex", True)
    kinds = [step.text("type") for step in steps[:-1]]
    if own:
        digits = kinds == ["Digits"] and steps[0].flag("individual_digits")
        return "gpt2" if not kinds else "digits, gpt2" if digits else None
    if kinds == ["Split"] and steps[0].text("behavior") == "Isolated" and not steps[0].flag("invert"):
        return steps[0].inside("pattern").text("Regex") or None
    return None


def _byte_level(document: _Json, tokens: list[str], types: list[int]) -> Vocabulary:
    model, rule = document.inside("model"), _split_rule(document.inside("pre_tokenizer"))
    name = PRE_TOKENIZERS.get((rule, model.flag("ignore_merges"))) if rule is not None else None
    if name is None:
        shown = json.dumps(document.value.get("pre_tokenizer"), ensure_ascii=False)
        raise ExportError(
            f"the tokenizer's pre-tokenizer is not one that llama.cpp is known to have: {shown}"
            f" (ignore_merges {model.flag('ignore_merges')}); known: {', '.join(PRE_TOKENIZERS.values())}",
            _REMEDY,
        )
    notes = [NEARLY[name]] if name in NEARLY else []
    normalizer = document.inside("normalizer").text("type")
    if normalizer == "NFC":
        notes.append("the tokenizer normalises text to NFC, llama.cpp does not: other forms get other ids there")
    elif normalizer:
        raise ExportError(f"the tokenizer normalises text by {normalizer}: {_SPM_ONLY}", _REMEDY)
    merges = tuple(f"{left} {right}" for left, right in _merges(model))
    return Vocabulary("gpt2", name, tuple(tokens), tuple(types), merges=merges, notes=tuple(notes))


# --- SentencePiece-style BPE ------------------------------------------------------------------------------------------


def _space_rule(document: _Json) -> tuple[bool, tuple[str, ...]] | None:
    """(whether a space is put before a text, what to say about it); None where the rule is not SentencePiece's."""
    normalizer, pre = document.inside("normalizer"), document.inside("pre_tokenizer")
    sequence = normalizer.text("type") == "Sequence"
    steps = [_Json(step) for step in normalizer.listed("normalizers")] if sequence else [normalizer]
    kinds = [step.text("type") for step in steps if step.value]
    replaces = bool(kinds) and kinds[-1] == "Replace" and steps[-1].text("content") == SPACE
    if not pre.value and replaces and kinds in (["Replace"], ["Prepend", "Replace"]):
        return len(kinds) == 2, ()
    metaspace = pre.text("type") == "Metaspace" and pre.text("replacement") == SPACE
    if not kinds and metaspace and not pre.flag("split", True):
        scheme = pre.text("prepend_scheme")
        note = "the tokenizer puts a space before a text only at its very beginning, so never in a chat"
        return scheme == "always", (note,) if scheme == "first" else ()
    return None


def _check_spm(merges: Sequence[tuple[str, str]], normal: set[str]) -> None:
    """The merge list must be the one that scores give: grouped by result, every possible split of a result in it."""
    done: set[str] = set()
    last = ""
    for left, right in merges:
        result = left + right
        if result != last and result in done:
            raise ExportError(f"the merges are not in the order of scores ({result!r}): {_SPM_ONLY}", _REMEDY)
        done.add(result)
        last = result
    listed = set(merges)
    for piece in done & normal:
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if pair[0] in normal and pair[1] in normal and pair not in listed:
                raise ExportError(f"the tokenizer has no merge {pair[0]!r} + {pair[1]!r}: {_SPM_ONLY}", _REMEDY)


def _sentencepiece(document: _Json, tokens: list[str], types: list[int]) -> Vocabulary:
    model, rule = document.inside("model"), _space_rule(document)
    if rule is None:
        steps = {key: document.value.get(key) for key in ("normalizer", "pre_tokenizer")}
        shown = json.dumps(steps, ensure_ascii=False)
        raise ExportError(f"the tokenizer falls back to bytes but is not SentencePiece's: {shown}", _REMEDY)
    merges = _merges(model)
    _check_spm(merges, {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL})
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    unknown = model.text("unk_token")
    for number, text in enumerate(tokens):
        if text == unknown:
            types[number] = int(TokenType.UNKNOWN)
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = int(TokenType.BYTE)
        elif types[number] == TokenType.USER_DEFINED:
            tokens[number] = text.replace(SPACE, " ")
    single = {text for text, kind in zip(tokens, types, strict=True) if len(text) == 1 and kind == TokenType.NORMAL}
    scores = tuple(float(-rank[text]) if text in rank else 0.0 if text in single else NO_SCORE for text in tokens)
    return Vocabulary("llama", "default", tuple(tokens), tuple(types), (), scores, *rule)
