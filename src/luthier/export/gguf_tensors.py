"""A model's tensors on their way into GGUF: which file they are in, what they become, and their bytes, a few at a time.

    shard on disk -> rows of at most 32 MiB in fp32 -> llama.cpp's row order -> the type asked for -> the GGUF file

So memory is bounded by those rows, whatever the tensor. Matrices get the type asked for, norms and biases are F32.

llama.cpp's `llama` rotates pairs (2i, 2i+1) where transformers rotates (i, i + d/2), so the rows of q and k are put
into its order:  new row 2i + s of a head = old row i + s d/2. Its `qwen2` and `qwen3` rotate as transformers does.

Q4_0 and Q5_0 leave the matrix that makes the logits (the head; the embedding, where it is tied to it) in Q8_0, as
llama.cpp leaves it in Q6_K: its error goes into the logits undamped. A row that is no multiple of a block stays F16.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.errors import ExportError
from luthier.export.gguf_types import K_QUANTS, Quantize
from luthier.guard.header import StoredTensor, check_safetensors
from luthier.model.config import ModelConfig

__all__ = ["ARCHITECTURES", "BLOCK", "SUPER_BLOCK", "Planned", "TensorBytes", "final_size", "plan_tensors"]

Kind: TypeAlias = gguf.GGMLQuantizationType

ARCHITECTURES: Mapping[str, gguf.MODEL_ARCH] = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""Family -> llama.cpp's graph."""

BLOCK = 32
"""Values that share one scale in Q8_0, Q5_0 and Q4_0."""

SUPER_BLOCK = 256
"""Values of a K-quant's super-block."""

FP16_MAX = 65504.0
ROWS_BYTES = 2**25
"""Of the rows that are in memory at once, in fp32; a row or a head that is longer counts alone."""

STORED: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""safetensors' name -> torch's, of the weights that are read."""

KINDS: Mapping[Quantize, Kind] = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "bf16": Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q5_0": Kind.Q5_0,
    "q4_0": Kind.Q4_0,
}
K_KINDS: Mapping[Quantize, tuple[Kind, Kind]] = {
    # what most matrices become, and at most those that llama.cpp holds to be more delicate
    "q6_k": (Kind.Q6_K, Kind.Q6_K),
    "q5_k_m": (Kind.Q5_K, Kind.Q6_K),
    "q4_k_m": (Kind.Q4_K, Kind.Q6_K),
}
DELICATE = ("attn_v.weight", "ffn_down.weight")
FALLBACK: Mapping[Kind, Kind] = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""What llama.cpp takes where a row is no multiple of 256."""


@dataclass(frozen=True)
class Planned:
    """One tensor to write: where it is, and its name and type in GGUF. `output`: it makes the logits."""

    file: Path
    source: str
    stored: StoredTensor
    name: str
    kind: Kind
    heads: int | None = None  # q and k of the llama graph: how many heads the rows are reordered in
    output: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape


def plan_tensors(config: ModelConfig, files: tuple[Path, ...], quantize: Quantize) -> list[Planned]:
    """What becomes of each tensor of `files`. For a K-quant: of the 16-bit file that it is made from.

    Raises ExportError for a tensor that GGUF has no place for, or of a dtype that is not read.
    """
    architecture = ARCHITECTURES[config.family]
    names = gguf.get_tensor_name_map(architecture, config.layers)
    reorder = architecture is gguf.MODEL_ARCH.LLAMA
    headers = {file: check_safetensors(file).tensors for file in files}
    dtypes = {stored.dtype for tensors in headers.values() for stored in tensors.values()}
    written = intermediate_of(dtypes) if quantize in K_QUANTS else quantize
    planned: list[Planned] = []
    for file, tensors in headers.items():
        for source, stored in tensors.items():
            if source.endswith("rotary_emb.inv_freq") or (config.tied and source == "lm_head.weight"):
                continue
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ExportError(f"{source} in {file.name} has no place in GGUF", "Merge the model again.")
            if stored.dtype not in STORED:
                what = f"{source} in {file.name} is {stored.dtype}; read are {', '.join(STORED)}"
                raise ExportError(what, "Merge the model again.")
            part = source.split(".")[-2]
            heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(part) if reorder else None
            output = name == ("token_embd.weight" if config.tied else "output.weight")
            planned.append(Planned(file, source, stored, name, kind_of(stored.shape, written, output), heads, output))
    # By layer, not by name (1, 10, 11, 2): in parts llama.cpp's quantiser counts layers as they stand in the files.
    return sorted(planned, key=_layer)


