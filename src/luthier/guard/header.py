"""A safetensors file's header, checked here before the library is given the file.

    8 bytes      N, the header's length, little-endian
    N bytes      {"__metadata__": {text: text}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}, …} in UTF-8
    the rest     the tensors' bytes; offsets count from here

The format's own rules (safetensors, "Format"): N is at most 100 MB, no key stands twice, and the tensors cover the
rest of the file without holes or overlaps. To these come bounds: no product of a shape may overflow, and reading the
header takes no more memory than its bytes can account for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from luthier.errors import FileError
from luthier.guard.files import AGAIN, open_plain
from luthier.guard.wrong import Wrong, once

__all__ = ["BITS", "Header", "StoredTensor", "check_safetensors"]

BITS: Mapping[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""The format's dtypes -> bits of an element."""

LONGEST_HEADER = 100_000_000
MOST_TENSORS = 250_000
"""More than any model has in one file, by far."""
MOST_DIMENSIONS = 16
_LARGEST = 2**63 - 1
_LONGEST_WIDE = 2**24
"""Bytes of a header with other letters than ASCII's: Python holds each letter of such a text in up to four bytes."""
_KEYS = {"dtype", "shape", "data_offsets"}


class StoredTensor(NamedTuple):
    """Where one tensor lies: `start` and `stop` are in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a checked file holds, in the order in which the header names it."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def check_safetensors(path: Path) -> Header:
    """The header of the safetensors file at `path`, every statement of it checked against the file.

    Raises:
        FileError: the file cannot be read, or is not a whole and well-formed safetensors file.
    """
    try:
        with open_plain(path) as (file, size):
            raw, start = _header_bytes(file.read(8), size), 8
            header = file.read(raw)
            if len(header) != raw:
                raise Wrong("became shorter while it was read")
        return _checked(_parsed(header), start + raw, size)
    except Wrong as wrong:
        raise FileError(path, f"cannot be read as a safetensors file: it {wrong}", AGAIN) from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}", "Look at the disk it is on.") from error


def _header_bytes(first: bytes, size: int) -> int:
    if len(first) < 8:
        raise Wrong(f"has {size} bytes, fewer than the length of a header takes")
    length = int.from_bytes(first, "little")
    if length > size - 8:
        raise Wrong(f"claims a header of {length:,} bytes and has {size:,}")
    if length > LONGEST_HEADER:
        raise Wrong(f"claims a header of {length:,} bytes; the format allows {LONGEST_HEADER:,}")
    return length


def _parsed(header: bytes) -> dict[str, object]:
    """The header's JSON object, no key of it twice."""
    if header[:1] != b"{":
        raise Wrong("has a header that does not begin with {")
    # What a text can become in memory is known from its signs: each object, list or number needs one of these.
    if header.count(b"{") > MOST_TENSORS + 2 or header.count(b"[") > 2 * MOST_TENSORS + 2:
        raise Wrong(f"names more than {MOST_TENSORS:,} tensors")
    if header.count(b",") > 2 * MOST_DIMENSIONS * MOST_TENSORS:
        raise Wrong("has a header with more entries than tensors need")
    if len(header) > _LONGEST_WIDE and not header.isascii():
        raise Wrong(f"has a header of {len(header):,} bytes that is not in ASCII")
    try:
        found = json.loads(header.decode(), object_pairs_hook=once, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Wrong("has a header that is not in UTF-8") from None
    except RecursionError:
        raise Wrong("has a header that is nested too deeply") from None
    except ValueError as error:  # json's own, and Python's for a number of thousands of digits
        raise Wrong(f"has a header that is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Wrong("has a header that is not one JSON object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise Wrong(f"has {name} in its header, which is not JSON")


def _checked(found: dict[str, object], start: int, size: int) -> Header:
    metadata = _metadata(found.pop("__metadata__", {}))
    tensors: dict[str, StoredTensor] = {}
    for name, entry in found.items():
        try:
            tensors[name] = _tensor(entry, start, size)
        except Wrong as wrong:
            raise Wrong(f"says of {name[:200]!r} what cannot be: {wrong}") from None
        if not name.isascii() and _has_lone_surrogate(name):
            raise Wrong(f"has a tensor whose name is no text: {name[:200]!r}")
    reached = start
    for begin, end, name in sorted((tensor.start, tensor.stop, name) for name, tensor in tensors.items()):
        if begin != reached:
            what = "shares bytes with the tensor before it" if begin < reached else "leaves a hole before it"
            raise Wrong(f"has a tensor {name[:200]!r} that {what} (at byte {begin:,}, not {reached:,})")
        reached = end
    if reached != size:
        raise Wrong(f"has {size:,} bytes, its tensors end at {reached:,}")
    return Header(tensors, metadata)


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise Wrong("has a __metadata__ that is not an object of texts")
    return found


def _has_lone_surrogate(name: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def _tensor(entry: object, start: int, size: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise Wrong("it must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise Wrong(f"there is no dtype {str(dtype)[:50]!r}")
    if not _wholes(shape) or len(shape) > MOST_DIMENSIONS:
        raise Wrong(f"a shape is a list of up to {MOST_DIMENSIONS} whole numbers from 0")
    if not _wholes(offsets) or len(offsets) != 2:
        raise Wrong("data_offsets are two whole numbers from 0")
    begin, end = offsets
    if begin > end or end > size - start:
        raise Wrong(f"bytes {begin:,} to {end:,} of {size - start:,}")
    elements, unit = 1, 1  # `unit` leaves zeros out: a library that multiplies in another order must not overflow
    for length in shape:
        elements *= length
        unit *= length or 1
        if unit * bits > _LARGEST:
            raise Wrong("the product of its shape is too large for any file")
    if elements * bits != 8 * (end - begin):
        raise Wrong(f"{dtype} of shape {shape} needs {elements * bits / 8:,.15g} bytes, it has {end - begin:,}")
    return StoredTensor(dtype, tuple(shape), start + begin, start + end)


def _wholes(found: object) -> bool:
    """Whether it is a list of whole numbers from 0; true and false are none."""
    if type(found) is not list:
        return False
    for one in found:  # noqa: SIM110  (all() of a generator takes twice as long)
        if type(one) is not int or one < 0:
            return False
    return True
