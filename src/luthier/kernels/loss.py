"""The reference of the language-model loss: head and cross-entropy as one operation that never holds all logits.

Legend: N rows (tokens), n labelled rows, C rows of one chunk, D hidden size, V vocabulary.

    loss = sum over labelled rows i of  w_i (logsumexp(h_i W') - h_i . W[label_i])
    d loss / d h_i = w_i (softmax(h_i W') - onehot(label_i)) W

with w_i = 1 where no weights are given. Rows without a label do not reach the head. The logits of one chunk at a time
exist, in fp32, and its gradient is computed in the forward pass while they do (the idea of Hsu et al. 2024, Liger
Kernel, section 3.2): the backward pass only multiplies by the incoming scalar. Without it a vocabulary of 128 256 costs
0.5 MB of fp32 logits a token, several times over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from luthier.kernels.products import linear, product
from luthier.recipe.micro_batch import ROWS

__all__ = ["IGNORED", "CrossEntropy", "cross_entropy", "every_row", "filled_cross_entropy", "linear_cross_entropy"]

IGNORED = -100
"""The label of a token that is not trained."""

CHUNK_LOGITS = 2**25
"""Logits of one chunk where the caller does not say: 128 MiB in fp32, and large enough for full speed."""


CrossEntropy: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]
"""What `cross_entropy` is: logits, labels, weights and whether the gradient is wanted -> losses, gradient."""


def cross_entropy(
    logits_CV: Tensor, labels_C: Tensor, weights_C: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The reference: (C,) each row's cross-entropy times its weight (None: 1), in fp32 or wider, and its gradient (CV).

    Every label is one of the vocabulary. The logits may be overwritten; without `gradient` the second is of no meaning.
    """
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    label_C1 = labels_C.unsqueeze(1)
    norm_C1 = torch.logsumexp(wide_CV, dim=1, keepdim=True)
    loss_C1 = norm_C1 - wide_CV.gather(1, label_C1)
    weights_C1 = None if weights_C is None else weights_C.to(wide_CV.dtype).unsqueeze(1)
    if weights_C1 is not None:
        loss_C1 = loss_C1 * weights_C1
    if gradient:
        wide_CV = wide_CV.sub_(norm_C1).exp_()
        wide_CV.scatter_add_(1, label_C1, torch.full_like(norm_C1, -1.0))
        if weights_C1 is not None:
            wide_CV *= weights_C1
    return loss_C1.squeeze(1), wide_CV


class _Context(FunctionCtx):
    grads: tuple[Tensor | None, Tensor | None]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_nD: Tensor,
        weight_VD: Tensor,
        labels_n: Tensor,
        chunk: int,
        weights_n: Tensor | None,
        of_rows: CrossEntropy,
    ) -> Tensor:
        wants_hidden, wants_weight = hidden_nD.requires_grad, weight_VD.requires_grad
        wide = torch.promote_types(hidden_nD.dtype, torch.float32)
        grad_nD = torch.empty_like(hidden_nD) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_nD.device)
        for start in range(0, hidden_nD.shape[0], chunk):
            rows = slice(start, start + chunk)
            h_CD = hidden_nD[rows]
            weights_C = None if weights_n is None else weights_n[rows]
            loss_C, error_CV = of_rows(linear(h_CD, weight_VD), labels_n[rows], weights_C, wants_hidden or wants_weight)
            total += loss_C.sum()
            if grad_nD is not None:
                grad_nD[rows] = product(error_CV.to(h_CD.dtype), weight_VD)
            if grad_VD is not None:
                grad_VD += error_CV.to(wide).T @ h_CD.to(wide)
            del error_CV  # else it is held while the next chunk is made
        ctx.grads = (grad_nD, None if grad_VD is None else grad_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_nD, grad_VD = (None if g is None else g * grad for g in ctx.grads)
        return grad_nD, grad_VD, None, None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk: int | None = None,
    weights_N: Tensor | None = None,
) -> Tensor:
    """The SUM of the cross-entropies (nats) of the labelled rows, a scalar in fp32; 0 where none is labelled.

    `labels_N` (int64) is what each row must predict, IGNORED for none. `chunk` rows of logits exist at a time, at most.
    `weights_N` is what each row's cross-entropy is multiplied by; None: 1.
    Differentiable once, in `hidden_ND` and, where it asks for it, in `weight_VD`.
    """
    labelled_N = labels_N != IGNORED
    if not bool(labelled_N.all()):
        rows_n = labelled_N.nonzero().squeeze(1)
        hidden_ND, labels_N = hidden_ND[rows_n], labels_N[rows_n]
        weights_N = None if weights_N is None else weights_N[rows_n]
    return every_row(cross_entropy, hidden_ND, weight_VD, labels_N, chunk, weights_N)


def every_row(
    of_rows: CrossEntropy,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk: int | None,
    weights_N: Tensor | None,
) -> Tensor:
    """`linear_cross_entropy` of rows that all have a label, by `of_rows`."""
    size = chunk if chunk is not None else max(1, CHUNK_LOGITS // weight_VD.shape[0])
    if size < 1:
        raise ValueError(f"chunk must be at least 1, not {size}")
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(hidden_ND, weight_VD, labels_N, size, weights_N, of_rows)


def filled_cross_entropy(
    of_rows: CrossEntropy,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk: int | None = None,
    weights_N: Tensor | None = None,
) -> Tensor:
    """`linear_cross_entropy` by `of_rows`, on a CPU: a few rows without a label go along with weight 0.

    They fill the rows up to a number for which oneDNN has built its product before (data/batches.py): fewer than ROWS.
    Where there are more, they are left out.
    """
    labelled_N = labels_N != IGNORED
    spare = labels_N.shape[0] - int(labelled_N.sum())
    if spare >= ROWS:
        rows_n = labelled_N.nonzero().squeeze(1)
        hidden_ND, labels_N = hidden_ND[rows_n], labels_N[rows_n]
        weights_N = None if weights_N is None else weights_N[rows_n]
    elif spare:
        weights_N = labelled_N.float() if weights_N is None else weights_N * labelled_N
        labels_N = labels_N.clamp_min(0)
    return every_row(of_rows, hidden_ND, weight_VD, labels_N, chunk, weights_N)
