"""Rows that say the same, or nearly: found in time linear in the rows, in memory of a few bytes a row.

    words      runs of letters and digits, ASCII case folded; a CJK character is a word
    shingles   the 16 bytes from the start of every word, about three words of English
    signature  MinHash of the set of shingles, 64 permutations (Broder 1997; rensa's R-MinHash), of each the low 16 bits
               (Li and König 2010, b-bit minwise hashing: two that differ agree in them once in 65,536)
    candidates rows whose signatures agree in one of 16 bands of 4 (Leskovec et al., Mining of Massive
               Datasets, sec. 3.4)
    near       candidates whose signatures agree in a share of at least `NEAR` of the 64: an estimate of the Jaccard
               similarity of their shingles, with a standard error of 0.05 at 0.8
    group      what is connected by near

Two texts of similarity 0.8 are candidates with probability 0.9998, of 0.5 with 0.64. Candidates are found by sorting
each band and looking at neighbours, not by a table of buckets, so a million rows take 8 MB a band.

What is said counts: system turns do not, and neither do role or template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from luthier.data.conversation import Conversation

__all__ = ["FORM", "NEAR", "PERMUTATIONS", "Groups", "find_groups", "signatures", "spoken"]

PERMUTATIONS = 64
NEAR = 0.8
"""Estimated Jaccard similarity from which two rows are near duplicates."""

FORM = 20
"""A group of more different texts than this is a form with blanks (a fixed instruction around short inputs), not one
text in variants: its rows are near in wording and each its own in content, so they are not kept together."""

_BANDS, _ROWS = 16, 4
_SEED = 42
_BLOCK = 65_536
"""Rows of signatures that are held at once: 8 MiB."""
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Every band of the signature of a text without a word: nothing is near it."""

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]
Signatures = NDArray[np.uint16]


def _translation() -> bytes:
    """Byte -> itself in a word (ASCII letters in lower case), 0 between words. UTF-8 beyond ASCII is in words."""
    kept = {byte: byte for byte in range(128) if chr(byte).isalnum()}
    kept |= {ord(letter): ord(letter.lower()) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    kept |= {byte: byte for byte in range(128, 256)}
    return bytes(kept.get(byte, 0) for byte in range(256))


_TABLE = _translation()
_KEEP_LOW: Hashes = np.array([(1 << 8 * count) - 1 for count in range(9)], dtype=np.uint64)
"""Entry n keeps the first n bytes of eight."""


def _mixed(hashes: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of the result depends on every bit."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _shingles(texts: Sequence[bytes]) -> tuple[Hashes, Indices]:
    """The hashes of all texts' shingles, and where each text's begin and end (one more entry than texts)."""
    # A zero after each text, and sixteen after the last, so that every shingle can be read as two whole numbers.
    byte = np.frombuffer(b"\0".join([*texts, bytes(2 * 8)]).translate(_TABLE), dtype=np.uint8)
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + 1)
    in_word = byte != 0
    kept = in_word.copy()
    kept[1:] |= in_word[:-1]  # of what is between words, one byte stays
    kept[-16:] = True
    byte, ends = byte[kept], np.cumsum(kept)[ends - 1]
    starts = byte != 0
    starts[1:] &= byte[:-1] == 0
    starts |= (byte >= 0xE3) & (byte <= 0xED)  # the first byte of a CJK character in UTF-8
    at = np.flatnonzero(starts)
    offsets = np.concatenate(([0], np.searchsorted(at, ends)))
    left = np.repeat(ends, np.diff(offsets)) - at
    eight = np.ndarray((len(byte) - 7,), dtype="<u8", buffer=byte.tobytes(), strides=(1,))
    first = eight[at] & _KEEP_LOW[np.minimum(left, 8)]
    second = eight[np.minimum(at + 8, len(eight) - 1)] & _KEEP_LOW[np.clip(left - 8, 0, 8)]
    return _mixed(_mixed(first) + second), offsets.astype(np.int64)


def signatures(texts: Sequence[str]) -> Signatures:
    """MinHash signatures, (texts, 64). A text without any word has the signature of the empty set."""
    hashes, offsets = _shingles([text.encode("utf-8", "surrogatepass") for text in texts])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), PERMUTATIONS, _SEED)
    return np.asarray(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), PERMUTATIONS).astype(np.uint16)


def spoken(conversation: Conversation) -> str:
    """What a row says: its turns but the system's, one after another."""
    return "\n".join([turn.content for turn in conversation.turns if turn.role != "system"])


@dataclass(frozen=True)
class Groups:
    """`group[i]` is the smallest row that row i is connected with, itself where it is alone.

    `exact` rows say word for word what an earlier one says; `near` rows are connected with an earlier one beyond that;
    `forms` counts the rows that were taken apart again because their group is a form, see `FORM`.
    """

    group: Indices
    exact: int
    near: int
    forms: int


def find_groups(content: Hashes, signature: Signatures) -> Groups:
    """Which rows say the same or nearly.

    Args:
        content: a hash of what each row says and how it is parted into turns; equal ones are the same row.
        signature: (rows, 64), of `signatures`, C order; may lie on disk, it is read in blocks.
    """
    _, first, inverse = np.unique(content, return_index=True, return_inverse=True)
    label = np.arange(len(first), dtype=np.int64)  # of each different row: the smallest it is connected with
    for band in range(_BANDS):
        _connect(label, *_near_pairs(first, signature, band))
    sizes = np.bincount(label, minlength=len(label))
    form = sizes[label] > FORM
    label[form] = np.flatnonzero(form)
    smallest = np.full(len(first), len(content), dtype=np.int64)
    np.minimum.at(smallest, label, first)
    return Groups(
        group=smallest[label[inverse]],
        exact=len(content) - len(first),
        near=len(first) - len(np.unique(label)),
        forms=int(np.count_nonzero(form)),
    )


def _near_pairs(first: Indices, signature: Signatures, band: int) -> tuple[Indices, Indices]:
    """Pairs of near texts among those whose signatures agree in this band, enough of them to connect all that are."""
    keys = signature.view(np.uint64)[first, band]  # four numbers of 16 bits are one of 64
    rows = np.flatnonzero(keys != _EMPTY)
    keys = keys[rows]
    order = np.argsort(keys, kind="stable")
    opens = np.concatenate(([True], keys[order[1:]] != keys[order[:-1]]))[: len(order)]
    bucket = np.flatnonzero(opens)[np.cumsum(opens) - 1]  # where the bucket of each begins
    after = np.flatnonzero(~opens)
    # Each with the one before it, and with the first of its bucket: two chances to find one that is near.
    left = rows[order[np.concatenate((after - 1, bucket[after]))]]
    right = rows[order[np.concatenate((after, after))]]
    near = np.zeros(len(left), dtype=np.bool_)
    for start in range(0, len(left), _BLOCK):
        at = slice(start, start + _BLOCK)
        agree = signature[first[left[at]]] == signature[first[right[at]]]
        near[at] = agree.mean(axis=1) >= NEAR
    return left[near], right[near]


def _connect(label: Indices, left: Indices, right: Indices) -> None:
    """Join what the pairs connect, in place: afterwards both of a pair have the same label, the smallest of all."""
    while True:
        one, other = label[left], label[right]
        if np.array_equal(one, other):
            return
        low = np.minimum(one, other)
        np.minimum.at(label, one, low)
        np.minimum.at(label, other, low)
        while not np.array_equal(label, further := label[label]):
            label[:] = further
