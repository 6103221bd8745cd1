"""Safetensors into a decoder, one tensor at a time.

The decoder is made on torch's meta device, where it costs nothing. Before anything is read, the headers of all shards
are compared with it, and every missing, unexpected or misshaped tensor is reported at once. Then each tensor is copied
(converted to the compute dtype, moved to the device, quantised) under a file mapping of its own. What is read of a
mapping counts as the process's memory until the mapping is dropped, so the peak is the weights and one tensor.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from luthier.errors import FileError, ModelError
from luthier.guard.header import check_safetensors
from luthier.model.config import read_config
from luthier.model.decoder import Decoder
from luthier.model.fp8 import FP8Linear, check_fp8
from luthier.model.locate import weight_files
from luthier.model.projection import Projection

__all__ = ["check_weights", "is_ignored", "linear_of", "load_decoder", "return_freed"]

FLOATS = ("F64", "F32", "F16", "BF16")
"""The safetensors dtypes that hold plain weights."""

SHOWN = 200
"""How many problems are listed; the rest is counted."""

HOLES = 2**28
"""Bytes quantised between two calls of `return_freed`: it takes milliseconds, and each page given back a fault."""


def load_decoder(
    folder: Path, *, dtype: torch.dtype, device: str = "cpu", quantize: Literal["none", "nf4", "fp8"] = "none"
) -> Decoder:
    """The model in `folder`, frozen and in eval mode, computing in `dtype` (float32, float16 or bfloat16).

    `quantize` holds the projections of the layers in 4 bits ("nf4") or 8 ("fp8", on cards with products in it);
    embedding, head and norms stay in `dtype`. Raises ModelError where the folder's files and its config do not agree,
    UsageError where `device` has no fp8.
    """
    config = read_config(folder)
    files = weight_files(folder)
    if quantize == "fp8":
        check_fp8(torch.device(device), dtype)
    with torch.device("meta"):
        decoder = Decoder(config, linear=linear_of(quantize))
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    _check(folder, files, shapes, config.tied)
    return_freed()
    with torch.inference_mode(False):
        freed = 0
        for file in files:
            for name in check_safetensors(file).tensors:
                if name not in shapes:
                    continue
                with safe_open(file, framework="pt") as shard:
                    _place(decoder, name, shard.get_tensor(name), dtype, torch.device(device))
                freed += math.prod(shapes[name]) * dtype.itemsize
                if quantize != "none" and freed > HOLES:
                    return_freed()
                    freed = 0
    if quantize != "none":
        return_freed()
    return decoder.eval()


def check_weights(folder: Path) -> Decoder:
    """The model in `folder` without its weights, on torch's meta device, once its files were held against its config.

    Only headers are read. Raises ModelError as `load_decoder` does.
    """
    config = read_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    _check(folder, weight_files(folder), shapes, config.tied)
    return decoder


def linear_of(quantize: Literal["none", "nf4", "fp8"]) -> type[Projection]:
    """What holds the frozen weights of the layers' projections."""
    if quantize == "nf4":  # bitsandbytes takes a second to import: only those who quantise pay
        from luthier.model.quantize import NF4Linear

        return NF4Linear
    return FP8Linear if quantize == "fp8" else Projection


def return_freed() -> None:
    """Have the C library give freed memory back to the system, where it has a word for that (glibc).

    Quantising leaves holes between what it keeps: half a gigabyte of them in a model of a billion parameters. Reading
    a vocabulary of 128,256 tokens leaves 140 MiB of them, most in the arenas of other threads, where no weight goes.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _place(decoder: Decoder, name: str, stored: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Copy one tensor into the decoder; `stored` is a view of the file's mapping and must not be kept."""
    tensor = stored.to(device=device, dtype=dtype, copy=True)
    owner_name, _, attribute = name.rpartition(".")
    owner = decoder.get_submodule(owner_name)
    if isinstance(owner, Projection):
        owner.assign(attribute, tensor)
    else:
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))


def is_ignored(name: str, tied: bool) -> bool:
    """Tensors that old checkpoints carry and nobody reads: rotary tables, and the copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _check(folder: Path, files: tuple[Path, ...], shapes: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    problems: list[str] = []
    seen: set[str] = set()
    for file in files:
        try:
            header = check_safetensors(file)
        except FileError as error:
            problems.append(f"{file.name} {error.reason}")
            continue
        for name, stored in header.tensors.items():
            if name in shapes:
                if name in seen:
                    problems.append(f"{name}: in {file.name}, and in another file too")
                seen.add(name)
                if stored.shape != shapes[name]:
                    problems.append(f"{name}: {stored.shape} in {file.name}, the config asks for {shapes[name]}")
                elif stored.dtype not in FLOATS:
                    problems.append(f"{name}: {stored.dtype} in {file.name}, which is not a plain weight")
            elif not is_ignored(name, tied):
                problems.append(f"{name}: {stored.shape} in {file.name} is not part of this model")
    problems += [f"{name}: {shape} is missing" for name, shape in shapes.items() if name not in seen]
    if problems:
        shown = problems[:SHOWN] + [f"and {len(problems) - SHOWN:,} more"] * (len(problems) > SHOWN)
        listed = "\n".join(f"  {problem}" for problem in shown)
        raise ModelError(
            f"the weights in {folder} do not fit its config.json, {len(problems)} problem(s):\n{listed}",
            "Fetch the model again; a folder that was edited by hand needs all of its files from one source.",
        )
