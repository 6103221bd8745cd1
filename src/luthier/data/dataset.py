"""Prepared rows, by side: views of a store, which read a row when it is looked at and hold none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import IGNORED, Example, Source
from luthier.data.render import Template
from luthier.data.report import DataReport
from luthier.data.sources import OpenSource
from luthier.data.split import SIDES, Split
from luthier.data.store import Store
from luthier.recipe.schema import Recipe

__all__ = ["Cuts", "Dataset", "Examples", "Places", "Reading"]


@dataclass(frozen=True)
class Cuts:
    """Which part of which row each example is, one entry an example: tokens `start` to `stop` of row `row`.

    A part that does not begin its row begins with the row's BOS all the same, where the row has one.
    """

    row: NDArray[np.int64]
    start: NDArray[np.int32]
    stop: NDArray[np.int32]

    def take(self, which: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Cuts:
        """Some of them."""
        return Cuts(self.row[which], self.start[which], self.stop[which])


@dataclass(frozen=True)
class Reading:
    """How examples are read from the store: the weight of what is not trained, the tokenizer's BOS (None: it has none),
    and whether the rows' fields come with them."""

    prompt_weight: float = 0.0
    bos: int | None = None
    fields: bool = False


class Examples(Sequence[Example]):
    """Rows of a store, or parts of rows. Slices are views too.

    Attributes:
        cuts: which part of which row each is.
        weights: how often each is seen in an epoch, float64.
    """

    def __init__(self, store: Store, cuts: Cuts, weights: NDArray[np.float64], reading: Reading) -> None:
        self._store, self.cuts, self.weights, self._reading = store, cuts, weights, reading

    @property
    def rows(self) -> NDArray[np.int64]:
        """`Example.row` of each."""
        return self.cuts.row

    @property
    def bos(self) -> int | None:
        """The token that a later part of a row begins with where the row does, None for none."""
        return self._reading.bos

    @cached_property
    def _continues(self) -> NDArray[np.bool_]:
        if self._reading.bos is None:
            return np.zeros(len(self), dtype=np.bool_)
        first = np.asarray(self._store.ids[self._store.rows["offset"][self.cuts.row]])
        found: NDArray[np.bool_] = (self.cuts.start > 0) & (first == self._reading.bos)
        return found

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each."""
        return (self.cuts.stop - self.cuts.start + self._continues).astype(np.int32)

    @cached_property
    def labelled(self) -> NDArray[np.int32]:
        """Trained tokens of each, the first of a document not counted: nothing comes before it."""
        found = self._store.rows["labelled"][self.cuts.row].astype(np.int32)
        whole = self._store.rows["length"][self.cuts.row]
        for i in np.flatnonzero((self.cuts.start > 0) | (self.cuts.stop < whole)).tolist():
            trained = self._trained(i)
            found[i] = np.count_nonzero(trained if self._continues[i] else trained[1:])
        return found

    def __len__(self) -> int:
        return len(self.cuts.row)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.take(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._read(index % len(self))

    def take(self, which: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Examples:
        """Some of them, in the order asked for."""
        return Examples(self._store, self.cuts.take(which), self.weights[which], self._reading)

    def recut(self, cuts: Cuts, weights: NDArray[np.float64]) -> Examples:
        """Other parts of the same store's rows."""
        return Examples(self._store, cuts, weights, self._reading)

    def _span(self, i: int) -> slice:
        offset = int(self._store.rows["offset"][self.cuts.row[i]])
        return slice(offset + int(self.cuts.start[i]), offset + int(self.cuts.stop[i]))

    def _trained(self, i: int) -> NDArray[np.bool_]:
        return self._store.trained[self._span(i)].astype(np.bool_)

    def _read(self, i: int) -> Example:
        row = int(self.cuts.row[i])
        ids, trained = np.array(self._store.ids[self._span(i)]), self._trained(i)
        if self._continues[i]:
            ids = np.concatenate((np.array([self._reading.bos], dtype=np.int32), ids))
            trained = np.concatenate(([False], trained))
        weight = self._reading.prompt_weight
        labels = ids.copy() if weight else np.where(trained, ids, np.int32(IGNORED))
        weights = np.where(trained, np.float32(1.0), np.float32(weight)) if weight else None
        fields: Mapping[str, str] = self._store.fields(row) if self._reading.fields else {}
        answer = min(
            int(self._store.rows["answer"][row]) - int(self.cuts.start[i]) + bool(self._continues[i]), len(ids)
        )
        return Example(ids, labels, row, fields, weights, max(answer, 0))


class Places(Sequence[Source]):
    """Where each row of a store stands in the user's files."""

    def __init__(self, store: Store, paths: Sequence[str]) -> None:
        self._rows, self._paths = store.rows, tuple(paths)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Source, ...]: ...
    def __getitem__(self, index: int | slice) -> Source | tuple[Source, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        record = self._rows[index]
        return Source(self._paths[int(record["source"])], int(record["line"]))


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows by side, what was done to get them, and the template they were written with.

    `places[row]` is where the example with that `row` stands in the user's files; `sources` read them again.
    """

    train: Examples
    eval: Examples
    test: Examples
    report: DataReport
    template: Template
    places: Places
    sources: tuple[OpenSource, ...]
    store: Store
    recipe: Recipe

    def split(self, name: Split) -> Examples:
        """The examples of one side."""
        return {"train": self.train, "eval": self.eval, "test": self.test}[name]

    def with_sides(self, sides: Mapping[Split, Examples], report: DataReport) -> Dataset:
        """The same data with other examples on its sides."""
        return replace(self, train=sides["train"], eval=sides["eval"], test=sides["test"], report=report)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is trained and measured on: the tokens, and which of them are on which side how often."""
        found = hashlib.sha256(self.store.digest.encode())
        for name in SIDES:
            side = self.split(name)
            found.update(f"{name};{len(side)};".encode())
            for array in (side.cuts.row, side.cuts.start, side.cuts.stop, side.weights):
                found.update(np.ascontiguousarray(array).tobytes())
        found.update(f"{self.recipe.prompt_loss_weight}".encode())
        return found.hexdigest()
