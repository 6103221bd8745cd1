"""Who says the same as whom: held against a plain comparison of every row with every other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.audit.repeats import NO_PROMPT, Keys, find_repeats, prompt_hash
from luthier.data.conversation import Conversation, Source, Turn

ROWS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2)), max_size=12)


def keys_of(rows: list[tuple[int, int, int, int]]) -> Keys:
    """Rows of (near group, variant, prompt, side); equal in the first three is equal in content."""
    content = [group * 100 + variant * 10 + prompt for group, variant, prompt, _ in rows]
    first = {group: next(i for i, row in enumerate(rows) if row[0] == group) for group, *_ in rows}
    return Keys(
        np.array(content, dtype=np.uint64),
        np.array([first[row[0]] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=np.uint64),
        np.array([row[3] for row in rows], dtype=np.int8),
    )


@given(ROWS)
def test_equals_comparing_every_row_with_every_other(rows: list[tuple[int, int, int, int]]) -> None:
    found = find_repeats(keys_of(rows))
    exact, near, prompts, leaks = [], [], [], []
    for i, (group, variant, prompt, side) in enumerate(rows):
        before = rows[:i]
        if any(row[:3] == (group, variant, prompt) for row in before):
            exact.append(i)
        else:
            if any(row[0] == group for row in before):
                near.append(i)
            if prompt and any(row[2] == prompt for row in before):
                prompts.append(i)
        if side > 0:
            trained = [row for row in rows if row[3] == 0]
            kinds = (
                any(row[:3] == (group, variant, prompt) for row in trained),
                any(row[0] == group for row in trained),
                prompt != NO_PROMPT and any(row[2] == prompt for row in trained),
            )
            leaks.append((i, kinds.index(True) if any(kinds) else None))
    assert [row for row, _ in found.exact.first] == exact
    assert [row for row, _ in found.near.first] == near
    assert [row for row, _ in found.prompts.first] == prompts
    for number, same in enumerate((found.leaked_exact, found.leaked_near, found.leaked_prompts)):
        assert [row for row, _ in same.first] == [i for i, kind in leaks if kind == number]
        assert same.rows == len(same.first)
        assert all(rows[other][3] == 0 for _, other in same.first)
    assert all(rows[row][:3] == rows[other][:3] for row, other in (*found.exact.first, *found.leaked_exact.first))


def conversation(*turns: Turn, plain: bool = False) -> Conversation:
    return Conversation(turns, Source("a.jsonl", 1), plain=plain)


def test_a_prompt_is_all_that_stands_before_the_last_answer() -> None:
    ask, other = Turn("user", "Why?"), Turn("user", "How?")
    one, two = Turn("assistant", "So.", train=True), Turn("assistant", "Not so.", train=True)
    assert prompt_hash(conversation(ask, one)) == prompt_hash(conversation(ask, two))
    assert prompt_hash(conversation(ask, one)) != prompt_hash(conversation(other, one))
    assert prompt_hash(conversation(ask, one, other, two)) == prompt_hash(conversation(ask, one, other, one))
    assert prompt_hash(conversation(ask, one, other, two)) != prompt_hash(conversation(ask, two, other, two))
    assert prompt_hash(conversation(Turn("system", "Be brief."), ask, one)) != prompt_hash(conversation(ask, one))
    assert prompt_hash(conversation(one, plain=True)) == NO_PROMPT
