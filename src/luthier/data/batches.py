"""Examples to packed micro-batches: no padding, no row lost, any step at once.

The *units* of a run, rows or packs of rows, are one endless stream: one epoch after another, each in an order of its
own, drawn by PCG64 from (seed, epoch) (epochs.py). Optimizer step k is units k·B … (k+1)·B - 1 of the stream, so every
step has B units: where an epoch does not divide by B, its last units share a step with the first of the next. Step k
depends on (examples, B, seed, k) alone; a run that is resumed asks for it and does not walk there.

A step is cut into micro-batches of at most `micro_batch` units and of not many more tokens than so many rows have on
average, balanced by tokens (longest unit first into the emptiest, Graham 1969), so that the largest, which decides
memory, is small. Since the loss is summed over labelled tokens and divided once per step, the cut does not change the
gradient.

With `longest_first` the whole steps of the first epoch come in descending order of tokens, so that a run that does not
fit into memory stops at its first step and not after an hour. What is in a step stays as drawn. Later epochs are
shuffled as usual: an order by length for ever would train on long rows at high learning rates and short ones at low.

Shapes: T tokens of all documents of a micro-batch, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.conversation import IGNORED, Example
from luthier.data.epochs import Epochs
from luthier.recipe.micro_batch import ROWS, most_tokens

__all__ = ["Batch", "Batches", "Measured", "filling", "in_two", "is_rounded", "pack"]


@runtime_checkable
class Measured(Protocol):
    """Rows that know their lengths (tokens) and weights (see epochs.py), so that none is read to learn them."""

    @property
    def lengths(self) -> NDArray[np.int32]: ...
    @property
    def weights(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Documents concatenated without padding.

    Attributes:
        ids_T: int64 token ids.
        labels_T: int64; `labels_T[i]` is the token that position i must predict, -100 where it is not trained and at
            the last position of each document.
        lengths: tokens of each document; they sum to T.
        rows: `Example.row` of each document.
        weights_T: float32; how much the label of each position counts in the loss. None: 1 each.
    """

    ids_T: Tensor  # noqa: N815  shape letters
    labels_T: Tensor  # noqa: N815
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    weights_T: Tensor | None = None  # noqa: N815

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids_T)

    @property
    def labelled(self) -> int:
        """How many positions have a label."""
        return int((self.labels_T != IGNORED).sum())

    @property
    def weight(self) -> float:
        """The sum of the labels' weights, in float64; where they have none, how many there are. Not on MPS."""
        if self.weights_T is None:
            return self.labelled
        return float(self.weights_T[self.labels_T != IGNORED].double().sum())

    def to(self, device: str | torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        weights_T = None if self.weights_T is None else self.weights_T.to(device)
        return Batch(self.ids_T.to(device), self.labels_T.to(device), self.lengths, self.rows, weights_T)

    def predicting(self, *, rounded: bool = False) -> Tensor:
        """The positions that have a label, in order; `rounded`: and as many others as `filling` asks for.

        All of them need the head, and of the last layer nothing else is needed. Where the batch is on a device, this
        waits for it: ask before it goes there.
        """
        labelled_T = self.labels_T != IGNORED
        if rounded and (short := filling(int(labelled_T.sum()))):
            labelled_T[(~labelled_T).nonzero().squeeze(1)[:short]] = True
        return labelled_T.nonzero().squeeze(1)

    def on(self, device: torch.device, dtype: torch.dtype, document: int = 16, *, rounded: bool = False) -> Batch:
        """The batch as it is computed on `device` in `dtype`: on a CPU in 16 bits rounded up, elsewhere as it is.

        Each document is filled up to a multiple of `document` tokens, and all together as `filling` says; where
        `rounded`, in any dtype.

        oneDNN, which computes 16-bit products on a CPU, builds and keeps a kernel for each new shape: with lengths as
        they come, the process grows by a gigabyte in a few dozen steps and waits for the compiler in each.
        """
        return self.rounded(document) if rounded or is_rounded(device, dtype) else self.to(device)

    def placed(
        self, device: torch.device, dtype: torch.dtype, document: int = 16, *, rounded: bool = False
    ) -> tuple[Batch, Tensor]:
        """`on`, and there too the positions that have a label (`predicting`), found without waiting for the device."""
        rounded = rounded or is_rounded(device, dtype)
        batch = self.on(device, dtype, document, rounded=rounded)
        labelled_n = (batch if rounded else self).predicting(rounded=rounded)
        return batch, labelled_n.to(device)

    def rounded(self, document: int = 16) -> Batch:
        """Each document filled up to a multiple of `document` tokens, then a document of `filling` behind them.

        What is filled in has no label, and comes after every token that has: no loss or gradient changes.
        """
        ends = np.cumsum(self.lengths)
        filled = [-(-length // document) * document for length in self.lengths]
        lengths = (*filled, rest) if (rest := filling(sum(filled))) else tuple(filled)
        starts = np.cumsum((0, *filled[:-1]))
        place_T = torch.from_numpy(np.arange(ends[-1]) + np.repeat(starts - ends + self.lengths, self.lengths))

        def spread(tensor_T: Tensor, fill: float) -> Tensor:
            return torch.full((sum(lengths),), fill, dtype=tensor_T.dtype).index_copy_(0, place_T, tensor_T)

        weights_T = None if self.weights_T is None else spread(self.weights_T, 0.0)
        return Batch(spread(self.ids_T, 0), spread(self.labels_T, IGNORED), lengths, self.rows, weights_T)


def is_rounded(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the rows of products on `device` in `dtype` should be rounded up; see `Batch.on`."""
    return device.type == "cpu" and dtype.itemsize == 2


def filling(rows: int) -> int:
    """How many rows more make a number that other batches have too."""
    return -rows % ROWS


def pack(examples: Sequence[Example]) -> Batch:
    """Pack examples one after another, labels (and weights) shifted to the position that predicts them. At least one.

    There are weights where any example has some; those that have none then weigh 1 at each label.
    """
    ids_T = np.concatenate([example.ids for example in examples]).astype(np.int64)
    labels_T = np.full(len(ids_T), IGNORED, dtype=np.int64)
    weighted = any(example.weights is not None for example in examples)
    weights_T = np.ones(len(ids_T), dtype=np.float32) if weighted else None
    start = 0
    for example in examples:
        labels_T[start : start + len(example) - 1] = example.labels[1:]
        if weights_T is not None and example.weights is not None:
            weights_T[start : start + len(example) - 1] = example.weights[1:]
        start += len(example)
    lengths = tuple(len(example) for example in examples)
    rows = tuple(example.row for example in examples)
    weights = None if weights_T is None else torch.from_numpy(weights_T)
    return Batch(torch.from_numpy(ids_T), torch.from_numpy(labels_T), lengths, rows, weights)


def in_two(batch: Batch) -> tuple[Batch, Batch]:
    """The documents of `batch`, at least two, in two batches that are as near equal in tokens as dealing makes them;
    the larger first."""
    starts = np.cumsum((0, *batch.lengths[:-1]))

    def of(documents: list[int]) -> Batch:
        lengths = tuple(batch.lengths[i] for i in documents)
        place_T = torch.from_numpy(
            np.concatenate([np.arange(n) + starts[i] for i, n in zip(documents, lengths, strict=True)])
        )
        weights_T = None if batch.weights_T is None else batch.weights_T[place_T]
        rows = tuple(batch.rows[i] for i in documents)
        return Batch(batch.ids_T[place_T], batch.labels_T[place_T], lengths, rows, weights_T)

    first, second = _dealt(batch.lengths, len(batch.lengths), 2)
    return of(first), of(second)


class Batches:
    """The micro-batches of every optimizer step of a run.

    Args:
        examples: the training rows, at least one; read as they are asked for. Where they are `Measured` their lengths
            and weights are used, else the lengths are counted where they are needed and every row weighs 1.
        batch_size: units per optimizer step.
        micro_batch: units per micro-batch at most; of rows, no more than have `most_tokens` (recipe/micro_batch.py).
        seed: draws the order of every epoch.
        capacity: a unit is a pack of at most so many tokens; None: a row.
        longest_first: the first epoch's whole steps in descending order of tokens.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        micro_batch: int,
        seed: int,
        *,
        capacity: int | None = None,
        longest_first: bool = False,
    ) -> None:
        if len(examples) < 1 or batch_size < 1 or micro_batch < 1:
            raise ValueError("at least one example, batch_size and micro_batch of at least 1")
        self.examples = examples
        self.batch_size = batch_size
        self.micro_batch = min(micro_batch, batch_size)
        self._packed = capacity is not None
        lengths = self._lengths()
        self.most_tokens = None if self._packed else self._most_tokens(lengths)
        self._epochs = Epochs(
            len(examples),
            seed,
            weights=examples.weights if isinstance(examples, Measured) else None,
            lengths=lengths if self._packed or longest_first else None,
            capacity=capacity,
            longest_first=batch_size if longest_first else 0,
        )

    def _most_tokens(self, lengths: NDArray[np.int32]) -> int:
        weights = self.examples.weights if isinstance(self.examples, Measured) else np.ones(len(lengths))
        seen = lengths[weights > 0]
        return most_tokens(self.micro_batch, float(np.average(lengths, weights=weights)), int(seen.max()))

    def _lengths(self) -> NDArray[np.int32]:
        if isinstance(self.examples, Measured):
            return self.examples.lengths
        return np.fromiter((len(example) for example in self.examples), np.int32, len(self.examples))

    def heaviest(self) -> Batch:
        """As many of the longest rows, or of the first epoch's fullest packs, as a micro-batch may have, together.

        Of rows, until they have as many tokens as it may have; the last of them is then cut to what is left.

        A row of weight 2 may stand in it twice; where there are fewer rows than that, all again. No micro-batch within
        an epoch has more tokens (of packs: within the first). One that spans two epochs could, where both have their
        longest rows at the seam and `_balance` puts them together.
        """
        lengths = self._lengths().astype(np.int64)
        if self._packed:
            units = self._epochs.units_of(0)
            tokens = np.add.reduceat(lengths[units.rows], units.starts[:-1])
            rows = np.concatenate([units[pack] for pack in self._fullest(tokens)])
        else:
            weights = self.examples.weights if isinstance(self.examples, Measured) else np.ones(len(lengths))
            seen = np.repeat(np.arange(len(lengths)), np.ceil(weights).astype(np.int64))
            rows = seen[self._fullest(lengths[seen])]
        examples = [self.examples[row] for row in rows.tolist()]
        return pack(examples if self.most_tokens is None else _cut(examples, self.most_tokens))

    def _fullest(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices of a micro-batch's worth of the largest `tokens`; where there are fewer, round and round."""
        return np.resize(np.argsort(-tokens, kind="stable"), self.micro_batch)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch; one of weight 2 counts twice."""
        return self._epochs.rows

    @property
    def units_per_epoch(self) -> int:
        """Packs of an epoch; rows without packing."""
        return self._epochs.units

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch, seldom a whole number."""
        return self.units_per_epoch / self.batch_size

    def units(self, step: int) -> tuple[NDArray[np.int64], ...]:
        """The units of a step, in the stream's order: of each, the indices into `examples`. `step` counts from 0."""
        found: list[NDArray[np.int64]] = []
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        while position < end:
            epoch, offset = divmod(position, self.units_per_epoch)
            units = self._epochs.units_of(epoch)
            taken = range(offset, min(offset + end - position, len(units)))
            found += [units[unit] for unit in taken]
            position += len(taken)
        return tuple(found)

    def indices(self, step: int) -> tuple[int, ...]:
        """The indices into `examples` of a step's rows, in the stream's order. `step` counts from 0."""
        return tuple(index for unit in self.units(step) for index in unit.tolist())

    def step(self, step: int) -> tuple[Batch, ...]:
        """The micro-batches of optimizer step `step` (from 0), the one with most tokens first.

        The largest comes first so that a run that does not fit stops at once.
        """
        chosen = [[self.examples[index] for index in unit.tolist()] for unit in self.units(step)]
        parts = _balance([sum(map(len, unit)) for unit in chosen], self.micro_batch, self.most_tokens)
        return tuple(pack([example for unit in part for example in chosen[unit]]) for part in parts)

    def epoch(self, step: int) -> float:
        """How many times the data has been seen when `step` steps are done."""
        return step * self.batch_size / self.units_per_epoch


def _cut(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first of them, so many tokens in all; of the last its end, where its labels are."""
    found: list[Example] = []
    for example in examples:
        if tokens == 0:
            break
        of = slice(max(0, len(example) - tokens), None)
        weights = None if example.weights is None else example.weights[of]
        found.append(Example(example.ids[of], example.labels[of], example.row, weights=weights))
        tokens -= len(found[-1])
    return found


def _balance(lengths: Sequence[int], most: int, tokens: int | None) -> list[list[int]]:
    """Indices into `lengths` in parts of at most `most` and, where that is given, of at most `tokens` in sum (a longer
    one goes alone): as few as that takes, near equal in sum; largest sum first."""
    count = -(-len(lengths) // most)
    parts = _dealt(lengths, most, count)
    while tokens is not None and count < len(lengths) and sum(lengths[i] for i in parts[0]) > tokens:
        count += 1
        parts = _dealt(lengths, most, count)
    return parts


def _dealt(lengths: Sequence[int], most: int, count: int) -> list[list[int]]:
    """The same in `count` parts: the longest first, each to where there is least."""
    parts: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * len(parts)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min((p for p in range(len(parts)) if len(parts[p]) < most), key=lambda p: (sums[p], p))
        parts[emptiest].append(i)
        sums[emptiest] += lengths[i]
    largest_first = sorted(range(len(parts)), key=lambda p: (-sums[p], p))
    return [sorted(parts[p]) for p in largest_first]
