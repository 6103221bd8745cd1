"""Each format's way from a record to a conversation, and what it refuses."""

from __future__ import annotations

from typing import get_args

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.formats import FORMATS, Record, RowError
from luthier.data.recognise import recognise
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


def test_a_system_text_beside_the_turns_comes_before_them():
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    asked = turns(("system", "s"), ("user", "u"), ("assistant", "a"))
    assert read("messages", messages=chat, system="s").turns == asked
    assert read("messages", messages=[{"role": "system", "content": "s"}, *chat], system="s").turns == asked
    assert read("messages", messages=chat, system=" ").turns == asked[1:]
    assert read("messages", messages=chat, system=None).turns == asked[1:]


def test_a_row_that_is_none_says_why_what_to_do_and_which_key():
    with pytest.raises(RowError) as caught:
        read("alpaca", instruction="i", input=3, output="o")
    assert (caught.value.reason, caught.value.key) == ("'input' must be text, not a number", "input")
    assert "in quotes" in caught.value.remedy


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
    with_system = [{"from": "system", "value": "s"}, *chat]
    assert read("sharegpt", conversations=with_system).fields == {"system": "s", "user": "h", "assistant": "g"}


def test_fields_of_text_are_the_row_itself():
    fields = {"question": "q", "answer": "a"}
    assert FORMATS["question-answer"](Record(HERE, fields)).fields is fields


def test_recognition_prefers_the_more_telling_keys():
    assert recognise(["text", "messages", "id"]) == ("messages", "text")
    assert recognise(["instruction", "output", "prompt", "completion"]) == ("alpaca", "prompt-completion")
    assert recognise(["Text"]) == ()
    assert recognise([]) == ()


# --- parse -> render back -> parse is stable. The inverses stand here: nothing in the house needs them.

SOLID = st.text(min_size=1).filter(str.strip)  # a text that may be a turn's
EXCHANGE = st.lists(st.tuples(SOLID, SOLID, st.booleans(), st.lists(st.text(), max_size=2)), min_size=1, max_size=4)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Any that a list of turns can hold: a system turn or none, exchanges, tools between two answers."""
    found = [Turn("system", draw(SOLID))] if draw(st.booleans()) else []
    for question, answer, train, tools in draw(EXCHANGE):
        found += [Turn("user", question), Turn("assistant", answer, train)]
        if tools:
            found += [*(Turn("tool", text) for text in tools), Turn("assistant", answer, not train)]
    if not any(turn.train for turn in found):
        found[-1] = found[-1]._replace(train=True)
    return Conversation(tuple(found), HERE)


def as_list(conversation: Conversation, role: str, text: str, names: dict[str, str]) -> list[dict[str, object]]:
    written: list[dict[str, object]] = []
    for turn in conversation.turns:
        row: dict[str, object] = {role: names[turn.role], text: turn.content}
        if turn.role == "assistant" and not turn.train:
            row["train"] = False
        written.append(row)
    return written


def as_alpaca(conversation: Conversation) -> dict[str, object]:
    spoken = {turn.role: turn.content for turn in conversation.turns}
    return {"instruction": spoken["user"], "output": spoken["assistant"], "system": spoken.get("system", "")}


OPENAI_NAMES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


both_tiers = pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])


@both_tiers
def test_lists_of_turns_come_back_as_they_were(examples):
    @settings(max_examples=examples, deadline=None)
    @given(conversation=conversations())
    def holds(conversation: Conversation) -> None:
        for name, key, layout in (
            ("messages", "messages", ("role", "content", OPENAI_NAMES)),
            ("sharegpt", "conversations", ("from", "value", SHAREGPT_NAMES)),
        ):
            found = read(name, **through_json({key: as_list(conversation, *layout)}))
            assert found.turns == conversation.turns
            again = read(name, **through_json({key: as_list(found, *layout)}))
            assert again == found

    holds()


@both_tiers
def test_flat_rows_come_back_as_they_were(examples):
    @settings(max_examples=examples, deadline=None)
    @given(question=SOLID, answer=SOLID, given_=st.none() | st.text(), system=st.none() | st.text())
    def holds(question: str, answer: str, given_: str | None, system: str | None) -> None:
        for name, keys in (
            ("question-answer", ("question", "answer")),
            ("prompt-completion", ("prompt", "completion")),
            ("title-content", ("title", "content")),
        ):
            row = through_json(dict(zip(keys, (question, answer), strict=True)))
            found = read(name, **row)
            assert [turn.content for turn in found.turns] == [question, answer]
            assert read(name, **dict(zip(keys, (turn.content for turn in found.turns), strict=True))) == found
        found = read("text", **through_json({"text": answer}))
        assert read("text", text=found.turns[0].content) == found
        row = {"instruction": question, "output": answer, "input": given_, "system": system}
        once = read("alpaca", **through_json(as_alpaca(read("alpaca", **through_json(row)))))
        assert read("alpaca", **through_json(as_alpaca(once))) == once
        assert once.turns == read("alpaca", **row).turns

    holds()


def through_json(row: dict[str, object]) -> dict[str, object]:
    return orjson.loads(orjson.dumps(row))
