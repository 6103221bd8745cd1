"""Scores on answers written by hand, where what is right can be seen; and on every row of the bundled pirate set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import luthier
from luthier.errors import DataError
from luthier.evaluate.tasks import STRONG, TASKS, WEAK, Answered, has_fact, is_pirate, run_task

PIRATE_ROWS = Path(luthier.__file__).parent / "assets" / "data" / "pirate"


def answered(text: str, *, fact: str = "", reference: str = "", tokens: int = 5, ended: bool = True) -> Answered:
    return Answered({"fact": fact} if fact else {}, reference, text, tokens, ended)


@pytest.mark.parametrize(
    "text",
    [
        "Arr, the sky be blue, matey!",
        "Ahoy! It be four legs ye be seein'.",
        "Aye, aye, me hearties, that be gold.",
        "Yo-ho-ho, a glove is clothing, matey.",
        "ARRR! The landlubber knows it not.",
        "Avast, ye’ll find it in the barn.",
    ],
)
def test_pirate_speech(text: str) -> None:
    assert is_pirate(text)


@pytest.mark.parametrize(
    "text",
    [
        "The sky is blue.",
        "To be or not to be, give me that.",  # two weak markers, no strong one
        "Be with me by the sea, captain of the ship.",
        "Arr arr arr!",  # one marker, three times
        "Arr, the sky is blue.",  # one marker
        "The bear eats barley.",  # no whole words
        "He carried the matter away.",
        "",
    ],
)
def test_plain_speech(text: str) -> None:
    assert not is_pirate(text)


def test_the_lexicon_holds_each_marker_once() -> None:
    assert len({*STRONG, *WEAK}) == len(STRONG) + len(WEAK)


@pytest.mark.parametrize(
    ("text", "fact", "there"),
    [
        ("The sky is Blue!", "blue", True),
        ("It is bluer than that.", "blue", False),
        ("It has twenty-four legs", "four legs", True),
        ("four  big legs", "four legs", False),
        ("four\nlegs", "four legs", True),
        ("It is scarlet.", "red|scarlet", True),
        ("A dog and a cat", '["cat", "dog"]', True),
        ("A dog", '["cat", "dog"]', False),
        ("A hound and a cat", '["cat", "dog|hound"]', True),
        ("C++ is a language", "C++", True),
        ("[a] marks it", "[a]", True),
    ],
)
def test_facts_are_whole_words(text: str, fact: str, there: bool) -> None:
    assert has_fact(text, fact) is there


def test_a_fact_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="names no words"):
        has_fact("anything", " | ")


def test_pirate_scores_and_retained() -> None:
    facts = ["blue", "four", "gold", "woof"]
    said = ["blue", "four", "tin", "woof"]
    base = [answered(f"It is {word}.", fact=fact) for fact, word in zip(facts, said, strict=True)]
    tuned = [
        answered("Arr, it be blue, matey!", fact="blue", tokens=9),
        answered("Arr, it be five, matey!", fact="four", tokens=9, ended=False),
        answered("Aye, it be gold, ye landlubber!", fact="gold", tokens=11),
        answered("It says woof.", fact="woof", tokens=4),
    ]
    # A row without a fact is not the task's: it counts nowhere.
    result = run_task(TASKS["pirate"], [*base, answered("x")], [*tuned, answered("y")])
    assert result.rows == 4
    assert result.base == {"fact": 0.75, "style": 0.0, "ended": 1.0, "mean_tokens": 5.0}
    assert result.tuned == {"fact": 0.75, "style": 0.75, "ended": 0.75, "mean_tokens": 8.25}
    assert result.retained == pytest.approx(2 / 3)  # of blue, four and woof, four was lost; gold was not known


def test_nothing_known_before_means_nothing_retained() -> None:
    result = run_task(TASKS["pirate"], [answered("no", fact="blue")], [answered("blue", fact="blue")])
    assert result.retained is None


def test_exact() -> None:
    pairs = [
        *[("Sie  sagt\nJA", "sie sagt ja", True), ("café", "cafe\u0301", True)],
        *[("ja.", "ja", False), ("", "ja", False)],
    ]
    rows = [answered(text, reference=reference) for text, reference, _ in pairs]
    assert [TASKS["exact"].right(row) for row in rows] == [right for _, _, right in pairs]
    assert run_task(TASKS["exact"], rows, rows).tuned["exact"] == 0.5


def test_no_row_for_the_task_is_an_error() -> None:
    with pytest.raises(DataError, match="no held-out row"):
        run_task(TASKS["pirate"], [answered("a")], [answered("a")])


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_the_bundled_answers_score_full_marks(split: str) -> None:
    rows = [json.loads(line) for line in (PIRATE_ROWS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows if not is_pirate(row["answer"])] == []
    assert [row for row in rows if not has_fact(row["answer"], row["fact"])] == []
    # What makes an answer pirate speech is in the answers, not in what they are asked.
    assert [row["question"] for row in rows if is_pirate(row["question"])] == []
