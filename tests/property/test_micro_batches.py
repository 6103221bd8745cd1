"""What must not change loss and gradient: how a step is cut into micro-batches, and what else is in a pack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.batches import Batch, Batches, pack
from luthier.data.conversation import Example
from luthier.kernels import linear_cross_entropy
from luthier.train.making import make_trainee
from luthier.train.step import Trainee, forward_backward
from tests.train.world import make_examples, make_settings, tiny_decoder

TOLERANCE = 1e-6
"""Of the norm of the gradient, and of the loss. fp32 rounds by u = 2^-24 = 6e-8. A cut changes only the order in which
a gradient's at most 150 tokens are summed; random roundings of n partial sums add up to about u·√n = 7e-7 of the terms'
norm, and most of them are the same in both orders."""


@pytest.fixture(scope="module")
def trainee(tiny_llama: Path) -> Trainee:
    made = make_trainee(tiny_decoder(tiny_llama), make_settings(rank=3, alpha=7.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.parameters.items():
            if name.endswith("lora_B.weight"):  # at zero, no gradient would reach A
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made


def loss_and_gradient(trainee: Trainee, micro_batches: list[Batch]) -> tuple[float, torch.Tensor]:
    trainee.optimizer.zero_grad(set_to_none=True)
    loss = forward_backward(trainee.decoder, micro_batches)
    gradients = [parameter.grad for parameter in trainee.parameters.values()]
    return loss, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def labelled_row(row: int, length: int, labelled: int, weighted: bool = False) -> Example:
    random = np.random.default_rng((row, length))
    ids = random.integers(20, 399, size=length).astype(np.int32)
    labels = np.concatenate([np.full(length - labelled, -100), ids[length - labelled :]]).astype(np.int32)
    return Example(ids, labels, row, weights=random.random(length).astype(np.float32) if weighted else None)


@st.composite
def cut_steps(draw: st.DrawFn) -> tuple[list[Example], list[list[Example]]]:
    """Eight rows, and a cut of them into 1, 2, 4 or 8 parts of any sizes, in any order. Some labels have weights."""
    rows = []
    some = draw(st.booleans())
    for row in range(8):
        length = draw(st.integers(2, 40))
        rows.append(labelled_row(row, length, draw(st.integers(1, length - 1)), some and draw(st.booleans())))
    parts = draw(st.sampled_from([1, 2, 4, 8]))
    ends = sorted(draw(st.lists(st.integers(1, 7), min_size=parts - 1, max_size=parts - 1, unique=True)))
    shuffled = draw(st.permutations(rows))
    return rows, [shuffled[start:end] for start, end in zip([0, *ends], [*ends, 8], strict=True)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=cut_steps())
def test_a_cut_changes_neither_loss_nor_gradient(
    trainee: Trainee, step: tuple[list[Example], list[list[Example]]]
) -> None:
    rows, cut = step
    loss, gradient = loss_and_gradient(trainee, [pack(rows)])
    other_loss, other_gradient = loss_and_gradient(trainee, [pack(part) for part in cut])
    assert other_loss == pytest.approx(loss, rel=TOLERANCE)
    assert float((other_gradient - gradient).norm()) <= TOLERANCE * float(gradient.norm())


@pytest.mark.parametrize("micro_batch", [8, 4, 2, 1])
def test_the_micro_batch_setting_changes_neither(trainee: Trainee, micro_batch: int) -> None:
    examples = make_examples(19, seed=3)
    for step in range(3):
        whole = Batches(examples, 8, 8, seed=0).step(step)
        cut = Batches(examples, 8, micro_batch, seed=0).step(step)
        assert len(cut) == 8 // micro_batch
        loss, gradient = loss_and_gradient(trainee, list(whole))
        other_loss, other_gradient = loss_and_gradient(trainee, list(cut))
        assert other_loss == pytest.approx(loss, rel=TOLERANCE)
        assert float((other_gradient - gradient).norm()) <= TOLERANCE * float(gradient.norm())


def test_the_loss_is_the_mean_over_tokens_not_over_micro_batches(trainee: Trainee) -> None:
    rows = [labelled_row(0, 40, 39), labelled_row(1, 12, 1), labelled_row(2, 9, 3)]
    decoder = trainee.decoder
    with torch.no_grad():
        sums = [
            float(linear_cross_entropy(decoder.hidden(b.ids_T, b.lengths), decoder.head_weight, b.labels_T))
            for b in (pack([row]) for row in rows)
        ]
    loss, _ = loss_and_gradient(trainee, [pack([row]) for row in rows])
    assert loss == pytest.approx(sum(sums) / 43, rel=TOLERANCE)
    mean_of_means = (sums[0] / 39 + sums[1] / 1 + sums[2] / 3) / 3
    assert abs(mean_of_means / loss - 1) > 0.01, "rows on which the wrong rule would be seen"


@st.composite
def packs_of_two_worlds(draw: st.DrawFn) -> tuple[Example, list[Example], list[Example]]:
    """A document, and two packs that it is in: beside it they have other documents, of other lengths, or none."""
    length = draw(st.integers(2, 40))
    document = labelled_row(0, length, draw(st.integers(1, length - 1)), draw(st.booleans()))
    packs = []
    for first in (1, 100):
        beside = [unlabelled_row(first + i, draw(st.integers(1, 40))) for i in range(draw(st.integers(0, 3)))]
        beside.insert(draw(st.integers(0, len(beside))), document)
        packs.append(beside)
    return document, packs[0], packs[1]


def unlabelled_row(row: int, length: int) -> Example:
    """A document that is seen and not trained: whatever of it reaches the gradient came by way of another."""
    ids = np.random.default_rng((row, length)).integers(20, 399, size=length).astype(np.int32)
    return Example(ids, np.full(length, -100, dtype=np.int32), row)


@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_document_does_not_see_what_is_beside_it_in_the_pack(trainee: Trainee, cases: int) -> None:
    @settings(max_examples=cases, deadline=None)
    @given(packs_of_two_worlds())
    def check(case: tuple[Example, list[Example], list[Example]]) -> None:
        document, one, other = case
        loss, gradient = loss_and_gradient(trainee, [pack([document])])
        for packed in (one, other):
            found_loss, found_gradient = loss_and_gradient(trainee, [pack(packed)])
            assert found_loss == pytest.approx(loss, rel=TOLERANCE)
            assert float((found_gradient - gradient).norm()) <= TOLERANCE * float(gradient.norm())

    check()


@pytest.mark.parametrize("capacity", [60, 200])
def test_packs_train_what_their_rows_train(trainee: Trainee, capacity: int) -> None:
    """A step of packs, as the loop takes it, against its rows each in a micro-batch of its own."""
    examples = make_examples(30, seed=4)
    batches = Batches(examples, 3, 2, seed=1, capacity=capacity)
    assert batches.units_per_epoch < len(examples)
    for step in range(4):
        micro = batches.step(step)
        assert all(batch.tokens <= 2 * capacity for batch in micro)
        assert sum(len(batch.lengths) for batch in micro) == len(batches.indices(step)) > 3
        loss, gradient = loss_and_gradient(trainee, list(micro))
        alone = [pack([examples[i]]) for i in batches.indices(step)]
        alone_loss, alone_gradient = loss_and_gradient(trainee, alone)
        assert loss == pytest.approx(alone_loss, rel=TOLERANCE)
        assert float((gradient - alone_gradient).norm()) <= TOLERANCE * float(alone_gradient.norm())
