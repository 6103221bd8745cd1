"""The chunked loss against torch's cross-entropy on full logits: value, gradients, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.kernels import IGNORED, linear_cross_entropy

ROWS, SIZE, VOCABULARY = 23, 7, 31


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, SIZE, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, SIZE, dtype=dtype, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[[0, 4, 5, ROWS - 1]] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 4, 19, 1000, None])
def test_sum_and_gradient_are_those_of_full_logits(chunk: int | None) -> None:
    hidden, weight, labels = case()
    weight.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, labels, chunk)
    full = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(ours, full, atol=0, rtol=1e-13)  # float64, sums of 19 x 31 terms
    for one, other in zip(*(torch.autograd.grad(3.5 * x, (hidden, weight)) for x in (ours, full)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_gradcheck_with_a_frozen_head() -> None:
    hidden, weight, labels = case()
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight, labels, chunk=4), (hidden,))


def test_no_label_is_a_zero_with_zero_gradients() -> None:
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_without_gradients_it_only_evaluates() -> None:
    hidden, weight, labels = case()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, chunk=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels).detach(), atol=0, rtol=1e-13)


class _WidestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor with a vocabulary's columns."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == VOCABULARY:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_never_more_rows_of_logits_than_the_chunk() -> None:
    hidden, weight, labels = case()
    with _WidestLogits() as seen:
        linear_cross_entropy(hidden, weight, labels, chunk=9).backward()
    assert seen.rows == 9  # and not the 19 labelled rows (the head transposed has 7, its size)


def test_rows_without_a_label_are_not_multiplied() -> None:
    hidden, weight, labels = case()
    with torch.no_grad():
        hidden[labels == IGNORED] = float("nan")  # would poison the sum and the gradients if it were touched
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_bf16_takes_its_softmax_in_fp32() -> None:
    hidden, weight, labels = case(torch.bfloat16)
    kept = labels != IGNORED
    logits = (hidden[kept] @ weight.T).float()
    wanted = functional.cross_entropy(logits, labels[kept], reduction="sum")
    ours = linear_cross_entropy(hidden, weight, labels, chunk=6)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, atol=0, rtol=1e-6)  # the same fp32 logits: only the sums' order differs
    ours.backward()
    grad_logits = torch.softmax(logits, 1) - functional.one_hot(labels[kept], VOCABULARY)
    assert hidden.grad is not None
    # one rounding of the errors to bf16 (2^-9 relative) before a sum of 31 products of size about 1
    torch.testing.assert_close(hidden.grad[kept].float(), grad_logits @ weight.float(), atol=31 * 2**-9, rtol=2**-8)


def test_a_loss_scale_beyond_fp16_does_not_overflow_by_itself() -> None:
    hidden, weight, labels = case(torch.float16)
    loss = linear_cross_entropy(hidden, weight * 1e-2, labels)
    (loss * 2.0**17).backward()  # as a gradient scaler does; 2^17 itself is not an fp16 number
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_a_chunk_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(*case(), chunk=0)


def token_weights(dtype: torch.dtype = torch.float32) -> Tensor:
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(5)).to(dtype)
    weights[2] = 0.0
    return weights


@pytest.mark.parametrize("chunk", [1, 4, 19, 1000, None])
def test_weights_multiply_each_cross_entropy_and_its_gradient(chunk: int | None) -> None:
    hidden, weight, labels = case()
    weight.requires_grad_()
    weights = token_weights()
    ours = linear_cross_entropy(hidden, weight, labels, chunk, weights)
    each = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="none")
    full = (each * weights).sum()
    torch.testing.assert_close(ours, full, atol=0, rtol=1e-13)
    for one, other in zip(*(torch.autograd.grad(3.5 * x, (hidden, weight)) for x in (ours, full)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_gradcheck_with_weights() -> None:
    hidden, weight, labels = case()
    weight.requires_grad_()
    weights = token_weights(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk=4, weights_N=weights), (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_of_one_are_no_weights_bit_for_bit(dtype: torch.dtype) -> None:
    found = []
    for weights in (None, torch.ones(ROWS)):
        hidden, weight, labels = case(dtype)
        loss = linear_cross_entropy(hidden, weight, labels, 6, weights)
        (gradient,) = torch.autograd.grad(loss, hidden)
        found.append((loss, gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_weight_of_zero_trains_nothing() -> None:
    hidden, weight, labels = case()
    linear_cross_entropy(hidden, weight, labels, weights_N=token_weights()).backward()
    assert hidden.grad is not None
    assert labels[2] != IGNORED
    assert not hidden.grad[2].any()
    assert hidden.grad[3].any()
