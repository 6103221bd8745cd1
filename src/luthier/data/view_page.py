"""Rows as one self-contained HTML page: nothing is loaded from elsewhere, and nothing a row says can act in it.

Two walls: all that comes from data is escaped, by jinja's autoescape or `_document`; and the page's policy lets a
browser run the one script whose digest it names, and load nothing.

    article > header, .doc > .turn > (mark | .p) > i            i: a piece; mark: trained; .p: not; i.s: special

An `i` stands for `data-n` tokens, one without it; the ids are in `data-ids` of the document, in the same order.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from luthier.data.dataset import Dataset
from luthier.data.split import SIDES, Split
from luthier.data.view import Piece
from luthier.data.view_rows import PackView, RowView

__all__ = ["MOST_ROWS", "MOST_TOKENS", "Heading", "page"]

MOST_ROWS = 300
MOST_TOKENS = 200_000
"""What a page shows at most in all: about 6 MB, which a browser opens at once."""
_MOST_OF_A_ROW = 20_000
_BINS = 32
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class Heading:
    """What stands at the top: a title, facts as (name, value), sentences."""

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Document:
    """A row's tokens as markup; `ids` of what is shown; `unshown` how many tokens are not."""

    row: RowView
    place: str
    html: Markup
    ids: str
    unshown: int


@dataclass(frozen=True)
class _Pack:
    number: int
    documents: tuple[_Document, ...]
    capacity: int | None
    tokens: int
    filled: float


@dataclass(frozen=True)
class _Bar:
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class _Side:
    name: str
    rows: int
    tokens: int
    share: float
    median: int
    first: int
    last: int
    bars: tuple[_Bar, ...]


@dataclass(frozen=True)
class _Page:
    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sides: tuple[_Side, ...]
    rows: tuple[_Document, ...]
    unshown_rows: int
    packs: tuple[_Pack, ...]
    unshown_packs: int
    weighted: bool


def page(dataset: Dataset, heading: Heading, rows: Sequence[RowView], packs: Sequence[PackView] = ()) -> str:
    """The page, as HTML.

    Args:
        dataset: what the figures are of.
        heading: what it is.
        rows: those to show; as many as fit into `MOST_ROWS` and `MOST_TOKENS`.
        packs: those of an optimizer step, or none; as many as fit into half of `MOST_TOKENS`.
    """
    shown_packs = packs[: _fitting([pack.tokens for pack in packs], MOST_TOKENS // 2)]
    room = MOST_TOKENS - sum(pack.tokens for pack in shown_packs)
    shown_rows = rows[: min(MOST_ROWS, _fitting([min(row.tokens, _MOST_OF_A_ROW) for row in rows], room))]
    made = _Page(
        title=heading.title,
        facts=heading.facts,
        notes=heading.notes,
        sides=tuple(_side(dataset, name) for name in SIDES if len(dataset.split(name))),
        rows=tuple(_document(row) for row in shown_rows),
        unshown_rows=len(rows) - len(shown_rows),
        packs=tuple(_pack(pack) for pack in shown_packs),
        unshown_packs=len(packs) - len(shown_packs),
        weighted=any(row.lightly for row in (*shown_rows, *(one for pack in shown_packs for one in pack.documents))),
    )
    script = (_ASSETS / "data_show.js").read_text(encoding="utf-8")
    named = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{named}'; base-uri 'none'"
    style = (_ASSETS / "data_show.css").read_text(encoding="utf-8")
    ours = {"style": Markup(style), "script": Markup(script)}  # noqa: S704  files of the package
    return _template().render(page=made, policy=policy, **ours)


@lru_cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(_ASSETS)
    )
    return environment.get_template("data_show.html")


def _fitting(sizes: Sequence[int], room: int) -> int:
    """How many of them, from the first on, fit; one in any case."""
    return max(min(len(sizes), 1), int(np.searchsorted(np.cumsum(sizes), room, side="right")))


def _pack(pack: PackView) -> _Pack:
    documents = tuple(_document(document) for document in pack.documents)
    return _Pack(pack.number, documents, pack.capacity, pack.tokens, pack.filled)


def _document(row: RowView) -> _Document:
    pieces = [piece for piece in row.pieces if piece.start < _MOST_OF_A_ROW]
    turns: list[list[Piece]] = []
    for piece in pieces:
        if piece.starts or not turns:
            turns.append([])
        turns[-1].append(piece)
    html = "".join(f'<div class="turn">{_turn(turn)}</div>' for turn in turns)
    ids = [number for piece in pieces for number in piece.ids]
    made = Markup(html)  # noqa: S704  of pieces, each escaped
    return _Document(row, row.place, made, " ".join(map(str, ids)), row.tokens - len(ids))


def _turn(pieces: Sequence[Piece]) -> str:
    runs: list[str] = []
    for weight, run in groupby(pieces, lambda piece: piece.weight):
        inside = "".join(map(_piece, run))
        if weight == 0:
            runs.append(f'<span class="p">{inside}</span>')
        elif weight == 1:
            runs.append(f"<mark>{inside}</mark>")
        else:
            runs.append(f'<mark class="w" style="--w:{min(weight, 1):.3g}" data-w="{weight:.3g}">{inside}</mark>')
    return "".join(runs)


def _piece(piece: Piece) -> str:
    marks = ' class="s"' if piece.special else ""
    count = f' data-n="{len(piece.ids)}"' if len(piece.ids) > 1 else ""
    text = "".join(f"<u>{escape(g.text)}</u>" if g.mark else str(escape(g.text)) for g in piece.shown)
    return f"<i{marks}{count}>{text}</i>"


def _side(dataset: Dataset, name: Split) -> _Side:
    examples, split = dataset.split(name), dataset.report.splits[name]
    first, last, bars = _histogram(examples.lengths)
    return _Side(name, split.rows, split.tokens, split.labelled_share, split.median, first, last, bars)


def _histogram(lengths: NDArray[np.int32]) -> tuple[int, int, tuple[_Bar, ...]]:
    """Rows by length in a box of 100 by 30: from the shortest to the longest, whole tokens in every bin."""
    first, last = int(lengths.min()), int(lengths.max())
    step = max(1, -(-(last - first + 1) // _BINS))
    counts = np.bincount((lengths.astype(np.int64) - first) // step)
    width, tallest = 100 / max(len(counts), _BINS // 4), int(counts.max())
    bars: list[_Bar] = []
    for i, count in enumerate(counts.tolist()):
        if count:
            height = max(0.4, 29.5 * count / tallest)
            low, high = first + i * step, min(first + (i + 1) * step - 1, last)
            label = f"{count:,} rows of {low:,}" + (f" to {high:,} tokens" if high > low else " tokens")
            x, y = round(i * width, 2), round(30 - height, 2)
            bars.append(_Bar(x, y, round(width * 0.9, 2), round(height, 2), label))
    return first, last, tuple(bars)
