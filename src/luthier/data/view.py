"""An example as a person can read it: its tokens as text, each with what training does with it.

    ids + labels + weights -> pieces: the tokens of one stretch of text, all trained or all not

A piece is one token, but for what is one picture to a reader and several tokens to the model: a character that a
byte-level tokenizer cuts, an emoji with its joiners and skin tones. Such is shown once and whole. The texts of all
pieces, one after another, are exactly the decode of the ids. What is shown is not always the text: line breaks, tabs,
spaces at edges and characters that have no shape or that reorder others are written out, see `visible`.

Pure: nothing is read and nothing printed. view_rows.py says which rows are looked at, view_page.py makes a page of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

from luthier.data.conversation import IGNORED, Example
from luthier.data.tokenizer import ChatTokenizer

__all__ = ["Glyphs", "Kind", "Piece", "Start", "pieces_of", "visible"]

Kind: TypeAlias = Literal["trained", "prompt", "special-trained", "special-prompt"]
Start: TypeAlias = Literal["", "document", "turn"]
_Span: TypeAlias = tuple[int, int, str]
"""Tokens start to stop, and their text."""

_LOST = "\ufffd"
"""What bytes that are no character decode to, and those of a character that is not complete yet."""
_JOINER = "\u200d"
_JOINERS = ("\u200c", _JOINER)
"""They shape emoji and words between characters; alone they show nothing."""
_MOST_MORE = 3
"""A character has four bytes at most in UTF-8, so at most three tokens more complete it."""
_EMOJI = "\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff"
_EMOJI_BEGINS = re.compile(f"[{_EMOJI}]")
_EMOJI_ENDS = re.compile(f"[{_EMOJI}]\ufe0f?$")
_EMOJI_GOES_ON = re.compile(f"[{_JOINER}\ufe0f\u20e3\U0001f3fb-\U0001f3ff]")
_HALF_FLAGS = re.compile("[\U0001f1e6-\U0001f1ff]+$")


class Glyphs(NamedTuple):
    """A stretch of what is shown. `mark`: it stands for characters, as ⏎ for a line break, and is not in the text."""

    text: str
    mark: bool = False


class Piece(NamedTuple):
    """Tokens that are shown as one.

    Attributes:
        start: the position of the first in its document.
        ids: one id, or those of a character that several tokens make.
        text: what they add to the decoded text. "" for a token that adds nothing, and for the first part of a
            character that is trained only in part: its last part has the character.
        shown: what a reader sees; never empty.
        trained: whether the loss counts them.
        special: whether it is a control token that the template wrote; what a row says never is one.
        weight: how much each counts in the loss, 0 where it is not trained.
        starts: whether a document or a turn begins here.
    """

    start: int
    ids: tuple[int, ...]
    text: str
    shown: tuple[Glyphs, ...]
    trained: bool
    special: bool
    weight: float
    starts: Start

    @property
    def kind(self) -> Kind:
        """Special or not, trained or not, in one word."""
        if self.special:
            return "special-trained" if self.trained else "special-prompt"
        return "trained" if self.trained else "prompt"


class _Tokens(NamedTuple):
    """A piece in the making."""

    start: int
    ids: tuple[int, ...]
    text: str
    special: bool
    weight: float


def pieces_of(example: Example, tokenizer: ChatTokenizer, ends: Collection[int] = ()) -> tuple[Piece, ...]:
    """The pieces of an example, in order; each of its tokens is in exactly one.

    The first token of a document is never trained, whatever its label says: nothing comes before it. Nor is one of
    weight 0. So the tokens of trained pieces are those that the loss counts.

    Args:
        example: the row, or the part of one, that is trained on.
        tokenizer: the one that made its ids.
        ends: ids after which another turn begins (`Template.stop_ids`).
    """
    made = _tokens(example, tokenizer)
    pieces: list[Piece] = []
    for i, one in enumerate(made):
        before, after = made[i - 1] if i else None, made[i + 1] if i + 1 < len(made) else None
        shown = visible(one.text, _neighbour(one, before)[-1:], _neighbour(one, after)[:1])
        starts: Start = "document" if before is None else "turn" if before.ids[-1] in ends else ""
        trained = one.weight > 0
        pieces.append(Piece(one.start, one.ids, one.text, shown, trained, one.special, one.weight, starts))
    return tuple(pieces)


def _tokens(example: Example, tokenizer: ChatTokenizer) -> list[_Tokens]:
    ids: list[int] = example.ids.tolist()
    given = [1.0] * len(ids) if example.weights is None else example.weights.tolist()
    labels: list[int] = example.labels.tolist()
    weights = [0.0 if label == IGNORED else weight for label, weight in zip(labels, given, strict=True)]
    weights[:1] = [0.0] * len(weights[:1])
    control = tokenizer.control_ids
    made: list[_Tokens] = []
    for start, stop, text in _pictures(_characters(ids, tokenizer)):
        # One stretch, unless a character is trained only in part: then the text is its last part's.
        for (special, weight), group in groupby(range(start, stop), lambda at: (ids[at] in control, weights[at])):
            at = list(group)
            here = text if at[-1] == stop - 1 else ""
            made.append(_Tokens(at[0], tuple(ids[i] for i in at), here, special, weight))
    return made


def _characters(ids: Sequence[int], tokenizer: ChatTokenizer) -> Iterator[_Span]:
    """The fewest tokens at a time that decode to whole characters.

    A text is what tokens add to those before them: some tokenizers write a word's space only where words precede it.
    """
    start, before = 0, 0
    while start < len(ids):
        known = tokenizer.decode(ids[before:start])
        stop = start + 1
        while more := _lacking(ids, before, stop, tokenizer):
            stop += more
        text = tokenizer.decode(ids[before:stop])
        yield start, stop, text[len(known) :] if text.startswith(known) else tokenizer.decode(ids[start:stop])
        before, start = start, stop


def _lacking(ids: Sequence[int], before: int, stop: int, tokenizer: ChatTokenizer) -> int:
    """How many tokens after `stop` go on with the character that is begun there; 0: it is whole, or is none."""
    text = tokenizer.decode(ids[before:stop])
    if not text.endswith(_LOST):
        return 0
    for more in range(1, min(_MOST_MORE, len(ids) - stop) + 1):
        longer = tokenizer.decode(ids[before : stop + more])
        if longer == text or not longer.startswith(text):
            return more
    return 0


def _pictures(characters: Iterable[_Span]) -> Iterator[_Span]:
    """The same, with the parts of an emoji taken together."""
    held: _Span | None = None
    for one in characters:
        if held is None:
            held = one
        elif _one_picture(held[2], one[2]):
            held = (held[0], one[1], held[2] + one[2])
        else:
            yield held
            held = one
    if held is not None:
        yield held


def _one_picture(text: str, more: str) -> bool:
    """Whether an emoji at the end of `text` goes on in `more`: joined to another, coloured, half a flag."""
    if _HALF_FLAGS.match(more):
        halves = _HALF_FLAGS.search(text)
        return halves is not None and len(halves[0]) % 2 == 1
    if text.endswith(_JOINER):
        return bool(_EMOJI_ENDS.search(text[:-1]) and _EMOJI_BEGINS.match(more))
    return bool(_EMOJI_GOES_ON.match(more) and _EMOJI_ENDS.search(text))


def _neighbour(one: _Tokens, other: _Tokens | None) -> str:
    """The text beside a piece; "" where another kind of token is, for there a space matters."""
    if other is None or one.special or other.special or (one.weight > 0) != (other.weight > 0):
        return ""
    return other.text


_WRITTEN = {"\n": "⏎", "\r": "\\r", "\t": "⇥"}
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"})
_PLAIN_SPACES = " \u3000"
"""The spaces that are shown as they are: the common one, and that of Chinese and Japanese."""
_BLANK = "\u034f\u115f\u1160\u2800\u3164\uffa0"
"""Characters that count as letters or symbols, and show nothing."""


def visible(text: str, before: str = "", after: str = "") -> tuple[Glyphs, ...]:
    """What a reader sees of `text`: nothing that matters stays invisible, and nothing in it can act.

    Line breaks are written ⏎ and kept, carriage returns \\r, tabs ⇥; a space ·, where it stands at an edge or beside
    another blank; control characters, those that reorder text, and blanks of other kinds by their number.

    Args:
        text: of one piece.
        before: the character before it, "" at an edge: where a line, a special token or the other kind of text is.
        after: the one after it.
    """
    if not text:
        return (Glyphs("∅", mark=True),)
    found: list[Glyphs] = []
    around = ["", *before, *text, *after, ""]
    first = 1 + len(before)
    for i, character in enumerate(text, first):
        mark = _mark_of(character, around[i - 1], around[i + 1], inside=first < i < first + len(text) - 1)
        if mark:
            found.append(Glyphs(mark, mark=True))
        if not mark or character == "\n":
            found.append(Glyphs(character))
    return tuple(Glyphs("".join(g.text for g in group), mark) for mark, group in groupby(found, lambda g: g.mark))


def _mark_of(character: str, before: str, after: str, *, inside: bool) -> str:
    """What is written for a character, "" where it is shown as it is."""
    if character == " ":
        return "·" if not before.strip(" \n\r\t") or not after.strip(" \n\r\t") else ""
    if character in _WRITTEN:
        return _WRITTEN[character]
    if character in _PLAIN_SPACES or (inside and character in _JOINERS):
        return ""
    if unicodedata.category(character) in _ESCAPED or character in _BLANK:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return ""
