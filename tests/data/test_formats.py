"""Each format's way from a record to a conversation, and what it refuses."""

from __future__ import annotations

from typing import get_args

import pytest

from luthier.data.conversation import Source, Turn
from luthier.data.formats import FORMATS, Record, RowError, recognise
from luthier.recipe.schema import FormatName

HERE = Source("rows.jsonl", 7)


def read(name: str, **fields: object):
    return FORMATS[name](Record(HERE, fields))


def turns(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(role, content, role == "assistant") for role, content in pairs)


def test_the_recipe_knows_the_same_formats():
    assert set(get_args(FormatName)) - {"auto"} == set(FORMATS)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("question-answer", {"question": "q?", "answer": " a\n"}, [("user", "q?"), ("assistant", " a\n")]),
        ("prompt-completion", {"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
        ("title-content", {"title": "t", "content": "c"}, [("user", "t"), ("assistant", "c")]),
        ("alpaca", {"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ("alpaca", {"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ("alpaca", {"instruction": "i", "input": None, "output": "o"}, [("user", "i"), ("assistant", "o")]),
        (
            "alpaca",
            {"instruction": "i", "input": "x", "output": "o", "system": "s"},
            [("system", "s"), ("user", "i\n\nx"), ("assistant", "o")],
        ),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "u"},
                          {"role": "assistant", "content": "a"}]},
            [("system", "s"), ("user", "u"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {"system": "s", "conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"},
                                              {"from": "human", "value": "h2"}, {"from": "gpt", "value": "g2"}]},
            [("system", "s"), ("user", "h"), ("assistant", "g"), ("user", "h2"), ("assistant", "g2")],
        ),
    ],
)  # fmt: skip
def test_every_format_becomes_turns(name, fields, expected):
    found = read(name, **fields)
    assert found.turns == turns(*expected)
    assert found.source == HERE
    assert not found.plain


def test_text_is_one_trained_turn():
    found = read("text", text="once upon a time", number=3, flag=True)
    assert found.turns == (Turn("assistant", "once upon a time", True),)
    assert found.plain
    assert found.fields == {"text": "once upon a time", "number": "3", "flag": "true"}


def test_a_turn_can_be_left_untrained():
    found = read(
        "messages",
        messages=[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "train": False},
                  {"role": "user", "content": "u"}, {"role": "assistant", "content": "b"}],
    )  # fmt: skip
    assert [turn.train for turn in found.turns] == [False, False, False, True]


def test_one_exchange_gives_fields_to_text_templates():
    chat = [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    assert read("sharegpt", conversations=chat, id=9).fields == {"system": "", "id": "9", "user": "h", "assistant": "g"}
    assert "user" not in read("sharegpt", conversations=[*chat, *chat]).fields


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("hello", "'messages' must be a list, not text"),
        ([], "there is no assistant turn"),
        ([USER], "there is no assistant turn"),
        ([ANSWER], "the assistant speaks first"),
        (["u"], "turn 1: must be an object with 'role' and 'content', not text"),
        ([USER, {"role": "bot", "content": "a"}], "turn 2: 'role' is 'bot'; known are assistant, developer, system"),
        ([USER, {"role": "assistant"}], "turn 2: 'content' must be text, not null"),
        ([USER, {"role": "assistant", "content": " "}], "turn 2: the assistant's turn is empty"),
        ([USER, ANSWER, {"role": "system", "content": "s"}], "turn 3: a system turn can only be the first"),
        ([USER, {**ANSWER, "train": "no"}], "turn 2: 'train' must be true or false, not 'no'"),
        ([USER, {**ANSWER, "train": False}], "every assistant turn is marked train: false"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}], "turn 2: tool calls are not read"),
    ],
)
def test_bad_conversations_get_their_reason(rows, reason):
    with pytest.raises(RowError) as caught:
        read("messages", messages=rows)
    assert reason in str(caught.value)


def test_recognition_prefers_the_more_telling_keys():
    assert recognise(["text", "messages", "id"]) == ("messages", "text")
    assert recognise(["instruction", "output", "prompt", "completion"]) == ("alpaca", "prompt-completion")
    assert recognise(["Text"]) == ()
