"""Lengths, bars and what limits cut: held against counting token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.audit import lengths
from luthier.data.audit.lengths import PREVIEWED, measure_lengths
from luthier.data.store import ROW, Counts, Store


def store_of(masks: list[list[bool]]) -> Store:
    """A store in memory with these masks, one a row."""
    rows = np.zeros(len(masks), dtype=ROW)
    rows["length"] = [len(mask) for mask in masks]
    rows["labelled"] = [sum(mask[1:]) for mask in masks]
    rows["offset"] = np.cumsum(rows["length"]) - rows["length"]
    trained = np.array([token for mask in masks for token in mask], dtype=np.uint8)
    none = np.zeros(0, dtype=np.int32)
    return Store(Path(), rows, none, trained, trained[:0], none.astype(np.int64), Counts(), "")


MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=40).map(lambda mask: [False, *mask[1:]]), min_size=1)


@pytest.mark.parametrize("block", [1, 7, 2**21])
@given(masks=MASKS, limit=st.integers(1, 45))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_limit_cuts_what_it_says(
    masks: list[list[bool]], limit: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "_BLOCK", block)
    cut = next(cut for cut in measure_lengths(store_of(masks), limit).cuts if cut.max_length == limit)
    long = [mask for mask in masks if len(mask) > limit]
    assert cut.rows == len(long)
    assert cut.labelled_lost == sum(sum(mask[limit:]) for mask in long)
    assert cut.emptied == sum(not any(mask[:limit]) for mask in long)


@given(MASKS)
def test_every_row_is_in_one_bar(masks: list[list[bool]]) -> None:
    found = measure_lengths(store_of(masks), None)
    for bar in found.bars:
        inside = [m for m in masks if bar.start <= len(m) and (bar.stop is None or len(m) < bar.stop)]
        assert len(inside) == bar.rows
    assert sum(bar.rows for bar in found.bars) == len(masks) == found.rows
    assert len(found.bars) <= 13
    assert found.labelled == sum(map(sum, masks))
    assert found.longest == max(map(len, masks))
    assert [cut.max_length for cut in found.cuts] == list(PREVIEWED)


def test_one_long_row_does_not_flatten_the_others() -> None:
    masks = [[False] + [True] * (50 + i % 40) for i in range(300)] + [[False] + [True] * 5000]
    found = measure_lengths(store_of(masks), None)
    assert found.bars[-1].stop is None
    assert found.bars[-1].rows == 1
    assert len([bar for bar in found.bars if bar.rows]) > 5
