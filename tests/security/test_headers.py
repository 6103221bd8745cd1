"""A safetensors header that claims what cannot be is refused before any library is given the file."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from luthier.errors import FileError
from luthier.guard.header import BITS, check_safetensors
from tests.security.conftest import Refused

FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, header: object, body: int, *, length: int | None = None, raw: bytes | None = None) -> Path:
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(body))
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


CLAIMS: dict[str, tuple[object, int, str]] = {
    "overlap": ({"a": FOUR, "b": entry(offsets=[2, 6])}, 6, "'b' that shares bytes with the tensor before it"),
    "the same bytes twice": ({"a": FOUR, "b": FOUR}, 4, "shares bytes with the tensor before it"),
    "hole": ({"a": FOUR, "b": entry(offsets=[5, 9])}, 9, "'b' that leaves a hole before it"),
    "hole at the start": ({"a": entry(offsets=[4, 8])}, 8, "leaves a hole before it"),
    "bytes of nobody": ({"a": FOUR}, 9, "its tensors end at"),
    "beyond the end": ({"a": entry(shape=[2], offsets=[0, 8])}, 4, "bytes 0 to 8 of 4"),
    "end before begin": ({"a": entry(offsets=[4, 0])}, 4, "bytes 4 to 0"),
    "negative offset": ({"a": entry(offsets=[-4, 0])}, 4, "data_offsets are two whole numbers from 0"),
    "one offset": ({"a": entry(offsets=[0])}, 4, "data_offsets are two whole numbers from 0"),
    "product overflows": ({"a": entry(shape=[2**32, 2**32])}, 4, "the product of its shape is too large"),
    "product overflows past a zero": ({"a": entry(shape=[2**62, 8, 0], offsets=[0, 0])}, 0, "is too large for any"),
    "too few bytes": ({"a": entry(shape=[2])}, 4, "needs 8 bytes, it has 4"),
    "half a byte": ({"a": entry("F4", [3], [0, 1])}, 1, "needs 1.5 bytes, it has 1"),
    "unknown dtype": ({"a": entry("PICKLE")}, 4, "there is no dtype 'PICKLE'"),
    "dtype of no text": ({"a": entry(["F32"])}, 4, "there is no dtype"),
    "negative length": ({"a": entry(shape=[-1])}, 4, "a shape is a list of up to"),
    "true for a length": ({"a": entry(shape=[True])}, 4, "a shape is a list of up to"),
    "a fraction": ({"a": entry(shape=[1.0])}, 4, "a shape is a list of up to"),
    "seventeen dimensions": ({"a": entry(shape=[1] * 17)}, 4, "a shape is a list of up to"),
    "one key too many": ({"a": {**FOUR, "strides": [1]}}, 4, "dtype, shape and data_offsets and nothing else"),
    "one key too few": ({"a": {"dtype": "F32"}}, 4, "dtype, shape and data_offsets and nothing else"),
    "no object": ({"a": 3}, 4, "dtype, shape and data_offsets and nothing else"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": FOUR}, 4, "a __metadata__ that is not an object of texts"),
    "a name that is no text": ({"\ud800": FOUR}, 4, "a tensor whose name is no text"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_that_cannot_be(tmp_path: Path, claim: str) -> None:
    header, body, said = CLAIMS[claim]
    path = write(tmp_path / "x.safetensors", header, body)
    with pytest.raises(FileError) as caught:
        check_safetensors(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.remedy is not None
    assert "again" in caught.value.remedy


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[]", "does not begin with {"),
        (b'{"a":', "a header that is not JSON"),
        (b'{"a":"\xff"}', "not in UTF-8"),
        (b'{"a":' + json.dumps(FOUR).encode() + b',"a":' + json.dumps(FOUR).encode() + b"}", "names 'a' twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', "names 'dtype' twice"),
        (b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a":NaN}', "NaN in its header"),
        (b'{"a":' + b"[" * 600_000 + b"}", "more than 250,000 tensors"),
    ],
)
def test_headers_that_are_no_plain_json(tmp_path: Path, raw: bytes, said: str) -> None:
    with pytest.raises(FileError, match=said):
        check_safetensors(write(tmp_path / "x.safetensors", None, 4, raw=raw))


@pytest.mark.parametrize(("length", "said"), [(2**60, "1,152,921,504,606,846,976 bytes"), (2**64 - 1, "a header of")])
def test_a_header_of_more_bytes_than_there_are(refused: Refused, model: Path, length: int, said: str) -> None:
    write(model / "model.safetensors", {"a": FOUR}, 4, length=length)
    refused(("train", "recipe.yaml"), "model.safetensors cannot be read as a safetensors file", said, "Fetch it again")


def test_a_header_larger_than_the_format_allows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os_size = 100_000_100
    with path.open("r+b") as file:
        file.truncate(os_size)  # a file with a hole in it: no disk is needed
    with pytest.raises(FileError, match="the format allows 100,000,000"):
        check_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8])
def test_files_too_short_to_be_any(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FileError, match="cannot be read as a safetensors file"):
        check_safetensors(tmp_path / "x.safetensors")


def test_what_the_library_writes_passes(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "naïve 你好": torch.zeros(3, 5, dtype=torch.bfloat16),
        "bytes": torch.zeros(7, dtype=torch.uint8),
        "wide": torch.zeros(2, dtype=torch.int64),
        "eight": torch.zeros(5, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "a\nb"})
    header = check_safetensors(tmp_path / "x.safetensors")
    assert {name: stored.shape for name, stored in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == {"format": "pt", "note": "a\nb"}
    whole = (tmp_path / "x.safetensors").read_bytes()
    scalar = header.tensors["scalar"]
    assert struct.unpack("<f", whole[scalar.start : scalar.stop]) == (3.0,)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_the_format(tmp_path: Path, dtype: str) -> None:
    from safetensors import safe_open

    path = write(tmp_path / "x.safetensors", {"a": entry(dtype, [8], [0, BITS[dtype]])}, BITS[dtype])
    assert check_safetensors(path).tensors["a"].shape == (8,)
    with safe_open(path, framework="np") as library:  # the library has the same sizes
        assert list(library.keys()) == ["a"]


def test_ten_thousand_tensors_take_no_time(tmp_path: Path) -> None:
    header = {
        f"model.layers.{n}.mlp.down_proj.weight": entry("F16", [2, 4], [16 * n, 16 * n + 16]) for n in range(10_000)
    }
    path = write(tmp_path / "x.safetensors", header, 160_000)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        check_safetensors(path)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.1  # 0.03 on a core of 2020; the bound is for slower ones
