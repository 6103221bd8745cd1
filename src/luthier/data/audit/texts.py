"""What can be wrong with the text of one row: a table of checks, each a small function of the row.

A check gives the piece of text that it found, or None; counting and places are not its business. To add one: write its
function, a line in `TEXT_CHECKS`, and a test with a row that has the fault and a row that only looks like it.

None of these rows is refused: what they hold is odd, not unusable. Contents never become control tokens (tokenizer.py),
so leftover template tokens are text that the model would learn to write, and no way out of a turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ftfy
from ftfy.badness import badness

from luthier.data.audit.findings import excerpt
from luthier.data.conversation import Conversation
from luthier.data.problems import Severity

__all__ = ["TEXT_CHECKS", "RowText", "TextCheck", "row_text", "template_tokens"]


class RowText(NamedTuple):
    """The texts of a row as checks read them.

    `text` is all turns, `asked` the last turn before the last trained answer ("" for plain text), `answers` the
    contents that are trained, `tokens` matches template tokens (see `template_tokens`), `plain` says that the row is a
    text without turns.
    """

    text: str
    asked: str
    answers: tuple[str, ...]
    tokens: re.Pattern[str]
    plain: bool


def row_text(conversation: Conversation, tokens: re.Pattern[str]) -> RowText:
    """The texts of a conversation."""
    turns = conversation.turns
    answers = tuple([turn.content for turn in turns if turn.train])
    last = max((i for i, turn in enumerate(turns) if turn.train), default=0)
    text = turns[0].content if len(turns) == 1 else "\n".join([turn.content for turn in turns])
    return RowText(text, turns[last - 1].content if last else "", answers, tokens, conversation.plain)


@dataclass(frozen=True, slots=True)
class TextCheck:
    """A check of one row's text. `reason` follows "12 rows "; `find` gives an excerpt of what is wrong, or None."""

    name: str
    severity: Severity
    reason: str
    remedy: str
    find: Callable[[RowText], str | None]


def _continuations() -> str:
    """What the later bytes of a UTF-8 character (0x80 to 0xBF) look like in the encodings it is mistaken for."""
    mistaken_for = ("latin-1", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1257", "mac-roman", "cp437")
    found = {character for name in mistaken_for for character in bytes(range(0x80, 0xC0)).decode(name, "ignore")}
    return "".join(sorted(found))


# ftfy looks closely, at 5 million letters a second. Garbled text always has such a pair, sound text seldom.
_PAIR = re.compile(f"[^\\x00-\\x7f][{re.escape(_continuations())}]|Ã |[Œœ][^A-Za-z]")
_LINE = re.compile(r"[^\n]*[^\x00-\x7f][^\n]*")
_LONGEST_LINE = 400


def _garbled(row: RowText) -> str | None:
    if row.text.isascii() or _PAIR.search(row.text) is None or not badness(row.text):
        return None
    for found in _LINE.finditer(row.text):
        for at in range(found.start(), found.end(), _LONGEST_LINE):
            piece = row.text[at : min(at + _LONGEST_LINE, found.end())]
            marks = badness(piece.replace("\ufffd", "?"))  # which has a check of its own
            if marks and ((mended := ftfy.fix_encoding(piece)) != piece or marks > 1):
                return _beside(piece, mended)
    return None


def _beside(piece: str, mended: str) -> str:
    """Around the first place where the two differ, and how it may have been meant."""
    pairs = zip(piece, mended, strict=False)
    start = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
    words = mended[start:].split()
    meant = f" (meant: {excerpt(mended[max(0, mended.rfind(' ', 0, start) + 1) :].split()[0])}?)" if words else ""
    return excerpt(piece, start, start + 2) + (meant if piece != mended else "")


def _names(text: str, words: Sequence[str]) -> bool:
    """Whether one of the words is in the text: to ask first is many times faster than a pattern that begins anyhow."""
    return any(word in text for word in words)


# Tab and line breaks are text. DEL and C1 never are: in Windows-1252 read as Latin-1 they were quotes and dashes.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Joiners belong into Persian, Hindi and emoji, not between Latin letters; direction marks into Arabic and Hebrew, but
# what overrides the direction can make a text read otherwise than it is (CVE-2021-42574).
_INVISIBLE = re.compile(
    "[\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069]|(?<=[A-Za-z])[\u200c\u200d\u200e\u200f](?=[A-Za-z])"
)
_REPLACED = re.compile("\ufffd")
_MARKUP = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,5});"
    r"|</?(?:br|p|div|span|ul|ol|li|table|tr|td|font|strong|em|h[1-6])(?:\s[^<>]{0,200})?/?>",
    re.IGNORECASE,
)
_SELF = re.compile(
    r"\bas an? (?:AI|artificial intelligence)(?: \w+)?(?: model|,| assistant)"
    r"|\b(?:I'm|I’m|I am) (?:just |only )?an? (?:AI|(?:large )?language model)\b"
    r"|\bmy (?:knowledge cutoff|training data)\b",
    re.IGNORECASE,
)
_SELF_NAMES = ("AI", "anguage model", "ntelligence", "nowledge cutoff", "raining data")
_REFUSAL = re.compile(
    r"\W*(?:(?:I'm |I’m |I am )?sorry,? but (?:as an|I (?:cannot|can'?t|can’t|am unable|am not able))"
    r"|I (?:cannot|can'?t|can’t) (?:assist|help|fulfill|comply|provide|answer)\b)",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"[\s\-–—.…?_*]*(?:n/?a|null|nan|undefined|todo|tbd|tba|placeholder|lorem ipsum\b.*|\[?(?:insert|your) .{0,40}\]"
    r"|#ref!|#name\?|#value!)?[\s\-–—.…?_*]*",
    re.IGNORECASE | re.DOTALL,
)
_SECRET_NAMES = ("AKIA", "gh", "sk-", "xox", "hf_", "PRIVATE KEY")
_SECRET = re.compile(
    r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|hf_[A-Za-z]{30,})"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
)


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return None if found is None else excerpt(text, *found.span())


