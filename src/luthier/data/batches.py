"""Examples to packed micro-batches: no padding, no row lost, any step at once.

The rows of a run are one endless stream: epoch e is a permutation of all rows, drawn by PCG64 from (seed, e), and one
epoch follows another. Optimizer step k is positions k·B … (k+1)·B - 1 of the stream, so every step has B rows: where an
epoch does not divide by B, its last rows share a step with the first of the next. Step k depends on (examples, B, seed,
k) alone; a run that is resumed asks for it and does not walk there.

A step is cut into micro-batches of at most `micro_batch` rows, balanced by tokens (longest row first into the
emptiest, Graham 1969), so that the largest, which decides memory, is small. Since the loss is summed over labelled
tokens and divided once per step, the cut does not change the gradient.

Shapes: T tokens of all documents of a micro-batch, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.conversation import IGNORED, Example

__all__ = ["Batch", "Batches", "pack"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Documents concatenated without padding.

    Attributes:
        ids_T: int64 token ids.
        labels_T: int64; `labels_T[i]` is the token that position i must predict, -100 where it is not trained and at
            the last position of each document.
        lengths: tokens of each document; they sum to T.
        rows: `Example.row` of each document.
    """

    ids_T: Tensor  # noqa: N815  shape letters
    labels_T: Tensor  # noqa: N815
    lengths: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids_T)

    @property
    def labelled(self) -> int:
        """How many positions have a label."""
        return int((self.labels_T != IGNORED).sum())

    def to(self, device: str | torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        return Batch(self.ids_T.to(device), self.labels_T.to(device), self.lengths, self.rows)


def pack(examples: Sequence[Example]) -> Batch:
    """Pack examples one after another, labels shifted to the position that predicts them. At least one example."""
    ids_T = np.concatenate([example.ids for example in examples]).astype(np.int64)
    labels_T = np.full(len(ids_T), IGNORED, dtype=np.int64)
    start = 0
    for example in examples:
        labels_T[start : start + len(example) - 1] = example.labels[1:]
        start += len(example)
    lengths = tuple(len(example) for example in examples)
    rows = tuple(example.row for example in examples)
    return Batch(torch.from_numpy(ids_T), torch.from_numpy(labels_T), lengths, rows)


class Batches:
    """The micro-batches of every optimizer step of a run.

    Args:
        examples: the training rows, at least one.
        batch_size: rows per optimizer step.
        micro_batch: rows per micro-batch at most.
        seed: draws the order of every epoch.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, micro_batch: int, seed: int) -> None:
        if not examples or batch_size < 1 or micro_batch < 1:
            raise ValueError("at least one example, batch_size and micro_batch of at least 1")
        self.examples = tuple(examples)
        self.batch_size = batch_size
        self.micro_batch = min(micro_batch, batch_size)
        self.seed = seed
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of the examples' indices in an epoch, from (seed, epoch) alone."""
        if self._last is None or self._last[0] != epoch:  # steps come in order: one epoch's permutation is kept
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch))))
            self._last = (epoch, generator.permutation(len(self.examples)))
        return self._last[1]

    def indices(self, step: int) -> tuple[int, ...]:
        """The indices into `examples` of a step's rows, in the stream's order. `step` counts from 0."""
        count = len(self.examples)
        found: list[int] = []
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        while position < end:
            epoch, offset = divmod(position, count)
            taken = self.order(epoch)[offset : offset + end - position]
            found += taken.tolist()
            position += len(taken)
        return tuple(found)

    def step(self, step: int) -> tuple[Batch, ...]:
        """The micro-batches of optimizer step `step` (from 0), the one with most tokens first.

        The largest comes first so that a run that does not fit stops at once.
        """
        chosen = [self.examples[i] for i in self.indices(step)]
        bins = _balance([len(example) for example in chosen], self.micro_batch)
        return tuple(pack([chosen[i] for i in part]) for part in bins)

    def epoch(self, step: int) -> float:
        """How many times the data has been seen when `step` steps are done."""
        return step * self.batch_size / len(self.examples)


def _balance(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices into `lengths`, in as few parts of at most `most` as can be, near equal in sum; largest sum first."""
    parts: list[list[int]] = [[] for _ in range(-(-len(lengths) // most))]
    sums = [0] * len(parts)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min((p for p in range(len(parts)) if len(parts[p]) < most), key=lambda p: (sums[p], p))
        parts[emptiest].append(i)
        sums[emptiest] += lengths[i]
    largest_first = sorted(range(len(parts)), key=lambda p: (-sums[p], p))
    return [sorted(parts[p]) for p in largest_first]
