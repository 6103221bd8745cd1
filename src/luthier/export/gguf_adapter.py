"""The adapter as a GGUF file, which llama.cpp and Ollama put on the base without merging (`--lora`, `ADAPTER`).

    <the base's tensor>.lora_a (r, I), .lora_b (O, r) in F32      adapter.lora.alpha: llama.cpp multiplies by alpha / r

Its `llama` rotates pairs (2i, 2i+1), so the rows of B of q and k are put into that order, as those of the weights
(gguf.py).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import gguf

from luthier.export.factors import read_factors
from luthier.export.gguf_tensors import ARCHITECTURES
from luthier.model.config import read_config

__all__ = ["write_gguf_adapter"]


def write_gguf_adapter(base: Path, adapter: Path, path: Path, name: str = "") -> int:
    """Write the PEFT adapter in `adapter`, trained on the model in `base`, to `path`, atomically; how many tensors.

    Raises ExportError where the two do not belong together, listing every tensor.
    """
    config = read_config(base)
    factors = read_factors(adapter, base)
    architecture = ARCHITECTURES[config.family]
    names = gguf.get_tensor_name_map(architecture, config.layers)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)  # the library would write through a link
    writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name or path.stem)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # alpha / rank is its only scale; whatever ours is made of, this gives s.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, factors.spec.scaling * factors.spec.rank)
        for stem, pair in factors.pairs.items():
            place = names.get_name(stem)
            assert place is not None, f"{stem} has a place in every architecture here"  # noqa: S101
            down, up = pair.A.float().numpy(), pair.B.float().numpy()
            heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(stem.rsplit(".", 1)[-1])
            if heads is not None and architecture is gguf.MODEL_ARCH.LLAMA:
                up = up.reshape(heads, 2, -1, up.shape[1]).swapaxes(1, 2).reshape(up.shape)
            writer.add_tensor(f"{place}.weight.lora_a", down)
            writer.add_tensor(f"{place}.weight.lora_b", up)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
        for file in writer.fout or ():
            # numpy's tofile says nothing where its last few KiB find no room.
            if os.fstat(file.fileno()).st_size < file.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        writer.close()
        beside.replace(path)
    finally:
        writer.close()
        beside.unlink(missing_ok=True)
    return 2 * len(factors.pairs)
