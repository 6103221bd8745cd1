"""Epochs of weighted and packed rows: each row as often as its weight says, packs within capacity, any step at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from luthier.data.batches import Batches
from luthier.data.conversation import IGNORED, Example
from luthier.data.epochs import Epochs

TIERS = pytest.mark.parametrize("cases", [100, pytest.param(1500, marks=pytest.mark.slow)])
seeds = st.integers(0, 2**32 - 1)


class Rows(Sequence[Example]):
    """Rows as a store has them: lengths and weights are known, an example is made when it is asked for."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float]) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.weights = np.array(weights, dtype=np.float64)
        self.made = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        assert 0 <= index < len(self)
        self.made += 1
        ids = np.arange(self.lengths[index], dtype=np.int32) + 1000 * index
        return Example(ids, np.where(ids % 3 == 0, IGNORED, ids).astype(np.int32), index)


@dataclass
class Case:
    lengths: list[int]
    weights: list[float]
    batch_size: int
    micro_batch: int
    seed: int
    capacity: int | None
    longest_first: bool

    def batches(self) -> Batches:
        return Batches(
            Rows(self.lengths, self.weights),
            self.batch_size,
            self.micro_batch,
            self.seed,
            capacity=self.capacity,
            longest_first=self.longest_first,
        )


@st.composite
def cases_of(draw: st.DrawFn, packed: bool | None = None, weighted: bool = True) -> Case:
    weight = st.sampled_from([1.0, 1.0, 0.5, 2.0, 0.3, 1.75, 0.01]) if weighted else st.just(1.0)
    rows = draw(st.lists(st.tuples(st.integers(1, 40), weight), min_size=1, max_size=30))
    packing = draw(st.booleans()) if packed is None else packed
    return Case(
        [length for length, _ in rows],
        [weight for _, weight in rows],
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(seeds),
        draw(st.integers(40, 130)) if packing else None,
        draw(st.booleans()),
    )


def steps_of_epochs(batches: Batches, epochs: int) -> range:
    """Steps until so many epochs have been seen, and what is needed of the next to fill the last."""
    return range(math.ceil(epochs * batches.units_per_epoch / batches.batch_size))


def units_by_epoch(batches: Batches, epochs: int) -> list[list[NDArray[np.int64]]]:
    stream = [unit for step in steps_of_epochs(batches, epochs) for unit in batches.units(step)]
    size = batches.units_per_epoch
    return [stream[epoch * size : (epoch + 1) * size] for epoch in range(epochs)]


@TIERS
def test_packing_conserves_tokens(cases: int) -> None:
    """Every row exactly once an epoch, in packs within capacity, and of it every token with its label."""

    @settings(max_examples=cases, deadline=None)
    @given(cases_of(packed=True, weighted=False))
    def check(case: Case) -> None:
        batches = case.batches()
        assert batches.rows_per_epoch == len(case.lengths)
        assert batches.units_per_epoch <= len(case.lengths)
        assert batches.steps_per_epoch == batches.units_per_epoch / case.batch_size
        for units in units_by_epoch(batches, 3):
            assert sorted(np.concatenate(units).tolist()) == list(range(len(case.lengths)))
            assert all(sum(case.lengths[i] for i in unit) <= case.capacity for unit in units)
        source = Rows(case.lengths, case.weights)
        for step in range(4):
            micro = batches.step(step)
            expected = Counter(int(token) for i in batches.indices(step) for token in source[i].ids)
            assert Counter(token for batch in micro for token in batch.ids_T.tolist()) == expected
            assert sum(batch.labelled for batch in micro) == sum(source[i].labelled for i in batches.indices(step))
            assert all(sum(batch.lengths) == batch.tokens <= case.micro_batch * case.capacity for batch in micro)
            assert [batch.tokens for batch in micro] == sorted((batch.tokens for batch in micro), reverse=True)

    check()


@TIERS
def test_a_step_needs_no_walk(cases: int) -> None:
    """Step k asked for at once is the step that comes when all before it are taken."""

    @settings(max_examples=cases, deadline=None)
    @given(cases_of(), st.integers(0, 40))
    def check(case: Case, k: int) -> None:
        walked = case.batches()
        for step in range(k):
            walked.units(step)
        for one, other in zip(walked.step(k), case.batches().step(k), strict=True):
            assert torch.equal(one.ids_T, other.ids_T)
            assert torch.equal(one.labels_T, other.labels_T)
            assert (one.lengths, one.rows) == (other.lengths, other.rows)

    check()


