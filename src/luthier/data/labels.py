"""Text with trained spans to ids and labels, so that a prompt is the same tokens in training and in a chat.

The ids are those of the whole text. A trained span begins where the prompt before it ends, and the prompt is later
encoded alone; so the ids of the prompt alone must be how the ids of the whole begin. That is checked for every span:

    head      the text from the last control token before the span to the span
    whole     ids of the text; the control tokens in it are found, which gives where the head begins
    check     whole[base : base + len(ids(head))] == ids(head)

Only the head has to be encoded for it, since a control token parts what is before it from what comes after. Under
Llama 3's layout every head is the same few tokens. Where the check fails, a token reaches over the prompt's end
(`A: ` before `Paris`, where the space and the word are one token): there the text is encoded in two parts, as it will
be in a chat, and the row is counted in the report.

It goes in three steps, so that the middle one, nearly all of the work, can run in a thread of its own:

    Written       rows as text; where spans lie, counted in control tokens       Python, row by row
    tokenize      ids of all texts and heads                                     the tokenizers library
    label         places of the control tokens, checks, labels                   numpy, the whole chunk at once
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Ids
from luthier.data.tokenizer import ChatTokenizer, Guarded, Tokens

__all__ = ["EncodedChunk", "Marked", "RowFault", "Rules", "Tokenized", "Written", "label", "tokenize"]

_Numbers = NDArray[np.int64]
_Flags = NDArray[np.bool_]


class RowFault(NamedTuple):
    """Why a row cannot be written or labelled, and what to do about it."""

    reason: str
    remedy: str


class Marked(NamedTuple):
    """A rendered text. `spans` are the trained parts as [start, end) in characters, each ending with a control token.

    `mark` is what breaks control tokens inside contents ("" where there are none, see tokenizer.py).
    """

    text: str
    mark: str
    spans: Sequence[tuple[int, int]]


@dataclass(slots=True)
class _Spans:
    """The trained spans of a chunk, one entry a span, in the order of rows and of the text.

    `head` numbers the span's head; `before` counts the control tokens of the row's text before the span, `through`
    those before its end.
    """

    row: list[int] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    through: list[int] = field(default_factory=list)


class Written:
    """A chunk's rows as text. A row that could not be written has an empty text and a fault."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.texts: list[Guarded] = []
        self.controls: list[int] = []
        self.spans = _Spans()
        self.heads: dict[Guarded, int] = {}
        self.faults: dict[int, RowFault] = {}
        self._finditer = tokenizer.control_pattern.finditer

    def add(self, row: Marked) -> None:
        """Take the next row in."""
        text, mark, parts = row
        number = len(self.texts)
        found = list(self._finditer(text))
        ends = [control.end() for control in found]
        spans, heads = self.spans, self.heads
        for start, end in parts:
            before = bisect_right(ends, start)
            head = (text[found[before - 1].start() if before else 0 : start], mark)
            spans.row.append(number)
            spans.head.append(heads.setdefault(head, len(heads)))
            spans.before.append(before)
            spans.through.append(bisect_right(ends, end))
        self.texts.append((text, mark))
        self.controls.append(len(ends))

    def refuse(self, fault: RowFault) -> None:
        """Take the next row in as one that cannot be written."""
        self.faults[len(self.texts)] = fault
        self.texts.append(("", ""))
        self.controls.append(0)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A chunk with the tokens of its texts and heads."""

    written: Written
    texts: Sequence[Tokens]
    heads: Sequence[Tokens]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedChunk:
    """Ids and labels of a chunk's rows, one after another.

    Attributes:
        ids: of all rows that have no fault.
        labels: True where the token is trained; as long as `ids`.
        lengths: tokens of each row, 0 for one with a fault.
        answers: tokens of each row before its last answer, which is what the answer is prompted with; all of them where
            it has no answer that can be told from its prompt.
        parted: the rows in which a token had to be parted at a prompt's end.
        faults: the rows that could not be used, by their index in the chunk.
    """

    ids: Ids
    labels: _Flags
    lengths: _Numbers
    answers: _Numbers
    parted: _Flags
    faults: Mapping[int, RowFault]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a labelled row must keep: each span ends with one of `ends`; BOS (None: not looked at) stands once, or is
    absent where the tokenizer does not put it by itself. `everything`: all tokens are trained, not just the spans.
    """

    ends: Sequence[int]
    bos: int | None
    needs_bos: bool
    everything: bool = False


def tokenize(written: Written, tokenizer: ChatTokenizer) -> Tokenized:
    """The tokens of a written chunk: one call of the library, which holds no Python lock and uses all cores."""
    found = tokenizer.tokens([*written.texts, *written.heads])
    return Tokenized(written, found[: len(written.texts)], found[len(written.texts) :])