def _layer(tensor: Planned) -> int:
    """The number of the tensor's layer; the embedding stands before the first."""
    parts = tensor.name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def intermediate_of(dtypes: Collection[str]) -> Quantize:
    """The type that holds weights stored as `dtypes` exactly, for llama.cpp's quantiser to read."""
    if set(dtypes) <= {"F16"}:
        return "f16"
    return "bf16" if set(dtypes) <= {"BF16"} else "f32"


def kind_of(shape: tuple[int, ...], quantize: Quantize, output: bool) -> Kind:
    """What a tensor of this shape becomes; `output`: whether it makes the logits."""
    if len(shape) == 1:
        return Kind.F32
    kind = KINDS[quantize]
    if kind in (Kind.Q4_0, Kind.Q5_0) and output:
        kind = Kind.Q8_0
    return kind if _fits(shape, kind) else Kind.F16


def _fits(shape: tuple[int, ...], kind: Kind) -> bool:
    return shape[-1] % int(gguf.GGML_QUANT_SIZES[kind][0]) == 0


def size_of(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor in GGUF."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def final_size(tensor: Planned, quantize: Quantize) -> int:
    """Bytes that the tensor takes in the end; for a K-quant at most, since llama.cpp itself chooses for each layer."""
    if quantize not in K_QUANTS or len(tensor.shape) == 1:
        return size_of(tensor.shape, tensor.kind)
    usual, most = K_KINDS[quantize]
    kind = most if tensor.output or tensor.name.endswith(DELICATE) else usual
    if not _fits(tensor.shape, kind):
        kind = FALLBACK[kind]
    return size_of(tensor.shape, kind if _fits(tensor.shape, kind) else Kind.F16)


class TensorBytes:
    """A planned tensor as the library's writer takes one: `nbytes`, and `tofile`, which reads and converts on the way.

    The writer asks an array for no more than these two where it writes one (gguf.lazy's arrays are such another).
    """

    def __init__(self, tensor: Planned) -> None:
        self.tensor = tensor
        self.nbytes = size_of(tensor.shape, tensor.kind)

    def tofile(self, file: BinaryIO) -> None:
        """Write the converted tensor. Raises ExportError for values that the type cannot hold, OSError for no room."""
        for rows in _rows(self.tensor):
            file.write(_converted(self.tensor, rows).data)


def _rows(tensor: Planned) -> Iterator[Tensor]:
    """The tensor's rows in order, [rows, …] in fp32, a whole number of heads at a time where they are reordered."""
    stored, dtype = tensor.stored, STORED[tensor.stored.dtype]
    shape = stored.shape if len(stored.shape) > 1 else (1, *stored.shape)
    if tensor.heads is not None and len(stored.shape) == 1:
        shape = (*stored.shape, 1)  # a bias has one value in each row
    row = math.prod(shape[1:])
    unit = shape[0] // tensor.heads if tensor.heads is not None else 1
    step = max(ROWS_BYTES // (4 * row) // unit, 1) * unit
    with tensor.file.open("rb") as file:
        file.seek(stored.start)
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            wanted = bytearray(count * row * dtype.itemsize)
            if file.readinto(wanted) != len(wanted):
                raise ExportError(f"{tensor.file} ended while it was read", "Merge the model again.")
            values = torch.frombuffer(wanted, dtype=dtype).reshape(count, *shape[1:]).to(torch.float32)
            if tensor.heads is not None:
                values = values.reshape(count // unit, 2, unit // 2, *shape[1:]).transpose(1, 2).reshape(values.shape)
            yield values


def _converted(tensor: Planned, values: Tensor) -> NDArray[np.generic]:
    kind = tensor.kind
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not math.isfinite(largest):
        raise ExportError(f"{tensor.source} holds values that are not finite", "train again with a lower rate")
    if kind == Kind.F32:
        return np.ascontiguousarray(values.numpy())
    if kind == Kind.F16:
        if largest > FP16_MAX:
            reason = f"{tensor.source} holds {largest:g}, and fp16 ends at {FP16_MAX:g}"
            raise ExportError(reason, "export with --quantize bf16")
        return np.ascontiguousarray(values.to(torch.float16).numpy())
    if kind == Kind.BF16:
        return np.ascontiguousarray(values.to(torch.bfloat16).view(torch.int16).numpy())
    quantised: NDArray[np.uint8] = gguf.quants.quantize(np.ascontiguousarray(values.numpy()), kind)
    return quantised
