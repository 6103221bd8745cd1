"""The formats of rows that people have, one small function each, in one table.

A format reads a row's keys and values into a `Conversation`, and raises `RowError` with what is wrong with the row. To
add one: write its function, add a line to `FORMATS` and a test. Which format a file has is decided in recognise.py.

The shapes are the ones in common use: Stanford Alpaca's instruction/input/output, OpenAI's `messages` with
role/content, ShareGPT's `conversations` with from/value, and plain pairs. These functions run once a row: what they do
for a good row is as little as can be, and the reasons are found afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.turns import OPENAI, SHAREGPT, RowError, TurnLayout, kind_of, read_turns

__all__ = ["FORMATS", "Fields", "Format", "Reader", "Record", "RowError"]

Fields: TypeAlias = Mapping[str, object]
Reader: TypeAlias = Callable[[Fields, Source], Conversation]

_make = tuple.__new__  # of a named tuple: half the time of calling its class


class Record(NamedTuple):
    """One row as it stands in its file: its keys and values, and where it is."""

    source: Source
    fields: Fields


@dataclass(frozen=True, slots=True)
class Format:
    """A format: the keys every row must have, those it may have, what it is, and the function that reads it."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    about: str
    read: Reader

    def __call__(self, record: Record) -> Conversation:
        return self.read(record.fields, record.source)

    @property
    def keys(self) -> str:
        """The keys in words, the optional ones in brackets."""
        return ", ".join([*self.required, *(f"[{key}]" for key in self.optional)])


def _text(fields: Fields, key: str) -> str:
    value = fields.get(key)
    if value.__class__ is str and value and not value.isspace():
        return value
    raise _refused(fields, key)


def _refused(fields: Fields, key: str) -> RowError:
    """Why the value under `key` cannot be used as text."""
    if key not in fields:
        return RowError(f"the key {key!r} is missing", f"add {key!r}, or take the row out")
    value = fields[key]
    if isinstance(value, str):
        nothing = "empty" if not value else "only spaces"
        return RowError(f"{key!r} is {nothing}", "write the text, or take the row out", key)
    return RowError(f"{key!r} must be text, not {kind_of(value)}", _as_text(key, value), key)


def _as_text(key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"write the text for {key!r}, or take the row out"
    return f'write the number in quotes: "{key}": "{value}"'


def _optional_text(fields: Fields, key: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be text, not {kind_of(value)}", _as_text(key, value), key)
    return value


def _text_fields(fields: Fields) -> Mapping[str, str]:
    """The row's top-level values that can be written into a text; numbers and truth values in JSON's spelling."""
    for value in fields.values():
        if value.__class__ is not str:
            return _written(fields)
    return fields  # type: ignore[return-value]  # all are text


def _written(fields: Fields) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, str):
            found[key] = value
        elif isinstance(value, bool):
            found[key] = "true" if value else "false"
        elif isinstance(value, (int, float)):
            found[key] = str(value)
    return found


def _pair(question: str, answer: str) -> Reader:
    def read(fields: Fields, source: Source) -> Conversation:
        asked = _make(Turn, ("user", _text(fields, question), False))
        answered = _make(Turn, ("assistant", _text(fields, answer), True))
        return _make(Conversation, ((asked, answered), source, _text_fields(fields), False))

    return read


def _alpaca(fields: Fields, source: Source) -> Conversation:
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    given, system = _optional_text(fields, "input"), _optional_text(fields, "system")
    if given and not given.isspace():
        instruction = f"{instruction}\n\n{given}"
    turns: tuple[Turn, ...] = (Turn("user", instruction), Turn("assistant", output, True))
    if system and not system.isspace():
        turns = (Turn("system", system), *turns)
    return Conversation(turns, source, {**_text_fields(fields), "input": given, "system": system})


def _plain_text(fields: Fields, source: Source) -> Conversation:
    turn = Turn("assistant", _text(fields, "text"), True)
    return Conversation((turn,), source, _text_fields(fields), True)


def _chat(key: str, layout: TurnLayout) -> Reader:
    def read(fields: Fields, source: Source) -> Conversation:
        system = _optional_text(fields, "system") if "system" in fields else ""
        turns = read_turns(fields.get(key), key, layout, system)
        texts = _written(fields) if len(fields) > 1 else {}
        spoken = turns[1:] if turns[0][0] == "system" else turns
        if len(spoken) == 2:
            # One question and one answer: a text template can name them, as it can the columns of a flat row. A column
            # of the row's own by such a name is what its author meant by it.
            said = {"system": "" if spoken is turns else turns[0].content, "user": spoken[0][1]}
            texts = {**said, "assistant": spoken[1][1], **texts}
        return _make(Conversation, (turns, source, texts, False))

    return read


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("system",), "turns with role and content (OpenAI's)", _chat("messages", OPENAI)),
    "sharegpt": Format(
        ("conversations",),
        ("system",),
        "turns with from and value (ShareGPT's layout)",
        _chat("conversations", SHAREGPT),
    ),
    "alpaca": Format(("instruction", "output"), ("input", "system"), "Stanford Alpaca's layout", _alpaca),
    "prompt-completion": Format(("prompt", "completion"), (), "a prompt and its end", _pair("prompt", "completion")),
    "question-answer": Format(("question", "answer"), (), "a question, its answer", _pair("question", "answer")),
    "title-content": Format(("title", "content"), (), "a title, the text under it", _pair("title", "content")),
    "text": Format(("text",), (), "plain text, all of it learned", _plain_text),
}
"""Name -> format. When a row's keys fit several, the first in this order is taken, and the report says so."""
