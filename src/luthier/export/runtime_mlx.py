"""A folder of an MLX export in mlx-lm: a model, or an adapter on the base that its config names.

On a Mac mlx computes on the GPU as it does for its users, on Linux on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Turn
from luthier.export.mlx_adapter import BASE
from luthier.export.runtime import Precision
from luthier.export.runtime_transformers import stored_as
from luthier.guard.documents import read_object

__all__ = ["MLXRuntime", "open_mlx", "open_mlx_adapter"]


class MLXRuntime:
    """mlx-lm on a folder; no code of the folder is run."""

    def __init__(self, folder: Path, adapter: Path | None, precision: Precision) -> None:
        import mlx.core as mx
        import mlx_lm

        self._mx = mx
        self._model, self._tokenizer = mlx_lm.load(str(folder), adapter_path=None if adapter is None else str(adapter))[
            :2
        ]
        # What is packed into bits stays so; its scales and all that is computed with it get the precision.
        self._model.set_dtype({"fp32": mx.float32, "bf16": mx.bfloat16}[precision])
        quantized = read_object(folder / "config.json").get("quantization")
        self.weights = f"{quantized['bits']}-bit" if isinstance(quantized, dict) else stored_as(folder)

    def tokenize(self, text: str) -> list[int]:
        return list(map(int, self._tokenizer.encode(text, add_special_tokens=False)))

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        apply = self._tokenizer.apply_chat_template
        return list(map(int, apply(messages, add_generation_prompt=True)))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        found = self._model(self._mx.array([list(ids)]))[0]
        return np.array(found.astype(self._mx.float32), dtype=np.float32)

    def greedy(self, ids: Sequence[int], limit: int) -> list[int]:
        from mlx_lm.generate import generate_step

        found: list[int] = []
        for token, _ in generate_step(self._mx.array(list(ids)), self._model, max_tokens=limit):
            found.append(int(token))
            if self.stops_at(found[-1]):
                break
        return found

    def stops_at(self, token: int) -> bool:
        return token in self._tokenizer.eos_token_ids

    def close(self) -> None:
        del self._model


def open_mlx(folder: Path, context: int, precision: Precision) -> MLXRuntime:
    """The model in `folder`, computing in `precision`; its context is its own."""
    del context
    return MLXRuntime(folder, None, precision)


def open_mlx_adapter(config: Path, context: int, precision: Precision) -> MLXRuntime:
    """The adapter that `config` (adapter_config.json) describes, on the base beside it, or the one that it names."""
    del context
    beside = config.parent / BASE
    base = beside if beside.is_dir() else Path(str(read_object(config)["model"]))
    return MLXRuntime(base, config.parent, precision)
