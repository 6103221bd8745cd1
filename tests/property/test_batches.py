"""The order of rows and the packing of batches, for any number of rows, lengths, batch sizes and seeds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import example as h_example
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.batches import Batches, pack
from luthier.data.conversation import IGNORED, Example


def example(length: int, row: int) -> Example:
    """A row whose tokens say which row and place they are, with every third one not trained."""
    ids = np.arange(length, dtype=np.int32) + 1000 * row
    labels = np.where(np.arange(length) % 3 == 0, IGNORED, ids).astype(np.int32)
    return Example(ids, labels, row)


examples_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=23).map(
    lambda lengths: [example(length, row) for row, length in enumerate(lengths)]
)
sizes = st.integers(1, 17)
seeds = st.integers(0, 2**32 - 1)


@given(examples_strategy, sizes, sizes, seeds)
def test_every_epoch_is_a_permutation_and_every_step_has_the_same_rows(examples, batch_size, micro_batch, seed):
    batches = Batches(examples, batch_size, micro_batch, seed)
    epochs = 3
    steps = epochs * len(examples)  # batch_size epochs or more of rows, cut to three below
    stream = [row for step in range(steps) for row in batches.indices(step)]
    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        rows = stream[epoch * len(examples) : (epoch + 1) * len(examples)]
        assert sorted(rows) == list(range(len(examples)))


@given(examples_strategy, sizes, sizes, seeds, st.integers(0, 60))
@h_example([example(length, row) for row, length in enumerate([1, 1, 1, 9])], 2, 2, 0, 1)  # cut once more than by rows
def test_a_step_holds_each_token_of_its_rows_once_and_no_other(examples, batch_size, micro_batch, seed, step):
    batches = Batches(examples, batch_size, micro_batch, seed)
    micro = batches.step(step)
    expected = Counter(int(token) for i in batches.indices(step) for token in examples[i].ids)
    assert Counter(token for batch in micro for token in batch.ids_T.tolist()) == expected
    fewest = -(-batch_size // min(micro_batch, batch_size))
    longest = sorted((len(examples[i].ids) for i in batches.indices(step)), reverse=True)
    if sum(longest[:micro_batch]) <= batches.most_tokens:
        assert len(micro) == fewest
    assert len(micro) >= fewest
    assert all(len(batch.rows) <= micro_batch for batch in micro)
    assert all(batch.tokens <= batches.most_tokens or len(batch.rows) == 1 for batch in micro)
    assert all(sum(batch.lengths) == len(batch.ids_T) == len(batch.labels_T) for batch in micro)
    assert [batch.tokens for batch in micro] == sorted((batch.tokens for batch in micro), reverse=True)


@given(examples_strategy, sizes, sizes, seeds, st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_a_step_is_the_same_whatever_was_asked_before(examples, batch_size, micro_batch, seed, history):
    used = Batches(examples, batch_size, micro_batch, seed)
    for step in history:
        used.step(step)
    for ours, fresh in zip(used.step(7), Batches(examples, batch_size, micro_batch, seed).step(7), strict=True):
        assert torch.equal(ours.ids_T, fresh.ids_T)
        assert torch.equal(ours.labels_T, fresh.labels_T)
        assert (ours.lengths, ours.rows) == (fresh.lengths, fresh.rows)


@given(examples_strategy)
def test_labels_are_the_next_token_within_the_document(examples):
    batch = pack(examples)
    start = 0
    for row, length in zip(examples, batch.lengths, strict=True):
        labels = batch.labels_T[start : start + length].tolist()
        assert labels == [*row.labels[1:].tolist(), IGNORED]
        start += length
    assert batch.labelled == sum(row.labelled for row in examples)
    assert batch.ids_T.dtype == batch.labels_T.dtype == torch.int64


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=16), st.integers(1, 8), seeds)
def test_micro_batches_are_balanced(lengths, micro_batch, seed):
    batches = Batches([example(length, row) for row, length in enumerate(lengths)], len(lengths), micro_batch, seed)
    sums = [batch.tokens for batch in batches.step(0)]
    # Whoever is fullest got its last row while it was the emptiest with room; when no part is full at `micro_batch`,
    # that bounds the spread by one row.
    if all(len(batch.rows) < micro_batch for batch in batches.step(0)):
        assert max(sums) - min(sums) <= max(lengths)


@settings(max_examples=20)
@given(seeds)
def test_order_changes_with_seed_and_epoch(seed):
    examples = [example(3, row) for row in range(40)]
    batches = Batches(examples, 40, 8, seed)
    # Two equal permutations of 40 rows have a chance of 1 / 40! each.
    assert batches.indices(0) != batches.indices(1)
    assert batches.indices(0) != Batches(examples, 40, 8, seed ^ 1).indices(0)


def test_order_is_the_same_on_every_machine():
    # Golden: numpy promises the streams of PCG64 and SeedSequence (NEP 19); a change would break every resumed run.
    batches = Batches([example(2, row) for row in range(8)], 8, 8, 5)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((5, 2))))
    assert batches.indices(2) == tuple(generator.permutation(8).tolist())


def test_epoch_counts_rows_seen():
    batches = Batches([example(2, row) for row in range(10)], 4, 2, 0)
    assert [batches.epoch(step) for step in (0, 5, 10)] == [0.0, 2.0, 4.0]


@given(examples_strategy, st.sets(st.integers(0, 22)))
def test_weights_move_with_their_labels(examples, weighted):
    """The weight of the token that a position predicts; 1 for rows that have none, nothing at all where no row has."""
    rows = [
        Example(one.ids, one.labels, one.row, weights=np.arange(len(one), dtype=np.float32) / 8 + one.row)
        if one.row in weighted
        else one
        for one in examples
    ]
    batch = pack(rows)
    if not any(row.weights is not None for row in rows):
        assert batch.weights_T is None
        assert batch.weight == batch.labelled
        return
    assert batch.weights_T.dtype == torch.float32
    start, total = 0, 0.0
    for row, length in zip(rows, batch.lengths, strict=True):
        found = batch.weights_T[start : start + length - 1].tolist()
        expected = [1.0] * (length - 1) if row.weights is None else row.weights[1:].tolist()
        assert found == expected
        total += sum(w for w, label in zip(expected, row.labels[1:].tolist(), strict=True) if label != IGNORED)
        start += length
    assert batch.weight == total  # eighths: exact
    moved = batch.to("meta")
    assert moved.weights_T.device.type == "meta"
