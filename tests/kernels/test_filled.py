"""The loss with a few unlabelled rows that go along: that of the reference, which leaves them out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.kernels import IGNORED, linear_cross_entropy
from luthier.kernels.loss import cross_entropy, filled_cross_entropy

SIZE, VOCABULARY = 7, 31


def case(labelled: int, unlabelled: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head, labels and weights, the unlabelled rows anywhere among them."""
    generator = torch.Generator().manual_seed(3)
    rows = labelled + unlabelled
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    labels[torch.randperm(rows, generator=generator)[:unlabelled]] = IGNORED
    hidden = torch.randn(rows, SIZE, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, SIZE, dtype=torch.float64, generator=generator)
    return hidden, weight, labels, torch.rand(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("labelled", "unlabelled"), [(1, 0), (1, 63), (1, 64), (23, 1), (64, 0), (5, 300), (0, 9), (0, 90)]
)
@pytest.mark.parametrize("chunk", [None, 4])
def test_sum_and_gradient_are_the_references(labelled: int, unlabelled: int, weighted: bool, chunk: int | None) -> None:
    hidden, weight, labels, weights = case(labelled, unlabelled)
    given = weights if weighted else None
    kept = labels.clone(), weights.clone()
    ours = filled_cross_entropy(cross_entropy, hidden, weight, labels, chunk, given)
    wanted = linear_cross_entropy(hidden, weight, labels, chunk, given)
    torch.testing.assert_close(ours, wanted, atol=0, rtol=1e-13)
    mine, theirs = (torch.autograd.grad(loss, hidden)[0] for loss in (ours, wanted))
    torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=0)
    assert not mine[labels == IGNORED].any()
    assert torch.equal(labels, kept[0])
    assert torch.equal(weights, kept[1])