@dataclass(frozen=True, slots=True)
class _Flat:
    """Rows of ids laid end to end, and where the control tokens are: row i has those from `first[i]` on."""

    ids: Ids
    lengths: _Numbers
    offsets: _Numbers
    places: _Numbers
    first: _Numbers
    counts: _Numbers


def _flat(rows: Sequence[Sequence[int]], is_control: _Flags) -> _Flat:
    ids, lengths = _joined(rows)
    offsets = np.cumsum(lengths) - lengths
    places = np.flatnonzero(is_control[ids])
    first = np.searchsorted(places, offsets)
    counts = np.searchsorted(places, offsets + lengths) - first
    return _Flat(ids, lengths, offsets, places, first, counts)


def _joined(rows: Sequence[Sequence[int]]) -> tuple[Ids, _Numbers]:
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum())), lengths


def label(tokenized: Tokenized, tokenizer: ChatTokenizer, rules: Rules) -> EncodedChunk:
    """Ids and labels of a chunk, with the faults that only its tokens show."""
    written = tokenized.written
    rows = [tokens.ids for tokens in tokenized.texts]
    heads = [tokens.ids for tokens in tokenized.heads]
    spans = _SpanArrays(*(np.array(column, dtype=np.int64) for column in _columns(written.spans)))
    flat = _flat(rows, tokenizer.is_control)
    faults = dict(written.faults)
    _compare_controls(flat, written, faults)
    misfits = _misfits(flat, spans, heads)
    parted = np.zeros(len(rows), dtype=np.bool_)
    if misfits.any():
        parted[[row for row in spans.row[misfits] if row not in faults]] = True
        _part(
            np.flatnonzero(misfits & parted[spans.row]),
            _Chunk(rows, heads, list(written.heads), flat, written),
            tokenizer,
        )
        flat = _flat(rows, tokenizer.is_control)
        _compare_controls(flat, written, faults)
    usable = spans.take(~np.isin(spans.row, list(faults)))
    labels = _labels(flat, usable, heads, rules, faults)
    _count_bos(flat, rules, faults)
    return _without_faulty(flat, labels, _answers(flat, usable, heads), parted, faults)


class _SpanArrays(NamedTuple):
    """`_Spans` as arrays."""

    row: _Numbers
    head: _Numbers
    before: _Numbers
    through: _Numbers

    def take(self, which: _Flags) -> _SpanArrays:
        """Some of them."""
        return _SpanArrays(*(column[which] for column in self))

    def base(self, flat: _Flat) -> _Numbers:
        """Where each span's head begins: at a control token, or with the row."""
        base = flat.offsets[self.row]
        after = np.flatnonzero(self.before)
        base[after] = flat.places[flat.first[self.row[after]] + self.before[after] - 1]
        return base


def _columns(spans: _Spans) -> tuple[list[int], ...]:
    return spans.row, spans.head, spans.before, spans.through


def _compare_controls(flat: _Flat, written: Written, faults: dict[int, RowFault]) -> None:
    """Each row must have the control tokens that the template wrote, no more and no fewer."""
    for i in np.flatnonzero(flat.counts != np.array(written.controls, dtype=np.int64)).tolist():
        faults.setdefault(
            i,
            RowFault(
                f"the tokenizer finds {flat.counts[i]} control tokens where the template wrote {written.controls[i]}",
                "its special tokens can be made from plain text; use another model's tokenizer, or take this row out",
            ),
        )


