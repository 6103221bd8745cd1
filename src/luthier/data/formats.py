"""The formats of rows that people have, one small function each, in one table.

A format reads one record into a `Conversation` and raises `RowError` with what is wrong with the row. To add one:
write its function, add a line to `FORMATS` and a test.

The shapes are the ones in common use: Stanford Alpaca's instruction/input/output, OpenAI's `messages` with
role/content, ShareGPT's `conversations` with from/value, and plain pairs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from luthier.data.conversation import ROLES, Conversation, Role, Source, Turn

__all__ = ["FORMATS", "Format", "Record", "RowError", "nearest_format", "recognise"]


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in its file: the JSON object and where it is."""

    source: Source
    fields: Mapping[str, object]


class RowError(Exception):
    """What is wrong with one row; sources.py adds the file and the line."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format: the keys every row must have, those it may have, what it is, and the function that reads it."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    about: str
    read: Callable[[Record], Conversation]

    def __call__(self, record: Record) -> Conversation:
        return self.read(record)

    @property
    def keys(self) -> str:
        """The keys in words, the optional ones in brackets."""
        return ", ".join([*self.required, *(f"[{key}]" for key in self.optional)])


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _text(record: Record, key: str, *, empty: bool = False) -> str:
    if key not in record.fields:
        raise RowError(f"the key {key!r} is missing")
    value = record.fields[key]
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be text, not {_kind(value)}")
    if not empty and not value.strip():
        raise RowError(f"{key!r} is empty")
    return value


def _optional_text(record: Record, key: str) -> str:
    return "" if record.fields.get(key) is None else _text(record, key, empty=True)


def _text_fields(record: Record) -> dict[str, str]:
    """The row's top-level values that can be written into a text; numbers and truth values in JSON's spelling."""
    found: dict[str, str] = {}
    for key, value in record.fields.items():
        if isinstance(value, str):
            found[key] = value
        elif isinstance(value, bool):
            found[key] = "true" if value else "false"
        elif isinstance(value, (int, float)):
            found[key] = str(value)
    return found


def _pair(question: str, answer: str) -> Callable[[Record], Conversation]:
    def read(record: Record) -> Conversation:
        turns = (Turn("user", _text(record, question)), Turn("assistant", _text(record, answer), train=True))
        return Conversation(turns, record.source, _text_fields(record))

    return read


def _alpaca(record: Record) -> Conversation:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    given, system = _optional_text(record, "input"), _optional_text(record, "system")
    turns = [Turn("system", system)] if system.strip() else []
    turns.append(Turn("user", f"{instruction}\n\n{given}" if given.strip() else instruction))
    turns.append(Turn("assistant", output, train=True))
    fields = _text_fields(record) | {"input": given, "system": system}
    return Conversation(tuple(turns), record.source, fields)


def _plain_text(record: Record) -> Conversation:
    turn = Turn("assistant", _text(record, "text"), train=True)
    return Conversation((turn,), record.source, _text_fields(record), plain=True)


OPENAI_ROLES: Mapping[str, Role] = {role: role for role in ROLES} | {"developer": "system"}
SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def _listed_turns(record: Record, key: str, role_key: str, text_key: str, roles: Mapping[str, Role]) -> list[Turn]:
    rows = record.fields.get(key)
    if not isinstance(rows, list):
        raise RowError(f"{key!r} must be a list, not {_kind(rows)}")
    turns: list[Turn] = []
    for number, row in enumerate(rows, 1):
        place = f"{key}, turn {number}"
        if not isinstance(row, dict):
            raise RowError(f"{place}: must be an object with {role_key!r} and {text_key!r}, not {_kind(row)}")
        role, content, train = row.get(role_key), row.get(text_key), row.get("train", True)
        if not isinstance(role, str) or role not in roles:
            raise RowError(f"{place}: {role_key!r} is {role!r}; known are {', '.join(sorted(roles))}")
        if row.get("tool_calls"):
            raise RowError(f"{place}: tool calls are not read; write the call into {text_key!r} as text")
        if not isinstance(content, str):
            raise RowError(f"{place}: {text_key!r} must be text, not {_kind(content)}")
        if not isinstance(train, bool):
            raise RowError(f"{place}: 'train' must be true or false, not {train!r}")
        turns.append(Turn(roles[role], content, train=train and roles[role] == "assistant"))
    return turns


def _check_turns(turns: Sequence[Turn], key: str) -> None:
    """What no template can make sense of: no answer, an empty turn, a system turn in the middle, an answer first."""
    for number, turn in enumerate(turns, 1):
        if not turn.content.strip() and turn.role != "tool":  # a tool may well return nothing
            raise RowError(f"{key}, turn {number}: the {turn.role}'s turn is empty")
        if turn.role == "system" and number > 1:
            raise RowError(f"{key}, turn {number}: a system turn can only be the first")
    spoken = [turn for turn in turns if turn.role != "system"]
    if not any(turn.role == "assistant" for turn in spoken):
        raise RowError(f"{key}: there is no assistant turn, so nothing to learn")
    if spoken[0].role != "user":
        raise RowError(f"{key}: the {spoken[0].role} speaks first; a user's turn must come before")
    if not any(turn.train for turn in spoken):
        raise RowError(f"{key}: every assistant turn is marked train: false, so nothing to learn")


def _chat(record: Record, key: str, turns: list[Turn]) -> Conversation:
    system = _optional_text(record, "system")
    if system.strip() and not any(turn.role == "system" for turn in turns):
        turns = [Turn("system", system), *turns]
    _check_turns(turns, key)
    fields = _text_fields(record)
    if [turn.role for turn in turns if turn.role != "system"] == ["user", "assistant"]:
        # One question and one answer: a text template can name them, as it can the columns of a flat row.
        fields = {"system": "", **fields, **{turn.role: turn.content for turn in turns}}
    return Conversation(tuple(turns), record.source, fields)


def _messages(record: Record) -> Conversation:
    return _chat(record, "messages", _listed_turns(record, "messages", "role", "content", OPENAI_ROLES))


def _sharegpt(record: Record) -> Conversation:
    return _chat(record, "conversations", _listed_turns(record, "conversations", "from", "value", SHAREGPT_ROLES))


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("system",), "turns with role and content (OpenAI's layout)", _messages),
    "sharegpt": Format(("conversations",), ("system",), "turns with from and value (ShareGPT's layout)", _sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system"), "Stanford Alpaca's layout", _alpaca),
    "prompt-completion": Format(("prompt", "completion"), (), "a prompt and its end", _pair("prompt", "completion")),
    "question-answer": Format(("question", "answer"), (), "a question, its answer", _pair("question", "answer")),
    "title-content": Format(("title", "content"), (), "a title, the text under it", _pair("title", "content")),
    "text": Format(("text",), (), "plain text, all of it learned", _plain_text),
}
"""Name -> format. When a row's keys fit several, the first in this order is taken, and the report says so."""


def recognise(keys: Collection[str]) -> tuple[str, ...]:
    """The formats whose required keys are all in `keys`, best first; empty when none fits."""
    return tuple(name for name, form in FORMATS.items() if set(form.required) <= set(keys))


def nearest_format(keys: Collection[str]) -> tuple[str, dict[str, str]] | None:
    """The format that these keys come nearest to, and which key is probably meant by which: `{required: found}`.

    None when nothing is near. Used only in error messages.
    """
    best: tuple[float, str, dict[str, str]] | None = None
    lowered = {key.lower(): key for key in keys}
    for name, form in FORMATS.items():
        guessed: dict[str, str] = {}
        score = 0.0
        for key in form.required:
            close = difflib.get_close_matches(key, list(lowered), n=1, cutoff=0.6)
            if close:
                score += difflib.SequenceMatcher(None, key, close[0]).ratio() / len(form.required)
                if lowered[close[0]] != key:
                    guessed[key] = lowered[close[0]]
        if score > 0 and (best is None or score > best[0]):
            best = (score, name, guessed)
    return None if best is None else (best[1], best[2])
