"""Tensors into a safetensors file, one after another, each from where it lies in memory.

The library's `save` makes two copies of all of it first, and `save_file` turns a full disk into an error of its own
without saying that it is one. The bytes here are the library's (a test compares them): 8 bytes with the header's
length, the header in JSON, filled up with spaces to a multiple of 8, then the tensors, wider dtypes first and by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import orjson
import torch

from luthier.runs import open_new

__all__ = ["Slot", "write_streamed", "write_tensors"]

_NAMES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.uint8: "U8",
    torch.int8: "I8",
}
_RANK = ("U8", "I8", "F16", "BF16", "I32", "U32", "F32", "F64", "I64")
"""Narrow to wide, and among equals as the library sorts them."""


class Slot(NamedTuple):
    """What a tensor that is still to be made will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write CPU tensors to the file at `path` and flush it to disk. Raises OSError where there is no room.

    The bytes are little-endian, as those of every machine that torch runs on.
    """
    slots = {name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_streamed(path, slots, tensors.__getitem__, metadata)


def write_streamed(
    path: Path,
    slots: Mapping[str, Slot],
    make: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The same of tensors that `make` gives by name, one at a time, each dropped before the next is asked for.

    Raises ValueError where one is not what its slot says, and what `make` raises.
    """
    order = sorted(slots, key=lambda name: (-_RANK.index(_NAMES[slots[name].dtype]), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = slots[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    packed = orjson.dumps(header)
    packed += b" " * (-len(packed) % 8)
    with open_new(path) as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for name in order:
            tensor = make(name)
            if (tensor.dtype, tuple(tensor.shape)) != slots[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, its slot {slots[name]}")
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        file.flush()
        os.fsync(file.fileno())
