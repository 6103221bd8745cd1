"""Best-fit packing: every document once and whole, no pack over its capacity, as few packs as best fit makes."""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from luthier.data.packing import Shape, best_fit

TIERS = pytest.mark.parametrize("cases", [100, pytest.param(1500, marks=pytest.mark.slow)])


@st.composite
def documents(draw: st.DrawFn) -> tuple[NDArray[np.int32], int]:
    """Lengths and a capacity; often many of few different lengths, where whole groups are placed at once."""
    capacity = draw(st.integers(1, 120))
    some = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=8))
    length = st.one_of(st.sampled_from(some), st.integers(1, capacity))
    return np.array(draw(st.lists(length, max_size=70)), dtype=np.int32), capacity


def fills(lengths: NDArray[np.integer], shape: Shape) -> list[int]:
    """Tokens of every pack."""
    descending = np.sort(lengths)[::-1]
    return [int(descending[shape.places[a:b]].sum()) for a, b in zip(shape.starts, shape.starts[1:], strict=False)]


def plain_best_fit(lengths: NDArray[np.integer], capacity: int) -> list[int]:
    """The definition, in O(n²): the longest first, into the open pack with the least room that is enough."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        enough = [(room, pack) for pack, room in enumerate(rooms) if room >= length]
        if enough:
            rooms[min(enough)[1]] -= length
        else:
            rooms.append(capacity - length)
    return [capacity - room for room in rooms]


def plain_first_fit(lengths: NDArray[np.integer], capacity: int) -> int:
    """How many packs first-fit decreasing needs: the longest first, into the first open pack that has room."""
    rooms = np.full(len(lengths), capacity, dtype=np.int64)
    used = 0
    for length in np.sort(lengths)[::-1]:
        pack = int(np.argmax(rooms >= length))
        rooms[pack] -= length
        used = max(used, pack + 1)
    return used


@TIERS
def test_every_document_is_in_one_pack_and_no_pack_is_over(cases: int) -> None:
    @settings(max_examples=cases, deadline=None)
    @given(documents())
    def check(case: tuple[NDArray[np.int32], int]) -> None:
        lengths, capacity = case
        shape = best_fit(lengths, capacity)
        assert sorted(shape.places.tolist()) == list(range(len(lengths)))
        assert (np.diff(shape.starts) >= 1).all()
        assert len(shape) == len(shape.starts) - 1 <= len(lengths)
        found = fills(lengths, shape)
        assert sum(found) == int(lengths.sum())
        assert all(tokens <= capacity for tokens in found)

    check()


@TIERS
def test_it_is_best_fit_by_its_definition(cases: int) -> None:
    @settings(max_examples=cases, deadline=None)
    @given(documents())
    def check(case: tuple[NDArray[np.int32], int]) -> None:
        lengths, capacity = case
        found = sorted(fills(lengths, best_fit(lengths, capacity)))
        assert found == sorted(plain_best_fit(lengths, capacity))
        # No document is in a new pack that an open one had room for: no two packs would go into one.
        assert len(found) < 2 or found[0] + found[1] > capacity

    check()


@TIERS
def test_the_shape_depends_on_the_lengths_alone(cases: int) -> None:
    @settings(max_examples=cases, deadline=None)
    @given(documents(), st.randoms(use_true_random=False))
    def check(case: tuple[NDArray[np.int32], int], random) -> None:
        lengths, capacity = case
        shuffled = lengths.tolist()
        random.shuffle(shuffled)
        one, other = best_fit(lengths, capacity), best_fit(np.array(shuffled, dtype=np.int32), capacity)
        assert one.places.tolist() == other.places.tolist()
        assert one.starts.tolist() == other.starts.tolist()

    check()


@pytest.mark.parametrize("capacity", [64, 1000, 2048])
@pytest.mark.parametrize("seed", range(4))
def test_never_more_packs_than_first_fit_on_lengths_as_rows_have_them(capacity: int, seed: int) -> None:
    """On lengths as rows have them. Not a theorem: lists can be built on which either of the two needs one more."""
    random = np.random.default_rng(seed)
    for lengths in (
        random.lognormal(np.log(capacity / 9), 0.7, 1500).clip(1, capacity).astype(np.int32),
        random.integers(1, capacity + 1, 1000).astype(np.int32),
        (capacity * random.beta(2, 5, 1000)).clip(1, capacity).astype(np.int32),
    ):
        packs = len(best_fit(lengths, capacity))
        assert -(-int(lengths.sum()) // capacity) <= packs <= plain_first_fit(lengths, capacity)


def test_many_documents_are_placed_as_few_are() -> None:
    """200,000 of log-normal lengths, against the definition with a search tree in the place of its scan."""
    lengths = np.random.default_rng(0).lognormal(5.2, 0.8, 200_000).clip(4, 2048).astype(np.int32)
    rooms: list[int] = []
    packs = 0
    for length in np.sort(lengths)[::-1].tolist():
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else 2048
        packs += room == 2048
        insort(rooms, room - length)
    found = fills(lengths, best_fit(lengths, 2048))
    assert sorted(2048 - tokens for tokens in found) == rooms
    assert len(found) == packs


@pytest.mark.parametrize("lengths", [[3, 11], [0, 4], [-1]])
def test_what_is_no_whole_document_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="packs of 10"):
        best_fit(np.array(lengths, dtype=np.int32), 10)


def test_nothing_makes_no_pack() -> None:
    assert len(best_fit(np.array([], dtype=np.int32), 10)) == 0


@pytest.mark.shared
def test_gsm8k_at_2048_fills_98_percent(shared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers" / "llama-3" / "tokenizer.json"))
    texts = []
    with (shared / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            turns = (("user", row["question"]), ("assistant", row["answer"]))
            said = (f"<|start_header_id|>{who}<|end_header_id|>\n\n{text.strip()}<|eot_id|>" for who, text in turns)
            texts.append("<|begin_of_text|>" + "".join(said))
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    lengths = np.array([len(one.ids) for one in encoded], dtype=np.int32)
    assert len(lengths) == 7473
    packs = len(best_fit(lengths, 2048))
    assert int(lengths.sum()) / (packs * 2048) >= 0.98
    assert packs <= plain_first_fit(lengths, 2048)
