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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from luthier.data.conversation import IGNORED, Ids
from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import DataError

__all__ = ["Encoded", "Marked", "encode_marked"]


@dataclass(frozen=True, slots=True)
class Marked:
    """A rendered text. `spans` are the trained parts as [start, end) in characters, each ending with a control token.

    `mark` is what breaks control tokens inside contents ("" where there are none, see tokenizer.py).
    """

    text: str
    mark: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Ids and labels of one row (int32, not shifted), and whether a token had to be parted at a prompt's end."""

    ids: Ids
    labels: Ids
    parted: bool


@dataclass(frozen=True, slots=True)
class _Head:
    """What comes before a span: how many control tokens, and the text since the last of them (included)."""

    controls: int
    text: str


def encode_marked(rows: Sequence[Marked], tokenizer: ChatTokenizer) -> list[Encoded]:
    """Encode rendered rows; those without control tokens in their contents in one batch.

    Raises:
        DataError: the tokenizer makes a control token out of plain text, so nothing can be promised about its masks.
    """
    plain = [i for i, row in enumerate(rows) if not row.mark]
    whole: dict[int, list[int]] = dict(zip(plain, tokenizer.encode_batch([rows[i].text for i in plain]), strict=True))
    found = [[(at.start(), at.end()) for at in tokenizer.control_pattern.finditer(row.text)] for row in rows]
    heads = [[_head(row, controls, start) for start, _ in row.spans] for row, controls in zip(rows, found, strict=True)]
    texts = list(dict.fromkeys(head.text for i in plain for head in heads[i]))
    known = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    encoded: list[Encoded] = []
    for i, row in enumerate(rows):
        ids = whole[i] if not row.mark else tokenizer.encode_guarded(row.text, row.mark)
        head_ids = known if not row.mark else {h.text: tokenizer.encode_guarded(h.text, row.mark) for h in heads[i]}
        encoded.append(_label(_Row(row, found[i], heads[i], head_ids), ids, tokenizer))
    return encoded


@dataclass(frozen=True, slots=True)
class _Row:
    marked: Marked
    controls: Sequence[tuple[int, int]]
    heads: Sequence[_Head]
    head_ids: Mapping[str, list[int]]


def _head(row: Marked, controls: Sequence[tuple[int, int]], start: int) -> _Head:
    before = sum(1 for _, end in controls if end <= start)
    return _Head(before, row.text[controls[before - 1][0] if before else 0 : start])


def _label(row: _Row, ids: list[int], tokenizer: ChatTokenizer) -> Encoded:
    parted = False
    at = _control_places(ids, row, tokenizer)
    for i in reversed(range(len(row.heads))):  # from the last, so that earlier places stay where they are
        head = row.heads[i]
        head_ids = row.head_ids[head.text]
        base = at[head.controls - 1] if head.controls else 0
        if ids[base : base + len(head_ids)] != head_ids:
            start = row.marked.spans[i][0]
            ids = ids[:base] + head_ids + _tail(row, head, start, tokenizer) + ids[at[head.controls] :]
            parted = True
    at = _control_places(ids, row, tokenizer) if parted else at
    array = np.array(ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for head, (_, end) in zip(row.heads, row.marked.spans, strict=True):
        first = (at[head.controls - 1] if head.controls else 0) + len(row.head_ids[head.text])
        last = at[sum(1 for _, stop in row.controls if stop <= end) - 1]
        labels[first : last + 1] = array[first : last + 1]
    return Encoded(array, labels, parted)


def _control_places(ids: Sequence[int], row: _Row, tokenizer: ChatTokenizer) -> list[int]:
    numbers = tokenizer.control_ids
    at = [place for place, number in enumerate(ids) if number in numbers]
    if len(at) != len(row.controls):
        raise DataError(
            f"the tokenizer finds {len(at)} control tokens where the template wrote {len(row.controls)}",
            "its special tokens can be made from plain text; use another model's tokenizer, or take this row out",
        )
    return at


def _tail(row: _Row, head: _Head, start: int, tokenizer: ChatTokenizer) -> list[int]:
    """Ids of the text from a span's start to the next control token, encoded apart from what is before.

    It is encoded after a control token, as in the whole text: some tokenizers put a space before a text's first word.
    """
    text = row.marked.text[start : row.controls[head.controls][0]]
    if not text:
        return []
    if not head.controls:
        return tokenizer.encode_guarded(text, row.marked.mark)
    first, last = row.controls[head.controls - 1]
    return tokenizer.encode_guarded(row.marked.text[first:last] + text, row.marked.mark)[1:]
