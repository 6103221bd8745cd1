"""A chat template in jinja -> the same in Go's template language, which Ollama's Modelfile speaks.

Translating programs is not needed: a chat template is rendered with stand-ins for the contents, and the text between
them is what it writes.

    opening U1 answering A1 reopening U2 answering A2 reopening U3 prompting          without a system message
    before S after U1 answering …                                                     with one

If the template is of this form (the same text each time), seven pieces describe it. What templates are known to do
with contents is looked for besides, role by role (go_forms.py): trimming, leaving out the reasoning of earlier
answers; and Alpaca's other opening of a question with an `### Input:`. Some forty sample conversations then check
that all this writes the same text as the template. What does not is refused: a guessed template is a model that talks
gibberish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from luthier.data.conversation import Role, Turn
from luthier.data.render import Template
from luthier.data.templates import ALPACA_INPUT
from luthier.errors import DataError, ExportError
from luthier.export.go_forms import FORMS, definitions, literal, opening_by_marker

__all__ = ["Pieces", "derive_pieces", "go_source"]

_REFUSED = "use the model through llama.cpp, vLLM or transformers, which run the jinja template itself"

_WORDS = (
    *("What colour is the sky?", "Blue, of course.", "And then: 'why'?\n\n1. one\n2. two", "naïve 你好 🦙"),
    "x = {1: [2]}",
)


@dataclass(frozen=True)
class Pieces:
    """The text around contents. `before` and `after` are None where the template takes no system message.

    `forms` names what is done with a role's contents, "" or absent: nothing. `paired` opens a question that has
    Alpaca's marker in it, where that differs.
    """

    opening: str
    answering: str
    reopening: str
    prompting: str
    before: str | None
    after: str | None
    forms: Mapping[Role, str] = field(default_factory=dict)
    paired: str | None = None

    def render(self, turns: Sequence[Turn]) -> str:
        """What the Go template writes for `turns` (a system message first, if any, then user and assistant in turn)."""
        text, last = "", ""
        for turn in turns:
            content = FORMS[self.forms.get(turn.role, "")].apply(turn.content)
            if turn.role == "system":
                text += f"{self.before}{content}{self.after}"
            elif turn.role == "user":
                first = self.opening if self.paired is None or ALPACA_INPUT not in turn.content else self.paired
                text += {"": first, "assistant": self.reopening}.get(last, "") + content
            else:
                text += self.answering + content
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
    pieces = Pieces(opening, inner[0], inner[1], prompting, before, after, paired=_paired(template, opening))
    roles: tuple[Role, ...] = ("user", "assistant") if before is None else ("system", "user", "assistant")
    for role in roles:
        pieces = _with_form(template, pieces, role)
    _verify(template, pieces, _samples(before is not None))
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


def _paired(template: Template, opening: str) -> str | None:
    """What opens a first question with Alpaca's marker in it; None where that makes no difference."""
    asked = Turn("user", f"STANDIN{ALPACA_INPUT}STANDIN")
    found = _split(template, [asked])[0]
    return None if found == opening else found


def _with_form(template: Template, pieces: Pieces, role: Role) -> Pieces:
    """The pieces with what the template does to the contents of a role: the first form that fits every probe."""
    samples = _probes(role)
    for form in FORMS:
        tried = replace(pieces, forms={**pieces.forms, role: form})
        if all(template.render(turns, generation_prompt=True) == tried.render(turns) for turns in samples):
            return tried
    _verify(template, pieces, samples)
    raise AssertionError("one of the probes differs")


def _probes(role: Role) -> list[list[Turn]]:
    """Conversations in which one role says what templates are known to change."""
    turns = [Turn("user", "One?"), Turn("assistant", "Two."), Turn("user", "Three?")]
    if role == "system":
        turns.insert(0, Turn("system", "Zero."))
    return [
        [Turn(turn.role, said) if turn.role == role else turn for turn in turns]
        for said in ("Plain.", *(text for form in FORMS.values() for text in form.probes))
    ]


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


def _verify(template: Template, pieces: Pieces, samples: Sequence[Sequence[Turn]]) -> None:
    for turns in samples:
        wanted, made = template.render(turns, generation_prompt=True), pieces.render(turns)
        if wanted != made:
            at = next(i for i in range(len(wanted) + 1) if wanted[: i + 1] != made[: i + 1])
            raise ExportError(
                f"the chat template cannot be put into Ollama's template language: for a sample conversation it writes "
                f"{wanted[at : at + 60]!r} where fixed pieces would write {made[at : at + 60]!r}",
                _REFUSED,
            )


def _text(text: str) -> str:
    """An action that writes `text`. As an action, no white space in it can be trimmed."""
    return f"{{{{ {literal(text)} }}}}" if text else ""


def go_source(pieces: Pieces, bos: str) -> str:
    """The Go template. `bos` is left out at its start: the runtime puts the token there, as the GGUF file says."""

    def start(text: str) -> str:
        return text.removeprefix(bos) if bos else text

    def content(role: Role) -> str:
        form = pieces.forms.get(role, "")
        return f'{{{{ template "{form}" .Content }}}}' if form else "{{ .Content }}"

    opening, extra = _text(start(pieces.opening)), ""
    if pieces.paired is not None:
        extra = opening_by_marker("opening", ALPACA_INPUT, start(pieces.paired), start(pieces.opening))
        opening = '{{ template "opening" .Content }}'
    branches: list[tuple[str, str]] = []
    if pieces.before is not None and pieces.after is not None:
        branches.append(("system", f"{_text(start(pieces.before))}{content('system')}{_text(pieces.after)}"))
    opening = f'{{{{ if eq $last "" }}}}{opening}{{{{ else if eq $last "assistant" }}}}'
    branches.append(("user", f"{opening}{_text(pieces.reopening)}{{{{ end }}}}{content('user')}"))
    branches.append(("assistant", f"{_text(pieces.answering)}{content('assistant')}"))
    body = ""
    for role, written in branches:
        body += f'{{{{ {"else if" if body else "if"} eq .Role "{role}" }}}}{written}'
    prompting = f'{{{{ if eq $last "user" }}}}{_text(pieces.prompting)}{{{{ end }}}}'
    loop = f"{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ $last = .Role }}}}{{{{ end }}}}"
    return f'{{{{ $last := "" }}}}{loop}{prompting}{extra}{definitions(pieces.forms.values())}'
