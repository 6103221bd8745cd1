"""Rows that are longer than the limit, under each policy: nothing vanishes without being counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import IGNORED
from luthier.data.dataset import Cuts, Examples, Reading
from luthier.data.length import LIMITS, limit_side
from luthier.data.store import ROW, Part, StoreWriter, open_store

BOS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


def examples(folder, rows: list[tuple[int, int]], weight: float = 0.0) -> Examples:
    """Rows of BOS, then a prompt and an answer of the lengths given; every token but BOS is different."""
    records = np.zeros(len(rows), dtype=ROW)
    records["length"] = [1 + prompt + answer for prompt, answer in rows]
    records["labelled"] = [answer for _, answer in rows]
    ids, trained = [], []
    for prompt, answer in rows:
        ids += [BOS, *range(100 + len(ids), 100 + len(ids) + prompt + answer)]
        trained += [False] * (1 + prompt) + [True] * answer
    writer = StoreWriter(folder / str(len(list(folder.iterdir()))))
    signatures = np.zeros((len(rows), 64), dtype=np.uint16)
    writer.add(Part(records, np.array(ids, dtype=np.int32), np.array(trained), b"", signatures, b""))
    writer.finish()
    store = open_store(writer._folder)
    assert store is not None
    lengths = store.rows["length"].astype(np.int32)
    cuts = Cuts(np.arange(len(rows)), np.zeros_like(lengths), lengths)
    return Examples(store, cuts, np.ones(len(rows)), Reading(weight, BOS))


ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(4, 40), st.sampled_from(["train", "eval"]), st.sampled_from(sorted(LIMITS)))
def test_every_row_is_used_or_counted(folder, rows, most, side, policy):
    whole = examples(folder, rows)
    found = limit_side(whole, most, policy, side)
    long = {row for row, (prompt, answer) in enumerate(rows) if 1 + prompt + answer > most}
    if policy == "error" and long:
        assert {row for row, _ in found.refused} == long
        return
    used = set(found.examples.rows.tolist())
    assert used | {row for row, _ in found.left_out} == set(range(len(rows)))
    assert not used & {row for row, _ in found.left_out}
    assert all(len(one) <= most and one.labelled > 0 for one in found.examples)
    assert [len(one) for one in found.examples] == found.examples.lengths.tolist()
    assert [one.labelled for one in found.examples] == found.examples.labelled.tolist()
    for one in found.examples:
        if one.row not in long:
            assert one.ids.tolist() == whole[one.row].ids.tolist()


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(4, 40))
def test_split_loses_no_trained_token_and_every_part_begins_with_bos(folder, rows, most):
    whole = examples(folder, rows)
    found = limit_side(whole, most, "split", "train")
    trained = [int(label) for one in found.examples for label in one.labels if label != IGNORED]
    assert trained == [int(label) for one in whole for label in one.labels if label != IGNORED]
    assert all(one.ids[0] == BOS and (one.ids[1:] != BOS).all() for one in found.examples)
    parts = sum(one.row in {row for row, n in enumerate(whole.lengths) if n > most} for one in found.examples)
    assert found.pieces == parts


def test_truncate_cuts_at_the_end_and_counts(folder):
    found = limit_side(examples(folder, [(2, 3), (2, 30), (30, 2)]), 10, "truncate", "train")
    assert found.examples.lengths.tolist() == [6, 10]
    assert found.examples.labelled.tolist() == [3, 7]
    assert (found.truncated, found.left_out[0][0]) == (1, 2)
    assert "its prompt alone fills max_length" in found.left_out[0][1]


def test_drop_and_error_say_how_long_the_row_is(folder):
    rows = examples(folder, [(2, 3), (2, 30)])
    assert limit_side(rows, 10, "drop", "train").left_out == ((1, "it has 33 tokens, more than max_length 10"),)
    assert limit_side(rows, 10, "error", "eval").refused == ((1, "it has 33 tokens, more than max_length 10"),)


def test_a_held_out_row_is_truncated_and_not_split(folder):
    found = limit_side(examples(folder, [(2, 30)]), 10, "split", "eval")
    assert (len(found.examples), found.truncated, found.pieces) == (1, 1, 0)


def test_prompt_tokens_count_by_their_weight(folder):
    (one,) = examples(folder, [(3, 2)], weight=0.25)
    assert one.labels.tolist() == one.ids.tolist()
    assert one.weights is not None
    assert one.weights.tolist() == [0.25] * 4 + [1.0] * 2


def test_views_of_views_are_views(folder):
    rows = examples(folder, [(1, 2), (3, 4), (5, 6)])
    assert [one.row for one in rows[1:]] == [1, 2]
    assert rows[-1].row == 2
    assert rows.take(np.array([2, 0])).rows.tolist() == [2, 0]
    with pytest.raises(IndexError):
        rows[3]