@TIERS
def test_weights_are_kept_over_epochs(cases: int) -> None:
    """All epochs are equally long; whole copies are in each, and the rest of a weight comes as evenly as it can."""

    @settings(max_examples=cases, deadline=None)
    @given(cases_of(), st.integers(0, 5), st.integers(1, 8))
    def check(case: Case, first: int, epochs: int) -> None:
        batches = case.batches()
        seen: Counter[int] = Counter()
        for units in units_by_epoch(batches, first + epochs)[first:]:
            rows = np.concatenate(units).tolist()
            assert len(rows) == batches.rows_per_epoch
            assert case.capacity is None or all(sum(case.lengths[i] for i in unit) <= case.capacity for unit in units)
            seen.update(rows)
        for row, weight in enumerate(case.weights):
            alike = case.weights.count(weight)
            share = weight - math.floor(weight)
            extra = max(1, math.floor(share * alike + 0.5)) if share else 0
            whole, part = epochs * math.floor(weight), epochs * extra / alike
            assert whole + math.floor(part) <= seen[row] <= whole + math.ceil(part)

    check()


@pytest.mark.parametrize("capacity", [None, 64])
def test_half_a_weight_is_every_second_epoch(capacity: int | None) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 40).tolist()
    batches = Batches(Rows(lengths, [0.5] * 20 + [1.0] * 20), 4, 4, seed=3, capacity=capacity)
    assert batches.rows_per_epoch == 30
    epochs = [set(np.concatenate(units).tolist()) for units in units_by_epoch(batches, 4)]
    assert epochs[0] | epochs[1] == epochs[2] | epochs[3] == set(range(40))
    assert epochs[0] & epochs[1] == set(range(20, 40))
    assert epochs[0] == epochs[2] != epochs[1]


@TIERS
def test_longest_first_orders_the_steps_of_the_first_epoch_and_nothing_else(cases: int) -> None:
    @settings(max_examples=cases, deadline=None)
    @given(cases_of())
    def check(case: Case) -> None:
        case.longest_first = True
        batches = case.batches()
        case.longest_first = False
        plain = case.batches()
        whole = batches.units_per_epoch // case.batch_size
        first = [sum(case.lengths[i] for i in batches.indices(step)) for step in range(whole)]
        assert first == sorted(first, reverse=True)
        assert sorted(map(batches.indices, range(whole))) == sorted(map(plain.indices, range(whole)))
        later = range(whole, whole + 3 + 2 * whole)
        assert [batches.indices(step) for step in later] == [plain.indices(step) for step in later]

    check()


def test_equal_rows_change_packs_and_packs_change_places() -> None:
    rows = Rows([30] * 40 + [20] * 40, [1.0] * 80)
    epochs = Epochs(80, 7, lengths=rows.lengths, capacity=100)
    found = [{frozenset(epochs.units_of(epoch)[unit].tolist()) for unit in range(epochs.units)} for epoch in range(2)]
    assert found[0] != found[1]
    different = Epochs(80, 7, lengths=np.arange(20, 100, dtype=np.int32), capacity=100)
    orders = [[tuple(different.units_of(e)[u].tolist()) for u in range(different.units)] for e in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])  # no two rows are equally long: only one way to fill the packs


def test_packs_are_the_same_on_every_machine() -> None:
    # Golden, as test_batches' for rows: a change would make every run that is resumed another one.
    epochs = Epochs(6, 5, lengths=np.array([4, 3, 3, 3, 2, 6], np.int32), capacity=8)
    shown = [[epochs.units_of(epoch)[unit].tolist() for unit in range(epochs.units)] for epoch in (0, 1, 2)]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((5, 2))))
    order = generator.permutation(6).tolist()
    threes = [row for row in order if row in (1, 2, 3)]
    packs = [[5, 4], [0, threes[0]], [threes[1], threes[2]]]
    assert shown[2] == [packs[pack] for pack in generator.permutation(3)]


def test_no_row_is_read_to_learn_its_length() -> None:
    rows = Rows([10, 20, 30, 40] * 50, [1.0, 0.5] * 100)
    batches = Batches(rows, 2, 1, seed=0, capacity=64, longest_first=True)
    chosen = batches.indices(30)
    assert rows.made == 0
    batches.step(30)
    assert rows.made == len(chosen)


def test_the_fill_is_hardly_less_with_rows_that_rotate() -> None:
    lengths = np.random.default_rng(1).lognormal(5.2, 0.6, 5000).clip(4, 2048).astype(np.int32)
    epochs = Epochs(5000, 0, lengths=lengths, weights=np.full(5000, 0.3), capacity=2048)
    assert epochs.rows == 1500
    for epoch in range(4):
        tokens = int(lengths[epochs.entries(epoch)].sum())
        assert tokens / (epochs.units * 2048) > 0.98


def test_rows_that_never_come_are_refused() -> None:
    with pytest.raises(ValueError, match="weight above 0"):
        Epochs(3, 0, weights=np.zeros(3))
    with pytest.raises(ValueError, match="lengths"):
        Epochs(3, 0, capacity=10)
