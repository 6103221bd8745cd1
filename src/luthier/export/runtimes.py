"""Kind of export -> the program that it is verified with. A new one: one file like runtime_llama_cpp.py, one line here.

What a runtime imports it imports when it is opened: one that is not installed costs nobody anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from luthier.export.ollama import BASE_NAME
from luthier.export.runtime import RuntimeKind
from luthier.export.runtime_llama_cpp import gguf_files, open_llama_cpp, open_llama_cpp_adapter
from luthier.export.runtime_mlx import open_mlx, open_mlx_adapter
from luthier.export.runtime_transformers import folders, open_transformers

__all__ = ["RUNTIMES"]


def _named(name: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [folder / name] if (folder / name).is_file() else []


_LLAMA_CPP = ("llama_cpp", "llama-cpp-python", "pip install 'luthier[llama-cpp]'")
_MLX = ("mlx_lm", "mlx-lm", "pip install 'luthier[mlx]'")

RUNTIMES: Mapping[str, RuntimeKind] = {
    "hf": RuntimeKind("transformers", "transformers", "pip install transformers", folders, open_transformers),
    "gguf": RuntimeKind(*_LLAMA_CPP, gguf_files, open_llama_cpp),
    "ollama": RuntimeKind(*_LLAMA_CPP, gguf_files, open_llama_cpp),
    "ollama-adapter": RuntimeKind(*_LLAMA_CPP, _named(BASE_NAME), open_llama_cpp_adapter),
    "mlx": RuntimeKind(*_MLX, folders, open_mlx),
    "mlx-adapter": RuntimeKind(*_MLX, _named("adapter_config.json"), open_mlx_adapter),
}
