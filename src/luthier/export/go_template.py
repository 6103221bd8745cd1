"""A chat template in jinja -> the same in Go's template language, which Ollama's Modelfile speaks.

Translating programs is not needed: a chat template is rendered with stand-ins for the contents, and the text between
them is what it writes.

    opening U1 answering A1 reopening U2 answering A2 reopening U3 prompting          without a system message
    before S after U1 answering …                                                     with one

If the template is of this form (the same text each time), seven pieces describe it, and a dozen sample conversations
then check that the pieces render to the same text as the template. If it is not, it is refused: a guessed template is
a model that talks gibberish.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.data.conversation import Turn
from luthier.data.render import Template
from luthier.errors import DataError, ExportError

__all__ = ["Pieces", "derive_pieces", "go_source"]

_REFUSED = "use the model through llama.cpp, vLLM or transformers, which run the jinja template itself"

_WORDS = (
    *("What colour is the sky?", "Blue, of course.", "And then: 'why'?\n\n1. one\n2. two", "naïve 你好 🦙"),
    "x = {1: [2]}",
)


@dataclass(frozen=True)
class Pieces:
    """The text around contents. `before` and `after` are None where the template takes no system message."""

    opening: str
    answering: str
    reopening: str
    prompting: str
    before: str | None
    after: str | None

    def render(self, turns: Sequence[Turn]) -> str:
        """What the Go template writes for `turns` (a system message first, if any, then user and assistant in turn)."""
        text, last = "", ""
        for turn in turns:
            if turn.role == "system":
                text += f"{self.before}{turn.content}{self.after}"
            elif turn.role == "user":
                text += {"": self.opening, "assistant": self.reopening}.get(last, "") + turn.content
            else:
                text += self.answering + turn.content
            last = turn.role
        return text + (self.prompting if last == "user" else "")


def _split(template: Template, turns: Sequence[Turn]) -> list[str]:
    """The texts around the contents of `turns`, rendered up to where an answer begins."""
    rest, parts = template.render(turns, generation_prompt=True), []
    for turn in turns:
        if rest.count(turn.content) != 1:
            raise ExportError(
                f"the chat template writes a {turn.role} message {rest.count(turn.content)} times, so it cannot be put "
                "into Ollama's template language mechanically",
                _REFUSED,
            )
        part, _, rest = rest.partition(turn.content)
        parts.append(part)
    return [*parts, rest]


def _stand_ins(count: int) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", f"STANDIN{i}STANDIN") for i in range(count)]


def derive_pieces(template: Template) -> Pieces:
    """The pieces of a template, checked on sample conversations.

    Raises ExportError where it is not made of fixed pieces, with what differs.
    """
    try:
        opening, *inner, prompting = _split(template, _stand_ins(5))
    except DataError as error:
        raise ExportError(f"the chat template refuses a conversation of several turns: {error}", _REFUSED) from error
    for first, second, what in ((inner[0], inner[2], "an answer"), (inner[1], inner[3], "a user's next message")):
        if first != second:
            reason = f"the chat template opens {what} now by {first!r}, now by {second!r}"
            raise ExportError(reason, _REFUSED)
    before, after = _system(template)
    pieces = Pieces(opening, inner[0], inner[1], prompting, before, after)
    _verify(template, pieces)
    return pieces


def _system(template: Template) -> tuple[str | None, str | None]:
    """The text before and after a system message; (None, None) where the template refuses it or leaves it out."""
    system = Turn("system", "SYSTEMSTANDIN")
    try:
        rendered = template.render([system, *_stand_ins(1)], generation_prompt=True)
        if system.content not in rendered:
            return None, None
        before, after, _ = _split(template, [system, *_stand_ins(1)])
    except DataError:
        return None, None
    return before, after


def _samples(system: bool) -> list[list[Turn]]:
    """Conversations of one to three questions, with and without a system message, of contents of every kind."""
    found: list[list[Turn]] = []
    for shift in range(len(_WORDS)):
        for count in (1, 3, 5):
            words = [_WORDS[(shift + i) % len(_WORDS)] for i in range(count)]
            turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(words)]
            found.append(turns)
            if system:
                found.append([Turn("system", _WORDS[(shift + 2) % len(_WORDS)]), *turns])
    return found


def _verify(template: Template, pieces: Pieces) -> None:
    for turns in _samples(pieces.before is not None):
        wanted, made = template.render(turns, generation_prompt=True), pieces.render(turns)
        if wanted != made:
            at = next(i for i in range(len(wanted) + 1) if wanted[: i + 1] != made[: i + 1])
            raise ExportError(
                f"the chat template cannot be put into Ollama's template language: for a sample conversation it writes "
                f"{wanted[at : at + 60]!r} where fixed pieces would write {made[at : at + 60]!r}",
                _REFUSED,
            )


def _text(literal: str) -> str:
    """An action that writes `literal`; JSON's escapes are Go's. As an action, no white space in it can be trimmed."""
    return f"{{{{ {json.dumps(literal, ensure_ascii=False)} }}}}" if literal else ""


def go_source(pieces: Pieces, bos: str) -> str:
    """The Go template. `bos` is left out at its start: the runtime puts the token there, as the GGUF file says."""

    def start(text: str) -> str:
        return _text(text.removeprefix(bos)) if bos else _text(text)

    branches: list[tuple[str, str]] = []
    if pieces.before is not None and pieces.after is not None:
        branches.append(("system", f"{start(pieces.before)}{{{{ .Content }}}}{_text(pieces.after)}"))
    opening = f'{{{{ if eq $last "" }}}}{start(pieces.opening)}{{{{ else if eq $last "assistant" }}}}'
    branches.append(("user", f"{opening}{_text(pieces.reopening)}{{{{ end }}}}{{{{ .Content }}}}"))
    branches.append(("assistant", f"{_text(pieces.answering)}{{{{ .Content }}}}"))
    body = ""
    for role, written in branches:
        body += f'{{{{ {"else if" if body else "if"} eq .Role "{role}" }}}}{written}'
    prompting = f'{{{{ if eq $last "user" }}}}{_text(pieces.prompting)}{{{{ end }}}}'
    loop = f"{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ $last = .Role }}}}{{{{ end }}}}"
    return f'{{{{ $last := "" }}}}{loop}{prompting}'