def _replaced(row: RowText) -> str | None:
    return _first(_REPLACED, row.text)


def _control(row: RowText) -> str | None:
    return _first(_CONTROL, row.text)


def _invisible(row: RowText) -> str | None:
    return None if row.text.isascii() else _first(_INVISIBLE, row.text)


def _markup(row: RowText) -> str | None:
    return _first(_MARKUP, row.text)


def _template_tokens(row: RowText) -> str | None:
    if found := _first(row.tokens, row.text):
        return found
    return _first(_SPEAKERS, row.text) if _names(row.text, _SPEAKERS_NAME) else None


def _boilerplate(row: RowText) -> str | None:
    for answer in row.answers:
        found = _REFUSAL.match(answer)
        if found is None and _names(answer, _SELF_NAMES):
            found = _SELF.search(answer)
        if found:
            return excerpt(answer, *found.span())
    return None


def _hollow(row: RowText) -> str | None:
    for answer in row.answers:
        if len(answer) < 200 and _PLACEHOLDER.fullmatch(answer):
            return f"the answer is {excerpt(answer, 0, len(answer))!r}"
    return None


def _echo(row: RowText) -> str | None:
    asked = row.asked.strip()
    return excerpt(asked) if not row.plain and asked and asked == row.answers[-1].strip() else None


def _secret(row: RowText) -> str | None:
    found = _SECRET.search(row.text) if _names(row.text, _SECRET_NAMES) else None
    return None if found is None else f"{found[0][:8]}… (the rest is not shown)"


_COMMON = r"<\|[A-Za-z0-9_]{2,40}\|>"
_FOREIGN = (
    _COMMON,  # Llama 3, ChatML, Phi, Command R and others
    r"\[INST\]|\[/INST\]|<<SYS>>|<</SYS>>|<s>|</s>|\[AVAILABLE_TOOLS\]|\[TOOL_RESULTS\]",  # Llama 2, Mistral
    r"<start_of_turn>|<end_of_turn>|<bos>|<eos>|<pad>|<unk>",  # Gemma
    r"<｜[^<>｜]{2,40}｜>",  # DeepSeek
)
_SPEAKERS_NAME = ("###", "Human:", "USER:", "ASSISTANT:")
_SPEAKERS = re.compile(r"(?:\A|\n)(?:### ?(?:Human|Assistant|Instruction|Response):|(?:Human|USER|ASSISTANT):\s)")
"""How Alpaca and Vicuna name who speaks, at the beginning of a line."""


def template_tokens(controls: Collection[str]) -> re.Pattern[str]:
    """Matches what chat templates write around turns: those of the common ones, and the tokenizer's own `controls`."""
    own = [re.escape(token) for token in sorted(controls, key=len, reverse=True) if not re.fullmatch(_COMMON, token)]
    return re.compile("|".join([*_FOREIGN, *own]))


TEXT_CHECKS: tuple[TextCheck, ...] = (
    TextCheck(
        "secrets",
        "warning",
        "hold what looks like a key or a password: a tuned model can say it to anyone",
        "take it out of the data, and revoke the key if it is a real one",
        _secret,
    ),
    TextCheck(
        "mojibake",
        "warning",
        "hold garbled letters (text saved in one encoding and read in another), which the model would learn to write",
        "read the original file as UTF-8 and write it again; the ftfy library mends most of it",
        _garbled,
    ),
    TextCheck(
        "replacement-characters",
        "warning",
        "hold U+FFFD, the mark for a letter that was lost in a conversion",
        "convert the original again with its true encoding; what was lost cannot be brought back from here",
        _replaced,
    ),
    TextCheck(
        "control-characters",
        "warning",
        "hold control characters, which no one sees and the model would learn to write",
        "take them out; they are often what is left of a PDF, a terminal or a wrong encoding",
        _control,
    ),
    TextCheck(
        "template-tokens",
        "warning",
        "hold what chat templates write around turns; Luthier takes it for plain text, never for the special token, so "
        "it cannot end a turn, but the model would learn to write it",
        "take it out if another tool left it there: the recipe's template writes the real ones",
        _template_tokens,
    ),
    TextCheck(
        "hollow-answers",
        "warning",
        "have an answer without any content (a dash, N/A, TODO)",
        "write the answer, or remove the row",
        _hollow,
    ),
    TextCheck(
        "echoes",
        "warning",
        "have an answer that is the question again, word for word",
        "check that `fields` does not name one column twice; remove the row otherwise",
        _echo,
    ),
    TextCheck(
        "boilerplate",
        "warning",
        "have an answer in which an assistant refuses or speaks of itself as an AI; a few are enough to teach it",
        "remove them unless this is what you want to teach",
        _boilerplate,
    ),
    TextCheck(
        "invisible-characters",
        "note",
        "hold characters of no width or that turn the direction of text (zero-width space, soft hyphen, U+202E)",
        "take them out: copied from web pages, they cost tokens and hide what is written",
        _invisible,
    ),
    TextCheck(
        "markup",
        "note",
        "hold HTML tags or entities such as &nbsp;",
        "convert them to text (html.unescape), unless HTML is what the model shall write",
        _markup,
    ),
)
"""Every check of a row's text, worst first."""
