"""One optimizer step: gradients of all its micro-batches, checks, clipping, update.

With L the labelled tokens of every micro-batch of the step, c_i the cross-entropy of token i, w_i its weight (1, but
for the tokens of a prompt where the recipe's `prompt_loss_weight` says otherwise) and n = Σ_{i ∈ L} w_i:

    loss = (1/n) Σ_{i ∈ L} w_i c_i      gradient = Σ over micro-batches of  ∇ (1/n) Σ_{i ∈ L ∩ micro-batch} w_i c_i

The sum is divided once, by the weights of the whole step, so the same rows give the same gradient however they are cut
into micro-batches. (A mean of the micro-batches' means would weigh a token by how few others share its micro-batch.)

Gradients are clipped by their global norm g: scaled by min(1, clip / (g + 1e-6)) (Pascanu et al. 2013,
arXiv:1211.5063, algorithm 1). In fp16 the loss is multiplied by a power of two before the backward pass, lest small
gradients vanish, and gradients are divided by it after (Micikevicius et al. 2018, arXiv:1710.03740, sec. 3.2). A
factor that makes them overflow is halved and the same micro-batches are done again: no batch is ever skipped.

A loss or gradient that is not finite is an error before anything is updated; whether training stops or leaves the step
out is the session's to say (`train.on_nonfinite`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from luthier.data.batches import Batch
from luthier.errors import TrainingError
from luthier.model.decoder import Decoder
from luthier.train.adamw import Optimizer
from luthier.train.halves import add_both, halves

__all__ = [
    "NOT_FINITE",
    "NotFiniteError",
    "StepError",
    "StepResult",
    "Trainee",
    "add_gradient",
    "forward_backward",
    "make_scaler",
    "take_step",
]


@dataclass(frozen=True)
class Trainee:
    """What a step changes: the decoder's trained parameters (by name), their optimizer, and the scaler in fp16."""

    decoder: Decoder
    parameters: dict[str, torch.nn.Parameter]
    optimizer: Optimizer
    scaler: GradScaler | None


class StepError(TrainingError):
    """A step that cannot be applied; `rows` are the `Example.row` of the batches at fault."""

    def __init__(self, message: str, rows: tuple[int, ...], remedy: str) -> None:
        super().__init__(f"{message}; rows {', '.join(map(str, rows))}", remedy)
        self.what, self.rows = message, rows


class NotFiniteError(StepError):
    """A loss or gradient that is not finite: nothing was updated, and another batch may be taken."""

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message, rows, NOT_FINITE)


@dataclass(frozen=True)
class StepResult:
    """`loss` in nats per labelled token, before the update; `grad_norm` before clipping; `tokens` real ones.

    Where tokens have weights, `loss` is the weighted mean. `halvings`: how often the fp16 loss scale was halved before
    the gradient was finite.
    """

    loss: float
    grad_norm: float
    tokens: int
    halvings: int


def make_scaler(device: str, precision: str) -> GradScaler | None:
    """A loss scaler where the compute precision is fp16, none elsewhere: bf16 and fp32 have the range of gradients."""
    return GradScaler(device) if precision == "fp16" else None


def forward_backward(decoder: Decoder, micro_batches: Sequence[Batch], scaler: GradScaler | None = None) -> float:
    """Add the gradient of the step's loss to the parameters' `.grad` (times the scaler's factor); returns the loss.

    Raises StepError, naming the rows, when no token counts, NotFiniteError when a micro-batch's loss is not finite.
    """
    weight = sum(batch.weight for batch in micro_batches)
    if weight == 0:
        raise StepError("no token of the batch has a label", _rows(micro_batches), "a larger train.max_length may help")
    sums_M = torch.stack([add_gradient(decoder, batch, weight, scaler) for batch in micro_batches])
    sums_M = sums_M.cpu().double()  # one wait for the device, after all is queued; MPS has no float64
    finite_M = sums_M.isfinite().tolist()
    if not all(finite_M):
        bad = [batch for batch, finite in zip(micro_batches, finite_M, strict=True) if not finite]
        raise NotFiniteError("the loss is not finite", _rows(bad))
    return float(sums_M.sum()) / weight


def add_gradient(decoder: Decoder, micro_batch: Batch, weight: float, scaler: GradScaler | None) -> torch.Tensor:
    """One micro-batch forward and backward; returns the sum of its losses, which the gradient divides by `weight`."""
    if scaler is None and (two := halves(decoder, micro_batch)) is not None:
        return add_both(decoder, two, lambda half: _add_gradient(decoder, half, weight, None))
    return _add_gradient(decoder, micro_batch, weight, scaler)


def _add_gradient(decoder: Decoder, micro_batch: Batch, weight: float, scaler: GradScaler | None) -> torch.Tensor:
    batch, rows_n = micro_batch.placed(decoder.device, decoder.dtype, decoder.kernels.document, rounded=decoder.rounds)
    hidden_nD = decoder.hidden(batch.ids_T, batch.lengths, rows_n=rows_n)
    weights_n = None if batch.weights_T is None else batch.weights_T[rows_n]
    summed = decoder.kernels.linear_cross_entropy(
        hidden_nD, decoder.head_weight, batch.labels_T[rows_n], weights_N=weights_n
    )
    loss = summed / weight
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    return summed.detach()


def take_step(trainee: Trainee, micro_batches: Sequence[Batch], clip: float) -> StepResult:
    """One update of the parameters from `micro_batches`; `clip` 0 is no clipping.

    Raises NotFiniteError, with parameters, optimizer state and loss scale as they were, when loss or gradient is not
    finite; StepError when no token counts.
    """
    loss, norm, halvings = _gradient(trainee, micro_batches)
    if clip > 0:
        clip_grads_with_norm_(trainee.parameters.values(), clip, norm)
    trainee.optimizer.step()
    if trainee.scaler is not None:
        trainee.scaler.update()
    tokens = sum(batch.tokens for batch in micro_batches)
    return StepResult(loss=loss, grad_norm=float(norm), tokens=tokens, halvings=halvings)


def _gradient(trainee: Trainee, micro_batches: Sequence[Batch]) -> tuple[float, torch.Tensor, int]:
    """Leave the step's finite gradient in `.grad`; returns the loss, the gradient's norm, and the halvings it took."""
    scaler, halvings = trainee.scaler, 0
    factor = 1.0 if scaler is None else scaler.get_scale()
    while True:
        trainee.optimizer.zero_grad(set_to_none=True)
        loss = forward_backward(trainee.decoder, micro_batches, scaler)
        if scaler is not None:
            scaler.unscale_(trainee.optimizer)  # type: ignore[arg-type]  # it reads param_groups only
        norm = get_total_norm([leaf.grad for leaf in trainee.parameters.values() if leaf.grad is not None])
        if bool(norm.isfinite()):
            return loss, norm, halvings
        if scaler is None or scaler.get_scale() <= 1.0:
            if scaler is not None:
                scaler.update(factor)  # it is this batch's fault, not the factor's
            raise NotFiniteError("the gradient is not finite", _rows(micro_batches))
        scaler.update()  # halves the factor, for unscale_ has seen the overflow; at 1 the loop ends
        halvings += 1


NOT_FINITE = (
    "nothing was updated; try a lower train.learning_rate, train.clip: 1.0, train.precision: bf16 or fp32, "
    "and look at the rows with `luthier data show`"
)
"""The remedy where a loss or gradient is not finite."""


def _rows(micro_batches: Sequence[Batch]) -> tuple[int, ...]:
    return tuple(row for batch in micro_batches for row in batch.rows)
