"""Texts with {fields} as templates: each becomes a chat template, and that is what trains, chats and is exported.

A text template such as `Q: {question}\\nHint: {hint}\\nA: {answer}` has three parts:

    before   `Q: `                                  text before the first field
    prompt   `{question}\\nHint: {hint}`             from the first field to the last one but the answer
    after    `\\nA: `                                text between the prompt and the answer
    answer   `{answer}`                             the last field; trained, and the end-of-turn token after it

The prompt is what a user says in a chat, so the same model can be chatted with afterwards: its jinja source writes
before + content + after for a user's turn and content + end of turn for an assistant's (templates.py).
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.errors import Problem, RecipeError

__all__ = ["TextTemplate", "parse_text_template"]


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A parsed text template. `prompt` alternates (literal, field); the first literal of it is always empty."""

    text: str
    before: str
    prompt: tuple[tuple[str, str], ...]
    after: str
    answer: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it needs, the answer last."""
        return (*(name for _, name in self.prompt), self.answer)

    @property
    def inner_literals(self) -> str:
        """The template's own text inside the prompt part, which a user would have to type in a chat."""
        return "".join(literal for literal, _ in self.prompt)

    def user_content(self, fields: Mapping[str, str]) -> str:
        """The prompt part filled in: what a user says. Missing fields raise KeyError."""
        return "".join(literal + fields[name] for literal, name in self.prompt)


def _refuse(reason: str, remedy: str) -> RecipeError:
    return RecipeError([Problem("template", None, reason, remedy)])


def parse_text_template(text: str) -> TextTemplate:
    """Take a text with {fields} apart; `{{` and `}}` are literal braces. White space after the last field is dropped.

    Raises:
        RecipeError: unbalanced braces, a field without a name or with a format, one named twice, no field at all, or
            text after the last field.
    """
    example = 'write it like "Q: {question}\\nA: {answer}"'
    literals: list[str] = [""]
    fields: list[str] = []
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise _refuse(f"the text template cannot be read: {error}", "write {{ and }} for literal braces") from error
    for literal, name, form, conversion in pieces:
        literals[-1] += literal
        if name is None:
            continue
        if not name or form or conversion:
            shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "") + "}"
            raise _refuse(f"{shown} in the text template is not a field's name", example)
        fields.append(name)
        literals.append("")
    if not fields:
        raise _refuse("the text template has no {field}", example)
    if len(set(fields)) != len(fields):
        twice = next(name for name in fields if fields.count(name) > 1)
        raise _refuse(f"the text template names {{{twice}}} twice", "name each field once")
    if literals[-1].strip():
        reason = f"the text template goes on after its last field {{{fields[-1]}}}: {literals[-1].strip()!r}"
        raise _refuse(reason, "end it with the answer's field; the end-of-turn token is added")
    before, *between = literals[:-1]
    if len(fields) == 1:
        return TextTemplate(text, before, (), "", fields[0])
    prompt = tuple(zip(["", *between[:-1]], fields[:-1], strict=True))
    return TextTemplate(text, before, prompt, between[-1], fields[-1])
