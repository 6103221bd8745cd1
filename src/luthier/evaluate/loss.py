"""Held-out loss: the mean cross-entropy of the labelled tokens of rows that were not trained on.

    loss = (1/n) Σ_i −log p(token_i | tokens before it in its row)        perplexity = exp(loss)

over the n labelled tokens of all rows, each row seen alone, by the same decoder and the same loss operation as in
training. An answer's tokens count 1 and others nothing, whatever weights the training rows have: held-out rows carry
none, so that runs can be compared. The sum is kept in float64 and divided once, so neither the order of the rows nor
the packing weighs a token differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from luthier.data.batches import pack
from luthier.data.conversation import Example
from luthier.errors import DataError
from luthier.model.decoder import Decoder

__all__ = ["HeldOut", "held_out_loss"]


@dataclass(frozen=True)
class HeldOut:
    """`loss` in nats per labelled token, `perplexity` its exponential (infinite beyond float64), `tokens` labelled."""

    loss: float
    perplexity: float
    tokens: int


def held_out_loss(
    decoder: Decoder,
    examples: Sequence[Example],
    tokens_per_batch: int = 4096,
    between: Callable[[int], None] | None = None,
) -> HeldOut:
    """The loss of `decoder`, as it is now, on `examples`; dropout off, no gradients, the decoder's mode left as found.

    Rows go through together up to `tokens_per_batch` tokens at a time (a longer row goes alone). `between` is told
    after each such group how many rows are done; what it raises ends the evaluation. Raises DataError when not one
    token is labelled.
    """
    training = decoder.training
    decoder.eval()
    try:
        total, tokens = _summed(decoder, examples, tokens_per_batch, between)
    finally:
        decoder.train(training)
    if tokens == 0:
        raise DataError("no held-out row has a labelled token", "give more rows to split.eval")
    loss = total / tokens
    return HeldOut(loss=loss, perplexity=math.exp(loss) if loss < 700.0 else math.inf, tokens=tokens)


@torch.inference_mode()
def _summed(
    decoder: Decoder, examples: Sequence[Example], tokens_per_batch: int, between: Callable[[int], None] | None
) -> tuple[float, int]:
    total, tokens, rows = 0.0, 0, 0
    for group in _groups(examples, tokens_per_batch):
        packed = pack(group)
        tokens += packed.labelled
        batch, rows_n = packed.placed(decoder.device, decoder.dtype, decoder.kernels.document, rounded=decoder.rounds)
        hidden_nD = decoder.hidden(batch.ids_T, batch.lengths, rows_n=rows_n)
        total += float(decoder.kernels.linear_cross_entropy(hidden_nD, decoder.head_weight, batch.labels_T[rows_n]))
        rows += len(group)
        if between is not None:
            between(rows)
    return total, tokens


def _groups(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[list[Example]]:
    """Consecutive examples of at most `tokens_per_batch` tokens together, at least one."""
    group: list[Example] = []
    held = 0
    for example in examples:
        if group and held + len(example) > tokens_per_batch:
            yield group
            group, held = [], 0
        group.append(example)
        held += len(example)
    if group:
        yield group
