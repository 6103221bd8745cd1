"""The split by content: stable, with near duplicates together, and what it does with few rows and explicit files."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.duplicates import FORM, find_groups, signatures, spoken
from luthier.data.split import SIDES, Placed, content_key, split_rows, value_key
from luthier.recipe.schema import SplitRecipe

GIVEN = {"all": -1, "train": 0, "eval": 1, "test": 2}
TENTH = SplitRecipe(train=0.8, eval=0.1, test=0.1)


def conversation(number: int, line: int = 1) -> Conversation:
    turns = (Turn("user", f"question {number}"), Turn("assistant", f"answer {number}", True))
    return Conversation(turns, Source("rows.jsonl", line), {"id": str(line)})


def placed(rows: list[Conversation], given: list[str] | None = None) -> Placed:
    key = np.frombuffer(b"".join(map(content_key, rows)), dtype=">u8").astype(np.uint64)
    groups = find_groups(key, signatures([spoken(row) for row in rows]))
    return Placed(key, groups.group, np.array([GIVEN[name] for name in given or ["all"] * len(rows)], dtype=np.int8))


def sides(rows: list[Conversation], split: SplitRecipe = TENTH, given: list[str] | None = None) -> list[str]:
    return [SIDES[side] for side in split_rows(placed(rows, given), split)[0]]


def numbered(numbers) -> list[Conversation]:
    """Rows of few words: all near in wording, so that every number stands for a text of its own (a form)."""
    return [conversation(number, line) for line, number in enumerate(numbers, 1)]


def test_position_is_the_same_for_ever():
    # Golden: sha256('[["user","question 1"],["assistant","answer 1"]]')[:8]; if it moves, people's held-out rows move.
    position = int.from_bytes(content_key(conversation(1)), "big") / 2**64
    assert position == pytest.approx(0.6178928065584126, abs=1e-12)
    assert content_key(conversation(1, line=9)) == content_key(conversation(1))


def test_fractions_are_met_within_chance():
    found = sides(numbered(range(4000)))
    # A count of n·p rows has a standard deviation of sqrt(n·p·(1-p)) = 19 rows; five of them are allowed.
    assert abs(found.count("eval") - 400) < 95
    assert abs(found.count("test") - 400) < 95


def test_adding_removing_and_shuffling_rows_moves_none():
    before = dict(zip(range(300), sides(numbered(range(300))), strict=True))
    numbers = [*range(0, 300, 2), *range(300, 900)]
    random.Random(1).shuffle(numbers)
    after = dict(zip(numbers, sides(numbered(numbers)), strict=True))
    assert all(after[number] == before[number] for number in range(0, 300, 2))


WORDS = [f"word{n}" for n in range(60)]


@st.composite
def texts(draw) -> str:
    """A text of its own, or one that differs from it in a word: near it."""
    own = random.Random(draw(st.integers(0, 40)))
    words = [own.choice(WORDS) for _ in range(40)]
    if draw(st.booleans()):
        words[draw(st.integers(0, 39))] = draw(st.sampled_from(WORDS))
    return " ".join(words)


def said(text: str) -> Conversation:
    return Conversation((Turn("user", text), Turn("assistant", "yes", True)), Source("rows.jsonl", 1))


def by_hand(notes: list[str]) -> bool:
    """Whether the rows were so few, or so near, that a side would have been empty by the rule."""
    return any(word in note for note in notes for word in ("not empty", "too few", "all rows say nearly the same"))


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_what_is_held_out_stays_held_out_whatever_rows_are_added(examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.lists(texts(), min_size=1, max_size=25), st.lists(texts(), max_size=25), st.randoms())
    def holds(old, new, order):
        split = SplitRecipe(train=0.5, eval=0.3, test=0.2)
        rows = [said(text) for text in old]
        before, notes = split_rows(placed(rows), split)
        if by_hand(notes):
            return
        every = [(row, int(side)) for row, side in zip(rows, before, strict=True)] + [(said(text), -1) for text in new]
        order.shuffle(every)
        found = placed([row for row, _ in every])
        after, notes = split_rows(found, split)
        if by_hand(notes):
            return
        for (_, was), now in zip(every, after, strict=True):
            assert was < 1 or now >= 1, "a held-out row is now trained on"
        together = {(int(group), int(side)) for group, side in zip(found.group, after, strict=True)}
        assert len(together) == len(set(found.group.tolist())), "rows that say nearly the same are on two sides"

    holds()


HALVES = SplitRecipe(train=0.5, eval=0.5)
TALE = " ".join(f"{n} and then" for n in range(300))


def variants(count: int) -> list[Conversation]:
    return [said(f"{TALE} end {n}") for n in range(count)]


def test_near_duplicates_are_on_one_side():
    others = numbered(range(100))
    found, notes = split_rows(placed([*variants(FORM), *others]), HALVES)
    assert len(set(found[:FORM].tolist())) == 1
    assert any("held out because a row that says nearly the same is" in note for note in notes)


def test_a_form_is_cut_by_content():
    found = sides([*variants(10 * FORM), *numbered(range(100))], HALVES)
    # n·p rows of 200 by chance: a standard deviation of 7.
    assert 65 < found[: 10 * FORM].count("eval") < 135


def test_where_all_rows_are_near_they_are_cut_all_the_same():
    found, notes = split_rows(placed(variants(12)), HALVES)
    assert set(found.tolist()) == {0, 1}
    assert "all rows say nearly the same: they are cut as if they had nothing in common" in notes


def test_equal_rows_are_on_one_side():
    found = sides(numbered([n % 50 for n in range(250)]), SplitRecipe(train=0.5, eval=0.5))
    assert all(len({found[i] for i in range(n, 250, 50)}) == 1 for n in range(50))


def test_a_key_keeps_its_rows_together():
    users = [f"user {n % 30}" for n in range(600)]
    key = np.frombuffer(b"".join(map(value_key, users)), dtype=">u8").astype(np.uint64)
    _, group = np.unique(key, return_inverse=True)
    found, _ = split_rows(Placed(key, group, np.full(600, -1, dtype=np.int8)), SplitRecipe(train=0.5, eval=0.5))
    assert all(len(set(found[n::30].tolist())) == 1 for n in range(30))
    assert set(found.tolist()) == {0, 1}


def test_a_file_with_its_own_split_keeps_it_and_is_the_only_one():
    rows = [*numbered(range(500)), *numbered(range(500, 520)), *numbered([0])]
    found = sides(rows, TENTH, ["all"] * 500 + ["eval"] * 20 + ["train"])
    assert set(found[:500]) == {"train", "test"}  # eval has a file of its own, test has none
    assert found[500:] == ["eval"] * 20 + ["train"]


def test_with_few_rows_one_is_held_out_all_the_same():
    for count in range(2, 12):
        rows = placed(numbered(range(count)))
        found, notes = split_rows(rows, SplitRecipe(train=0.9, eval=0.1))
        assert (found == 1).any()
        assert (found == 0).any()
        expected = "went to eval so that it is not empty; with so few rows the fractions cannot be met"
        by_hash = ((rows.key / 2.0**64) < 0.1).any()
        assert by_hash or any(expected in note for note in notes)


@pytest.mark.parametrize("number", range(20))
def test_one_text_alone_cannot_be_on_two_sides_and_is_trained_on(number):
    found, notes = split_rows(placed(numbered([number] * 3)), SplitRecipe(train=0.5, eval=0.5))
    assert set(found.tolist()) == {0}
    assert len(notes) == 1
