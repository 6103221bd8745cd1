"""Rows on a terminal: their tokens in colours, or where there are none, with marks.

                     in colour           without (a file, NO_COLOR)
    trained          green               [[between these]]
    trained less     yellow              [[0.1: between these]]
    not trained      dim
    special token    on a ground         ‹<|eot_id|>›

Marks can stand in a row's own text as well; what is exact without colours is `--json`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from luthier.data.view import Piece
from luthier.data.view_rows import PackView, RowView

__all__ = ["Screen"]

_STYLES = {
    "trained": ("green", "reverse green"),
    "trained less": ("yellow", "gold3 on grey23"),
    "prompt": ("dim", "grey70 on grey23"),
}
"""What a token is to the loss -> the style of a text token, of a special one."""


def _kind(weight: float) -> str:
    return "prompt" if weight == 0 else "trained" if weight >= 1 else "trained less"


class Screen:
    """Writes rows and packs on a console; with `tokens`, every token by itself, its id below it."""

    def __init__(self, console: Console, *, tokens: bool) -> None:
        self._console = console
        self._tokens = tokens
        self._plain = console.color_system is None or console.no_color

    def legend(self, *, weighted: bool) -> None:
        """What colours and marks mean; `weighted`: there are tokens that are trained with a weight below 1."""
        made = Text()
        if self._plain:
            made.append("[[trained]]  ")
            made.append("[[0.1: trained, with this weight]]  " if weighted else "")
            made.append("prompt  ‹special token›  ")
        else:
            for name, (usual, special) in _STYLES.items():
                if weighted or name != "trained less":
                    made.append(name, usual).append(" ").append("special", special).append("  ")
        made.append("⏎ line break, · space at an edge", "" if self._plain else "dim")
        self._print(made)

    def row(self, row: RowView) -> None:
        """One row: a line about it, then its tokens."""
        self._print(Text())
        self._print(Text(f"{_place(row)}  ", "bold").append(_about(row), "not bold"))
        self._body(row.pieces)

    def pack(self, pack: PackView, of: int) -> None:
        """A pack: a line about it, then its documents with a boundary before each."""
        room = f" of {pack.capacity:,} tokens, {pack.filled:.1%} filled" if pack.capacity else " tokens"
        count = f"{len(pack.documents)} document" + ("s" if len(pack.documents) != 1 else "")
        self._print(Text())
        self._print(
            Text(f"pack {pack.number + 1} of {of}  ", "bold").append(f"{count}, {pack.tokens:,}{room}", "not bold")
        )
        for number, document in enumerate(pack.documents, 1):
            self._boundary(f"document {number}, positions 0–{document.tokens - 1:,}")
            self._print(Text(f"{_place(document)}  {_about(document)}", "" if self._plain else "dim"))
            self._body(document.pieces)
        if pack.capacity and pack.capacity > pack.tokens:
            self._boundary(f"{pack.capacity - pack.tokens:,} tokens of room")

    def _boundary(self, title: str) -> None:
        line = f"── {title} "
        self._print(Text(line + "─" * max(2, self._width - cell_len(line)), "" if self._plain else "cyan"))

    @property
    def _width(self) -> int:
        return self._console.width if self._console.is_terminal else min(self._console.width, 120)

    def _print(self, text: Text) -> None:
        # A file's lines are its own: they are not broken where a terminal would end.
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    def _body(self, pieces: Sequence[Piece]) -> None:
        self._print(self._cells(pieces) if self._tokens else self._running(pieces))

    def _running(self, pieces: Sequence[Piece]) -> Text:
        made = Text()
        fresh = True  # at the beginning of a line
        for (_, weight), run in groupby(_turned(pieces), lambda one: (one[0], one[1].weight)):
            opened = False
            for _, piece in run:
                if piece.starts == "turn" and not fresh:
                    made.append("\n")
                if not opened:
                    made.append(self._opening(weight))
                    opened = True
                for text, style in self._shown(piece):
                    made.append(text, style)
                fresh = piece.shown[-1].text.endswith("\n")
            made.append(self._closing(weight))
        made.rstrip()
        return made

    def _opening(self, weight: float) -> str:
        if not self._plain or weight == 0:
            return ""
        return "[[" if weight == 1 else f"[[{weight:.3g}: "

    def _closing(self, weight: float) -> str:
        return "]]" if self._plain and weight > 0 else ""

    def _shown(self, piece: Piece) -> list[tuple[str, str]]:
        """(text, style) of a piece."""
        if self._plain:
            text = "".join(glyphs.text for glyphs in piece.shown)
            return [(f"‹{text}›" if piece.special else text, "")]
        usual, special = _STYLES[_kind(piece.weight)]
        if piece.special:
            return [(glyphs.text, special) for glyphs in piece.shown]
        return [(glyphs.text, f"{usual} dim" if glyphs.mark else usual) for glyphs in piece.shown]

    def _cells(self, pieces: Sequence[Piece]) -> Text:
        """Lines of tokens with their ids below; a new line where the text has one, and before a turn."""
        made = Text()
        line: list[tuple[Text, Text]] = []
        used = 0
        for i, piece in enumerate(pieces):
            top = Text()
            if i == 0 or pieces[i - 1].weight != piece.weight:
                top.append(self._opening(piece.weight))
            for text, style in self._shown(piece):
                top.append(text.replace("\n", ""), style)
            if i + 1 == len(pieces) or pieces[i + 1].weight != piece.weight:
                top.append(self._closing(piece.weight))
            below = Text(" ".join(map(str, piece.ids)), "" if self._plain else "dim")
            width = max(top.cell_len, below.cell_len) + 1
            if line and (used + width > self._width or piece.starts == "turn"):
                _end_line(made, line)
                line, used = [], 0
            line.append((top, below))
            used += width
            if "\n" in piece.text:
                _end_line(made, line)
                line, used = [], 0
        if line:
            _end_line(made, line)
        made.rstrip()
        return made


def _turned(pieces: Sequence[Piece]) -> list[tuple[int, Piece]]:
    """Each piece with the number of its turn."""
    turn = 0
    found: list[tuple[int, Piece]] = []
    for piece in pieces:
        turn += piece.starts == "turn"
        found.append((turn, piece))
    return found


def _end_line(made: Text, line: Sequence[tuple[Text, Text]]) -> None:
    for which in (0, 1):
        for cell in line:
            width = max(cell[0].cell_len, cell[1].cell_len)
            made.append(cell[which]).append(" " * (width - cell[which].cell_len) + "│", "dim")
        made.append("\n")


def _place(row: RowView) -> str:
    """The row's place, from here where its file is below this folder: terminals open such a place."""
    here = os.path.relpath(row.source.file) if os.path.isabs(row.source.file) else row.source.file
    file = row.source.file if here.startswith(os.pardir) else here
    return f"{file}:{row.source.line}"


def _about(row: RowView) -> str:
    words = [
        row.side,
        f"row {row.example.row:,}",
        f"{row.tokens:,} tokens",
        f"{row.trained:,} trained ({row.share:.0%})",
        *([f"{row.lightly:,} trained less"] if row.lightly else []),
        *([row.cut] if row.cut else []),
        *([f"weight {row.weight:g}"] if row.weight != 1 else []),
    ]
    return " · ".join(words)