def _misfits(flat: _Flat, spans: _SpanArrays, heads: Sequence[Sequence[int]]) -> _Flags:
    """The spans whose head's ids are not what stands before them in the whole. Nothing is said of faulty rows."""
    if not len(spans.row) or not len(flat.ids):
        return np.zeros(len(spans.row), dtype=np.bool_)
    head_ids, head_lengths = _joined(heads)
    head_starts = (np.cumsum(head_lengths) - head_lengths)[spans.head]
    lengths = head_lengths[spans.head]
    enough = spans.before <= flat.counts[spans.row]  # fewer control tokens than written: a faulty row
    base = np.zeros(len(spans.row), dtype=np.int64)
    base[enough] = spans.take(enough).base(flat)
    within = enough & (base + lengths <= (flat.offsets + flat.lengths)[spans.row])
    steps = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.minimum(np.repeat(base, lengths) + steps, len(flat.ids) - 1)
    differs = flat.ids[at] != head_ids[np.repeat(head_starts, lengths) + steps]
    wrong = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[differs], minlength=len(lengths))
    return (wrong > 0) | ~within


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What parting works on; `rows` is changed. `head_texts` and `heads` are the same, as text and as ids."""

    rows: list[list[int]]
    heads: Sequence[list[int]]
    head_texts: Sequence[Guarded]
    flat: _Flat
    written: Written


def _part(misfits: _Numbers, chunk: _Chunk, tokenizer: ChatTokenizer) -> None:
    """Put the head's ids, and the ids of what follows it encoded alone, where the whole's ids do not fit."""
    spans, flat = chunk.written.spans, chunk.flat
    tails: list[Guarded] = []
    dropped: list[int] = []
    for span in misfits.tolist():
        tail, lead = _tail(chunk, span, tokenizer)
        tails.append(tail)
        dropped.append(lead)
    encoded = tokenizer.tokens(tails)
    for k in reversed(range(len(tails))):  # from the last, so that earlier places stay where they are
        span = int(misfits[k])
        row, before = spans.row[span], spans.before[span]
        at = flat.places[flat.first[row] : flat.first[row] + flat.counts[row]] - flat.offsets[row]
        base = int(at[before - 1]) if before else 0
        ids, tail_ids = chunk.rows[row], encoded[k].ids[dropped[k] :]
        chunk.rows[row] = ids[:base] + chunk.heads[spans.head[span]] + tail_ids + ids[int(at[before]) :]


def _tail(chunk: _Chunk, span: int, tokenizer: ChatTokenizer) -> tuple[Guarded, int]:
    """The text from a span's start to the next control token, and how many ids at its beginning are not its own.

    It is encoded after a control token, as in the whole text: some tokenizers put a space before a text's first word.
    """
    spans = chunk.written.spans
    row, before = spans.row[span], spans.before[span]
    text, mark = chunk.written.texts[row]
    found = list(tokenizer.control_pattern.finditer(text))
    head, _ = chunk.head_texts[spans.head[span]]
    start = (found[before - 1].start() if before else 0) + len(head)
    tail = text[start : found[before].start()]
    if not tail or not before:
        return (tail, mark), 0
    return (found[before - 1][0] + tail, mark), 1


def _labels(
    flat: _Flat, spans: _SpanArrays, heads: Sequence[Sequence[int]], rules: Rules, faults: dict[int, RowFault]
) -> _Flags:
    """True from the end of each span's head through its last control token, which must be an end of turn."""
    if rules.everything:
        return np.ones(len(flat.ids), dtype=np.bool_)
    edges = np.zeros(len(flat.ids) + 1, dtype=np.int64)
    if len(spans.row):
        head_lengths = np.fromiter(map(len, heads), dtype=np.int64, count=len(heads))
        last = flat.places[flat.first[spans.row] + spans.through - 1]
        edges[spans.base(flat) + head_lengths[spans.head]] += 1
        edges[last + 1] -= 1
        unended = spans.row[~np.isin(flat.ids[last], rules.ends)]
        for row, count in zip(*np.unique(unended, return_counts=True), strict=True):
            faults[int(row)] = RowFault(
                f"{count} of the row's answers end without a trained end-of-turn token",
                "use another template; such a model would never stop",
            )
    return np.cumsum(edges[:-1]) > 0


def _answers(flat: _Flat, spans: _SpanArrays, heads: Sequence[Sequence[int]]) -> _Numbers:
    """Where the last span of each row begins, from the row's beginning."""
    found = flat.lengths.copy()
    if len(spans.row):
        head_lengths = np.fromiter(map(len, heads), dtype=np.int64, count=len(heads))
        starts = spans.base(flat) + head_lengths[spans.head] - flat.offsets[spans.row]
        found[spans.row] = 0
        np.maximum.at(found, spans.row, starts)
    return found


def _count_bos(flat: _Flat, rules: Rules, faults: dict[int, RowFault]) -> None:
    if rules.bos is None:
        return
    at = np.flatnonzero(flat.ids == rules.bos)
    rows = np.searchsorted(flat.offsets, at, side="right") - 1
    counts = np.bincount(rows, minlength=len(flat.lengths))
    for row in np.flatnonzero((counts > 1) | ((counts == 0) & rules.needs_bos)).tolist():
        faults.setdefault(
            row,
            RowFault(
                f"the template writes the beginning-of-text token {counts[row]} times",
                "it must stand once, at the beginning: correct the template or use another, such as alpaca; where it "
                "begins each question with one, make each question and its answer a row",
            ),
        )


def _without_faulty(
    flat: _Flat, labels: _Flags, answers: _Numbers, parted: _Flags, faults: dict[int, RowFault]
) -> EncodedChunk:
    if not faults:
        return EncodedChunk(flat.ids, labels, flat.lengths, answers, parted, faults)
    good = np.ones(len(flat.lengths), dtype=np.bool_)
    good[list(faults)] = False
    kept = np.repeat(good, flat.lengths)
    faults = dict(sorted(faults.items()))
    lengths, answers = np.where(good, flat.lengths, 0), np.where(good, answers, 0)
    return EncodedChunk(flat.ids[kept], labels[kept], lengths, answers, parted & good, faults)
