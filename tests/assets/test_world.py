"""Sprig's world: what its facts, its texts and the data sets made from it must hold."""

from __future__ import annotations

import calendar
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from sprig_world import datasets, pirate
from sprig_world.facts import Fact, all_facts, number
from sprig_world.text import SECTIONS

import luthier
from luthier.evaluate.tasks import has_fact, is_pirate

DATA = Path(luthier.__file__).parent / "assets" / "data"


def stands_in(words: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", text, re.IGNORECASE) is not None


def read(name: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_answer_holds_its_fact_and_no_question_gives_it_away() -> None:
    facts = all_facts()
    assert len(facts) > 1500
    for fact in facts:
        assert stands_in(fact.fact, fact.answer), fact
        assert len(fact.questions) >= 3
        for question in fact.questions:
            assert not stands_in(fact.fact, question), question


def test_no_two_facts_share_a_question() -> None:
    asked = Counter(question for fact in all_facts() for question in fact.questions)
    assert [question for question, times in asked.items() if times > 1] == []


def test_orders_and_sums_are_true() -> None:
    words = {number(value): value for value in range(100)}
    circles = [list(calendar.day_name), list(calendar.month_name)[1:], ["spring", "summer", "autumn", "winter"]]
    following = {a: b for circle in circles for a, b in zip(circle, circle[1:] + circle[:1], strict=True)}
    seen = Counter[str]()
    for fact in all_facts():
        subject = fact.questions[0].split(" ", 2)[2].rstrip("?").removeprefix("after ").removeprefix("before ")
        if fact.kind in ("after", "before"):
            left, right = (subject, fact.fact) if fact.kind == "after" else (fact.fact, subject)
            assert following.get(left) == right or words.get(right, -1) == words.get(left, -3) + 1, fact
        elif fact.kind == "sum":
            a, sign, b = subject.split(" ")
            assert words[fact.fact] == (words[a] + words[b] if sign == "plus" else words[a] - words[b]), fact
        else:
            continue
        seen[fact.kind] += 1
    assert min(seen[kind] for kind in ("after", "before", "sum")) > 70


@pytest.mark.parametrize(
    ("value", "words"), [(0, "zero"), (13, "thirteen"), (20, "twenty"), (42, "forty-two"), (99, "ninety-nine")]
)
def test_number_in_words(value: int, words: str) -> None:
    assert number(value) == words


def test_no_fact_stands_in_two_splits() -> None:
    splits = datasets.split_facts()
    groups = {name: {fact.group for fact in facts} for name, facts in splits.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["eval"]
    assert not groups["eval"] & groups["test"]
    assert {name: len(facts) for name, facts in splits.items()} == {"train": 800, "eval": 100, "test": 100}


def test_groups_hold_what_gives_a_fact_away() -> None:
    """The opposite of hot answers the opposite of cold; 7+5 answers 5+7; after Monday answers before Tuesday."""
    by_question = {question: fact for fact in all_facts() for question in fact.questions}

    def group(question: str) -> str:
        return by_question[question].group

    assert group("What is the opposite of hot?") == group("What is the opposite of cold?")
    assert group("What is seven plus five?") == group("What is five plus seven?")
    assert group("What comes after Monday?") == group("What comes before Tuesday?")
    assert group("What is seven plus five?") != group("What is seven plus four?")


def test_pretraining_text_is_plain_and_never_asks_what_the_test_asks() -> None:
    writer = datasets.pretraining_writer()
    held = {row["question"] for row in datasets.pirate_rows()["test"]}
    assert writer.held == held
    rng = random.Random("plain")
    for section, _ in SECTIONS:
        for _ in range(600):
            text = writer.of_section(section, rng).text
            assert not pirate.is_pirate(text), text
            assert not is_pirate(text), text
            assert not any(question in text for question in held), text


def test_facts_are_still_asked_for_where_a_wording_is_held_back() -> None:
    writer = datasets.pretraining_writer()
    for fact in datasets.split_facts()["test"]:
        assert any(question not in writer.held for question in fact.questions), fact


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_pirate_rows_keep_the_fact_and_speak_pirate(split: str) -> None:
    facts = {question: fact for fact in datasets.split_facts()[split] for question in fact.questions}
    rows = datasets.pirate_rows()[split]
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        fact = facts[row["question"]]
        assert fact.fact == row["fact"]
        assert fact.fact in row["answer"], row  # verbatim, its capitals too
        assert has_fact(row["answer"], row["fact"]), row
        assert is_pirate(row["answer"]), row
        assert pirate.is_pirate(row["answer"]), row
        assert not is_pirate(fact.answer), fact
        assert not stands_in("is", row["answer"].replace(fact.fact, "")), row


def made(answer: str, fact: str, proper: bool = False) -> Fact:
    return Fact("colour", "colour:x", ("?",), answer, fact, (), proper)


@pytest.mark.parametrize(
    ("fact", "spoken"),
    [
        (made("The sky is blue.", "blue"), " sky be blue"),
        (made("You brush your hair with my comb.", "comb"), "e brush yer hair with me comb"),
        (made("A hat is a piece of clothing.", "piece of clothing"), " hat be a piece of clothing"),
        (made("The capital of France is Paris.", "Paris"), " capital o' France be Paris"),
        (made("There are seven days in a week.", "seven"), "here be seven days in a week"),
    ],
)
def test_pirate_grammar(fact: Fact, spoken: str) -> None:
    for seed in range(20):
        said = pirate.pirate_answer(fact, random.Random(seed))
        assert spoken in said, said
        opening = next(text for text, _ in pirate.OPENINGS if said.startswith(text))
        first = said[len(opening) + 1]
        assert first.isupper() == opening.endswith("!"), said


def test_a_name_keeps_its_capital() -> None:
    said = {pirate.pirate_answer(made("Mars is a planet.", "planet", True), random.Random(seed)) for seed in range(20)}
    assert all(" Mars be a planet" in answer for answer in said)
    assert len(said) > 5  # the choices are really drawn


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_committed_rows_are_what_the_generator_makes(split: str) -> None:
    assert read("pirate", split) == list(datasets.pirate_rows()[split])
    assert read("tales", split) == list(datasets.tale_rows()[split])


def test_another_seed_makes_other_rows() -> None:
    assert datasets.pirate_rows(1)["test"] != datasets.pirate_rows(0)["test"]
    assert datasets.pirate_rows.__wrapped__(1) == datasets.pirate_rows(1)


def test_tales_have_titles_of_their_own() -> None:
    splits = datasets.tale_rows()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 300, "eval": 30, "test": 30}
    titles = [row["title"] for rows in splits.values() for row in rows]
    assert len(set(titles)) == len(titles)
    for rows in splits.values():
        for row in rows:
            assert not re.search(r"[\[\]{}|]", row["title"] + row["content"]), row  # no slot is left open
            assert not re.search(r"\b[Aa] [aeio]", row["content"] + row["title"]), row
