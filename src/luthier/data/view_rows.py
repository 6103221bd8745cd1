"""Which prepared rows are looked at, and what is to be known of each beside its tokens.

Rows are spread evenly over the data, so the same data shows the same rows: the first, the last, and those between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Example, Source
from luthier.data.dataset import Dataset
from luthier.data.prepare import rejected_rows
from luthier.data.split import SIDES, Split
from luthier.data.view import Piece, pieces_of
from luthier.errors import DataError, UsageError

__all__ = ["At", "PackView", "RowView", "at_place", "at_row", "pack_view", "row_view", "spread", "spread_over"]

At = tuple[Split, int]
"""An example: its side, and its index there."""


@dataclass(frozen=True)
class RowView:
    """An example and where it comes from.

    `whole` is how many tokens its row has before any limit, of which this example is those from `begin` to before
    `end` (and a BOS of its own, where it begins later); `weight` how often an epoch has it.
    """

    example: Example
    pieces: tuple[Piece, ...]
    side: Split
    source: Source
    whole: int
    begin: int
    end: int
    weight: float

    @property
    def place(self) -> str:
        """Where its row stands, without the folders that are nobody else's business: data/rows.jsonl:12."""
        return f"{'/'.join(PurePath(self.source.file).parts[-2:])}:{self.source.line}"

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.example)

    @property
    def trained(self) -> int:
        """How many tokens the loss counts in full."""
        return sum(len(piece.ids) for piece in self.pieces if piece.weight >= 1)

    @property
    def lightly(self) -> int:
        """How many more it counts with a weight below 1."""
        return sum(len(piece.ids) for piece in self.pieces if 0 < piece.weight < 1)

    @property
    def share(self) -> float:
        """Of its tokens, those that are trained in full."""
        return self.trained / self.tokens if self.tokens else 0.0

    @property
    def cut(self) -> str | None:
        """What was cut off, in words; None where the row is whole."""
        if self.begin:
            return f"a part: tokens {self.begin + 1:,} to {self.end:,} of {self.whole:,}"
        return f"cut: {self.end:,} of {self.whole:,} tokens" if self.end < self.whole else None


@dataclass(frozen=True)
class PackView:
    """A unit of an optimizer step: documents that stand one after another, each seen alone, positions from 0.

    `number` counts from 0; `capacity` is how many tokens there is room for, None without packing.
    """

    number: int
    documents: tuple[RowView, ...]
    capacity: int | None

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(document.tokens for document in self.documents)

    @property
    def filled(self) -> float:
        """Share of the room that is used."""
        return self.tokens / self.capacity if self.capacity else 1.0


def row_view(dataset: Dataset, at: At) -> RowView:
    """What is shown of an example."""
    side, index = at
    examples = dataset.split(side)
    example = examples[index]
    return RowView(
        example=example,
        pieces=pieces_of(example, dataset.template.tokenizer, dataset.template.stop_ids),
        side=side,
        source=dataset.places[example.row],
        whole=int(dataset.store.rows["length"][example.row]),
        begin=int(examples.cuts.start[index]),
        end=int(examples.cuts.stop[index]),
        weight=float(examples.weights[index]),
    )


def pack_view(dataset: Dataset, number: int, unit: Sequence[int], capacity: int | None) -> PackView:
    """What is shown of a unit of training rows, given as indices into `dataset.train`."""
    return PackView(number, tuple(row_view(dataset, ("train", index)) for index in unit), capacity)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices at most, evenly spaced: the first, the last and those between."""
    taken = min(count, wanted)
    return [round(i * (count - 1) / max(taken - 1, 1)) for i in range(taken)]


def spread_over(dataset: Dataset, wanted: int, side: Split | None = None) -> list[At]:
    """`wanted` examples of a side, or of all sides by their sizes, but one at least of each that has any.

    Raises:
        UsageError: the side is empty.
    """
    sizes = {name: len(dataset.split(name)) for name in SIDES}
    if side is not None:
        if not sizes[side]:
            others = ", ".join(f"{name} ({size:,} rows)" for name, size in sizes.items() if size)
            remedy = f"there are {others}; to hold rows out: split: {{train: 0.8, eval: 0.1, test: 0.1}}"
            raise UsageError(f"no row is on the side {side}", remedy)
        return [(side, index) for index in spread(sizes[side], wanted)]
    held_out = {name: size for name, size in sizes.items() if size and name != "train"}
    total, left = sum(sizes.values()), wanted
    given: dict[Split, int] = {}
    for name, size in held_out.items():
        given[name] = min(left - 1, max(1, wanted * size // total)) if left > 1 else 0
        left -= given[name]
    given["train"] = left
    return [(name, index) for name in SIDES for index in spread(sizes[name], given.get(name, 0))]


def at_row(dataset: Dataset, row: int) -> list[At]:
    """The examples of row `row`, counted from 0 over all files; several where it is cut into several.

    Raises:
        UsageError: there is no such row.
        DataError: it is there, and not used.
    """
    if not 0 <= row < len(dataset.places):
        remedy = f"from 0 to {len(dataset.places) - 1:,}; or by its place: --at FILE:LINE"
        raise UsageError(f"there is no row {row:,}: {len(dataset.places):,} rows can be used", remedy)
    found = [(side, int(i)) for side in SIDES for i in np.flatnonzero(dataset.split(side).rows == row)]
    if not found:
        source = dataset.places[row]
        reasons = [left.reason for left in dataset.report.excluded if Source(left.file, left.line) == source]
        reason = reasons[0] if reasons else f"nothing of it is left within max_length {dataset.report.max_length}"
        raise DataError(f"{source} is not used: {reason}", "raise train.max_length (--set train.max_length=…)")
    return found


def at_place(dataset: Dataset, place: str) -> list[At]:
    """The examples of the row at `place`, FILE:LINE. The end of a path is enough: rows.jsonl:12.

    Raises:
        UsageError: this is no place, or no such file or line is read.
        DataError: the row is there, and not used.
    """
    file, colon, number = place.rpartition(":")
    if not colon or not file or not (number.isascii() and number.isdecimal()):
        raise UsageError(f"{place!r} is not a place in a file", "FILE:LINE, such as --at rows.jsonl:12")
    line = int(number)
    files = [i for i, source in enumerate(dataset.sources) if _names(file, source.path)]
    if not files:
        names = ", ".join(source.path for source in dataset.sources[:5])
        raise UsageError(f"no file {file} is read here", f"the rows come from {names}")
    rows = dataset.store.rows
    among = np.isin(rows["source"], files)
    exact = np.flatnonzero(among & (rows["line"] == line))
    if len(exact):
        return [at for row in exact.tolist() for at in at_row(dataset, row)]
    paths = {dataset.sources[i].path for i in files}
    for problem in rejected_rows(dataset.sources, dataset.store):
        if problem.file in paths and problem.line == line:
            raise DataError(f"{problem.file}:{line}: the row cannot be used: {problem.reason}", problem.remedy)
    raise UsageError(f"{place}: no row stands there", f"the nearest one is {_nearest(dataset, among, line)}")


def _names(asked: str, path: str) -> bool:
    """Whether `asked` is the path, or the end of it from a folder's border."""
    asked = asked.removeprefix("./")
    return path == asked or path.endswith("/" + asked)


def _nearest(dataset: Dataset, among: NDArray[np.bool_], line: int) -> Source:
    rows = np.flatnonzero(among)
    distance = np.abs(dataset.store.rows["line"][rows].astype(np.int64) - line)
    return dataset.places[int(rows[distance.argmin()])]
