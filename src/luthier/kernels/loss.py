"""The reference of the language-model loss: head and cross-entropy as one operation that never holds all logits.

Legend: N rows (tokens), n labelled rows, C rows of one chunk, D hidden size, V vocabulary.

    loss = sum over labelled rows i of  w_i (logsumexp(h_i W') - h_i . W[label_i])
    d loss / d h_i = w_i (softmax(h_i W') - onehot(label_i)) W

with w_i = 1 where no weights are given. Rows without a label never reach the head. The logits of one chunk at a time
exist, in fp32, and its gradient is computed in the forward pass while they do (the idea of Hsu et al. 2024, Liger
Kernel, section 3.2): the backward pass only multiplies by the incoming scalar. Without it a vocabulary of 128 256 costs
0.5 MB of fp32 logits a token, several times over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["IGNORED", "linear_cross_entropy"]

IGNORED = -100
"""The label of a token that is not trained."""

CHUNK_LOGITS = 2**25
"""Logits of one chunk where the caller does not say: 128 MiB in fp32, and large enough for full speed."""


class _Context(FunctionCtx):
    grads: tuple[Tensor | None, Tensor | None]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, chunk: int, weights_n: Tensor | None
    ) -> Tensor:
        wants_hidden, wants_weight = hidden_nD.requires_grad, weight_VD.requires_grad
        wide = torch.promote_types(hidden_nD.dtype, torch.float32)
        grad_nD = torch.empty_like(hidden_nD) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_nD.device)
        for start in range(0, hidden_nD.shape[0], chunk):
            h_CD, label_C1 = hidden_nD[start : start + chunk], labels_n[start : start + chunk].unsqueeze(1)
            logits_CV = (h_CD @ weight_VD.T).to(wide)
            norm_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
            weights_C1 = None if weights_n is None else weights_n[start : start + chunk].to(wide).unsqueeze(1)
            loss_C1 = norm_C1 - logits_CV.gather(1, label_C1)
            total += (loss_C1 if weights_C1 is None else loss_C1 * weights_C1).sum()
            if grad_nD is None and grad_VD is None:
                continue
            error_CV = logits_CV.sub_(norm_C1).exp_()
            error_CV.scatter_add_(1, label_C1, torch.full_like(norm_C1, -1.0))
            if weights_C1 is not None:
                error_CV *= weights_C1
            if grad_nD is not None:
                grad_nD[start : start + chunk] = error_CV.to(h_CD.dtype) @ weight_VD
            if grad_VD is not None:
                grad_VD += error_CV.T @ h_CD.to(wide)
            del logits_CV, error_CV  # else they are held while the next chunk is made
        ctx.grads = (grad_nD, None if grad_VD is None else grad_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_nD, grad_VD = (None if g is None else g * grad for g in ctx.grads)
        return grad_nD, grad_VD, None, None, None


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
    rows_n = (labels_N != IGNORED).nonzero().squeeze(1)
    size = chunk if chunk is not None else max(1, CHUNK_LOGITS // weight_VD.shape[0])
    if size < 1:
        raise ValueError(f"chunk must be at least 1, not {size}")
    weights_n = None if weights_N is None else weights_N[rows_n]
    apply: Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor] = _LinearCrossEntropy.apply
    return apply(hidden_ND[rows_n], weight_VD, labels_N[rows_n], size, weights_n)
