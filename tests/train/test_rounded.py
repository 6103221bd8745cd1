"""A batch that is rounded up for oneDNN trains what the batch trains: same losses, same gradients, same counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.batches import Batch, pack
from luthier.data.conversation import IGNORED, Example
from luthier.evaluate.loss import held_out_loss
from luthier.recipe.micro_batch import ROWS
from luthier.train.making import make_trainee
from luthier.train.step import forward_backward
from tests.train.world import make_settings, tiny_decoder


def example(length: int, seed: int, weighted: bool = False) -> Example:
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, 300, length).astype(np.int32)
    weights = draw.random(length).astype(np.float32) if weighted else None
    return Example(ids=ids, labels=np.where(draw.random(length) < 0.3, IGNORED, ids), row=seed, weights=weights)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_token_keeps_its_document_and_place(lengths: list[int], part: int, weighted: bool) -> None:
    batch = pack([example(length, seed, weighted) for seed, length in enumerate(lengths)])
    rounded = batch.rounded(part)
    assert all(length % part == 0 for length in rounded.lengths[: len(lengths)])
    assert rounded.tokens % ROWS == 0
    assert rounded.tokens == sum(rounded.lengths) < batch.tokens + len(lengths) * part + ROWS
    old, new = batch.ids_T.split(list(batch.lengths)), rounded.ids_T.split(list(rounded.lengths))
    labels, filled = batch.labels_T.split(list(batch.lengths)), rounded.labels_T.split(list(rounded.lengths))
    for before, after, label, fill in zip(old, new, labels, filled, strict=False):  # the last may be filling alone
        assert torch.equal(after[: len(before)], before)
        assert torch.equal(fill[: len(label)], label)
        assert (fill[len(label) :] == IGNORED).all()
    assert rounded.labelled == batch.labelled
    assert rounded.weight == pytest.approx(batch.weight)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_rows_of_the_head(lengths: list[int], rounded: bool, labels: bool) -> None:
    """All that have a label, each once and in order; rounded, as many others as a multiple needs and there are."""
    batch = pack([example(length, seed) for seed, length in enumerate(lengths)])
    if not labels:
        batch = replace(batch, labels_T=torch.full_like(batch.labels_T, IGNORED))
    placed, rows = batch.placed(torch.device("cpu"), torch.float32, rounded=rounded)
    assert torch.equal(rows, rows.unique())
    wanted = (placed.labels_T != IGNORED).nonzero().squeeze(1)
    assert set(wanted.tolist()) <= set(rows.tolist())
    assert len(rows) == (-(-batch.labelled // ROWS) * ROWS if rounded else batch.labelled)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_the_same(tiny_llama: Path, weighted: bool) -> None:
    """In fp32, where equal means equal: the rounding itself is the same in every dtype."""
    batch = pack([example(length, length, weighted) for length in (37, 5, 64)])

    def gradient(one: Batch) -> tuple[float, list[torch.Tensor]]:
        trainee = make_trainee(tiny_decoder(tiny_llama), make_settings(dropout=0.0))
        with torch.no_grad():
            for leaf in trainee.parameters.values():
                leaf.add_(0.01)  # else B is zero, and A has no gradient
        loss = forward_backward(trainee.decoder, [one])
        return loss, [leaf.grad for leaf in trainee.parameters.values() if leaf.grad is not None]

    loss, before = gradient(batch)
    same, after = gradient(batch.rounded())
    assert same == pytest.approx(loss, rel=1e-6)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)


def test_it_is_done_on_a_cpu_in_16_bits_alone(tiny_llama: Path) -> None:
    batch, cpu = pack([example(37, 0)]), torch.device("cpu")
    assert batch.on(cpu, torch.bfloat16).tokens == 64
    assert batch.on(cpu, torch.float32).tokens == 37
    rows = [example(length, length) for length in (37, 5, 64)]
    decoder = tiny_decoder(tiny_llama, torch.bfloat16)
    alone = [held_out_loss(decoder, [row]) for row in rows]
    mean = sum(one.loss * one.tokens for one in alone) / sum(one.tokens for one in alone)
    assert held_out_loss(decoder, rows).loss == pytest.approx(mean, rel=0.01)
