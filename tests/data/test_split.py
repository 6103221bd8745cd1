"""The split by content: stable, and what it does with few rows and with files of their own split."""

from __future__ import annotations

import random

import pytest

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.sources import SourceRows
from luthier.data.split import content_position, split_rows
from luthier.recipe.schema import DataSource, SplitRecipe


def conversation(number: int, line: int = 1) -> Conversation:
    turns = (Turn("user", f"question {number}"), Turn("assistant", f"answer {number}", True))
    return Conversation(turns, Source("rows.jsonl", line), {"id": str(line)})


def rows(numbers, split="all", path="rows.jsonl") -> SourceRows:
    found = tuple(conversation(number, line) for line, number in enumerate(numbers, 1))
    return SourceRows(DataSource(path=path, split=split), "question-answer", "", found)


def sides(*sources: SourceRows, **fractions: float) -> list[str]:
    return split_rows(sources, SplitRecipe(**fractions))[0]


TENTH = {"train": 0.8, "eval": 0.1, "test": 0.1}


def test_position_is_the_same_for_ever():
    # Golden: sha256('[["user","question 1"],["assistant","answer 1"]]')[:8]; if it moves, people's held-out rows move.
    assert content_position(conversation(1)) == pytest.approx(0.6178928065584126, abs=1e-12)
    assert content_position(conversation(1, line=9)) == content_position(conversation(1))


def test_fractions_are_met_within_chance():
    found = sides(rows(range(4000)), **TENTH)
    # A count of n·p rows has a standard deviation of sqrt(n·p·(1-p)) = 19 rows; five of them are allowed.
    assert abs(found.count("eval") - 400) < 95
    assert abs(found.count("test") - 400) < 95


def test_adding_removing_and_shuffling_rows_moves_none():
    before = dict(zip(range(300), sides(rows(range(300)), **TENTH), strict=True))
    numbers = [*range(0, 300, 2), *range(300, 900)]
    random.Random(1).shuffle(numbers)
    after = dict(zip(numbers, sides(rows(numbers), **TENTH), strict=True))
    assert all(after[number] == before[number] for number in range(0, 300, 2))


def test_equal_rows_are_on_one_side():
    found = sides(rows([n % 50 for n in range(200)]), rows(range(50)), train=0.5, eval=0.5)
    assert all(len({found[i] for i in range(n, 250, 50)}) == 1 for n in range(50))


def test_a_file_with_its_own_split_keeps_it_and_is_the_only_one():
    found = sides(rows(range(500)), rows(range(500, 520), "eval"), rows([0], "train"), **TENTH)
    assert set(found[:500]) == {"train", "test"}  # eval has a file of its own, test has none
    assert set(found[500:520]) == {"eval"}
    assert found[520] == "train"


@pytest.mark.parametrize("count", range(2, 12))
def test_with_few_rows_there_is_one_to_evaluate_and_one_to_train(count):
    for start in range(0, 200, 20):
        found, notes = split_rows([rows(range(start, start + count))], SplitRecipe(train=0.95, eval=0.05))
        assert found.count("eval") >= 1
        assert found.count("train") >= 1
        assert "eval" in split_rows([rows(range(start, start + count))], SplitRecipe(train=0.05, eval=0.95))[0]
        positions = [content_position(conversation(n)) for n in range(start, start + count)]
        untouched = ["eval" if position < 0.05 else "train" for position in positions]
        assert bool(notes) == (found != untouched)


def test_one_row_or_equal_rows_cannot_be_cut():
    for numbers in ([3], [3, 3, 3]):
        found, notes = split_rows([rows(numbers)], SplitRecipe())
        assert set(found) == {"train"}
        assert "no row is for eval" in notes[0]


def test_no_held_out_rows_when_none_are_wanted():
    found, notes = split_rows([rows(range(5))], SplitRecipe(train=1.0, eval=0.0))
    assert (set(found), notes) == ({"train"}, [])
