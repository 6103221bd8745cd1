"""Loss and gradient do not change when an optimizer step is cut into micro-batches, however unequal they are."""

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
from luthier.train.session import make_trainee
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


def labelled_row(row: int, length: int, labelled: int) -> Example:
    ids = np.random.default_rng((row, length)).integers(20, 399, size=length).astype(np.int32)
    labels = np.concatenate([np.full(length - labelled, -100), ids[length - labelled :]]).astype(np.int32)
    return Example(ids, labels, row)


@st.composite
def cut_steps(draw: st.DrawFn) -> tuple[list[Example], list[list[Example]]]:
    """Eight rows, and a cut of them into 1, 2, 4 or 8 parts of any sizes, in any order."""
    rows = []
    for row in range(8):
        length = draw(st.integers(2, 40))
        rows.append(labelled_row(row, length, draw(st.integers(1, length - 1))))
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
