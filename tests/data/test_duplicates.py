"""Exact and near duplicates: the estimate against Jaccard's definition, groups against a search of all pairs."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.duplicates import FORM, NEAR, PERMUTATIONS, find_groups, signatures, spoken

VOCABULARY = [f"w{n:x}" for n in range(500)]


def text(seed: int, changed: int = 0, words: int = 200) -> str:
    """Words drawn from `seed`, the last `changed` of them from elsewhere."""
    drawn = random.Random(seed).choices(VOCABULARY, k=words)
    return " ".join(drawn[: words - changed] + random.Random(-seed - 1).choices(VOCABULARY, k=changed))


def shingles(words: str) -> set[str]:
    """By the definition: 16 bytes from the start of each word."""
    flat = " ".join("".join(c if c.isalnum() else " " for c in words.lower()).split())
    return {flat[i : i + 16] for i in range(len(flat)) if flat[i] != " " and (i == 0 or flat[i - 1] == " ")}


def agreement(one: str, other: str) -> float:
    a, b = signatures([one, other])
    return float((a == b).mean())


@pytest.mark.parametrize("changed", [0, 10, 30, 80, 200])
def test_the_estimate_is_jaccards_similarity(changed):
    one, other = text(1), text(1, changed)
    jaccard = len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))
    # 64 trials: a standard error of sqrt(j (1 - j) / 64), at most 0.0625; four of them.
    assert agreement(one, other) == pytest.approx(jaccard, abs=4 * (jaccard * (1 - jaccard) / PERMUTATIONS) ** 0.5)


def test_case_punctuation_and_spaces_do_not_count_and_letters_of_any_script_do():
    assert agreement("Hello, World: it's  me!", "hello world\n\nIT S ME") == 1.0
    assert agreement("你好世界,今天天气很好", "你好世界,今天天气很坏") > 0.2
    assert agreement("Grüße aus Köln", "Grüße aus Bonn") < 1.0
    assert agreement("one two three", "four five six") < 0.2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab Cé,.\n\0你한\U0001f600"), max_size=40), min_size=1, max_size=12))
def test_a_signature_does_not_depend_on_the_texts_beside_it(texts):
    together = signatures(texts)
    for number, one in enumerate(texts):
        assert (signatures([one])[0] == together[number]).all()


def keys(texts: list[str]) -> np.ndarray:
    return np.array([abs(hash(("salt", one))) for one in texts], dtype=np.uint64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 5, 30, 60, 120])), min_size=1, max_size=30))
def test_groups_are_those_of_a_search_of_all_pairs(drawn):
    texts = [text(seed, changed) for seed, changed in drawn]
    signature = signatures(texts)
    found = find_groups(keys(texts), signature)
    label = list(range(len(texts)))
    changed = True
    while changed:
        changed = False
        for i, j in itertools.combinations(range(len(texts)), 2):
            if (signature[i] == signature[j]).mean() >= NEAR and label[i] != label[j]:
                label[i] = label[j] = min(label[i], label[j])
                changed = True
    assert found.group.tolist() == label
    different = len(set(texts))
    assert (found.exact, found.near) == (len(texts) - different, different - len(set(label)))


def test_texts_without_words_are_near_nothing():
    found = find_groups(np.arange(3, dtype=np.uint64), signatures(["", "!!!", "?"]))
    assert found.group.tolist() == [0, 1, 2]


def test_a_form_is_taken_apart_and_its_equal_rows_are_not():
    texts = [text(1) + f" blank {n % (FORM + 5)}" for n in range(2 * (FORM + 5))]
    found = find_groups(keys(texts), signatures(texts))
    assert found.group.tolist() == [n % (FORM + 5) for n in range(len(texts))]
    assert (found.exact, found.near, found.forms) == (FORM + 5, 0, FORM + 5)


def test_what_is_said_leaves_the_system_out():
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello", True))
    assert spoken(Conversation(turns, Source("f", 1))) == "Hi\nHello"
