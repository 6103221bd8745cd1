"""How a chat's answers are shown while they come: one, or two of base and tuned, one under the other or in columns.

Stacked    the first as it comes, the others held back until those before them have ended
Columns    line by line; a line is written for good once every side has it, and the last one is drawn again in place
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

from rich.cells import cell_len
from rich.markup import escape
from rich.text import Text

from luthier.cli import console
from luthier.cli.talk import write
from luthier.guard.secrets import visible

__all__ = ["COLUMNS_FROM", "Columns", "Stacked", "View", "view_of"]

COLUMNS_FROM = 80
"""Cells of a terminal in which two answers stand side by side."""
_BETWEEN = " │ "


class View(Protocol):
    """`put` takes the next piece of a side's answer, and whether that is its end; `close` when no more will come."""

    def put(self, side: int, text: str, ended: bool) -> None: ...

    def close(self) -> None: ...


def view_of(names: Sequence[str]) -> View:
    """The view for the sides of these names, on standard output as it is now; one side needs no name above it."""
    width = shutil.get_terminal_size().columns
    wide = len(names) > 1 and sys.stdout.isatty() and width >= COLUMNS_FROM
    return Columns(names, width) if wide else Stacked(names)


def _heading(text: str) -> None:
    console.output.print(f"[bold]{escape(text)}[/]", soft_wrap=True)


class Stacked:
    """One after another, each under its name where there are several."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = ["" for _ in names]
        self._ended = [False for _ in names]
        self._current = -1
        self._next()

    def put(self, side: int, text: str, ended: bool) -> None:
        """Shown at once where the sides before have ended."""
        self._held[side] += text
        self._ended[side] = self._ended[side] or ended
        while self._current < len(self._names):
            write(self._held[self._current])
            self._held[self._current] = ""
            if not self._ended[self._current]:
                return
            write("\n")
            self._next()

    def close(self) -> None:
        """Show what was held back."""
        for side, ended in enumerate(self._ended):
            if not ended:
                self.put(side, "", True)

    def _next(self) -> None:
        self._current += 1
        if len(self._names) > 1 and self._current < len(self._names):
            _heading(("\n" if self._current else "") + self._names[self._current])


class _Column:
    """A text as lines of `width` cells."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._whole: list[str] = []
        self._paragraph = ""
        self._last = [""]
        self.ended = False

    def put(self, text: str) -> None:
        *whole, self._paragraph = (self._paragraph + visible(text)).split("\n")
        for paragraph in whole:  # only what may still change is wrapped again
            self._whole += self._wrapped(paragraph)
        self._last = self._wrapped(self._paragraph)

    def rows(self) -> list[str]:
        """All lines; until the end, a word of the last one may still move to the next."""
        return [*self._whole, *self._last]

    def _wrapped(self, paragraph: str) -> list[str]:
        lines = Text(paragraph).wrap(console.output, self._width, overflow="fold")
        return [line.plain for line in lines] or [""]


class Columns:
    """Beside each other, on a terminal of `width` cells. What was written stays in the scrollback as it is."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        # One cell stays free: some terminals go to the next line when the last cell is written.
        self._width = (width - 1 - len(_BETWEEN) * (len(names) - 1)) // len(names)
        self._columns = [_Column(self._width) for _ in names]
        self._written = 0
        _heading(self._row([visible(name) for name in names]).rstrip())

    def put(self, side: int, text: str, ended: bool) -> None:
        """Write the lines that all sides have now."""
        self._columns[side].put(text)
        self._columns[side].ended = ended
        self._draw()

    def close(self) -> None:
        """Write what is there, whether or not the sides have ended."""
        if not all(column.ended for column in self._columns):
            for column in self._columns:
                column.ended = True
            self._draw()

    def _draw(self) -> None:
        texts = [column.rows() for column in self._columns]
        rows = [self._row(cells) for cells in zip_longest(*texts, fillvalue="")][self._written :]
        certain = [
            len(text) - 1 for text, column in zip(texts, self._columns, strict=True) if not column.ended
        ]  # of one that has ended all lines are
        upto = min(certain, default=max(map(len, texts))) - self._written
        drawn = "".join(f"\r{row}\n" for row in rows[:upto])
        if certain:
            drawn += f"\r{rows[upto]}"
        self._written += upto
        sys.stdout.write(drawn)
        sys.stdout.flush()

    def _row(self, cells: Sequence[str]) -> str:
        """Of one length always, so that it covers what stood there before."""
        return _BETWEEN.join(cell + " " * (self._width - cell_len(cell)) for cell in cells)
