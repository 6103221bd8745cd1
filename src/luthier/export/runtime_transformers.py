"""The merged folder in transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.conversation import Turn
from luthier.export.runtime import Precision
from luthier.guard.header import check_safetensors
from luthier.model.locate import weight_files

__all__ = ["TransformersRuntime", "folders", "open_transformers", "stored_as"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def folders(folder: Path) -> list[Path]:
    """The folder itself, where it holds a model."""
    return [folder] if (folder / "config.json").is_file() else []


class TransformersRuntime:
    """AutoModelForCausalLM and AutoTokenizer on a folder; no code of the folder is run."""

    def __init__(self, folder: Path, precision: Precision) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.weights = stored_as(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[precision], local_files_only=True, trust_remote_code=False
        )
        self._model = model.eval()
        stops = self._model.generation_config.eos_token_id
        self._stops = frozenset([stops] if isinstance(stops, int) else stops or ())

    def tokenize(self, text: str) -> list[int]:
        return list(map(int, self._tokenizer.encode(text, add_special_tokens=False)))

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        found = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(map(int, found["input_ids"]))

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._model(torch.tensor([list(ids)])).logits[0].float().numpy()
        return found

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], limit: int) -> list[int]:
        asked = torch.tensor([list(ids)])
        # Of generation_config.json what says where to stop is taken, and what would draw at random is not.
        found = self._model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=limit,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
        )
        return list(map(int, found[0, len(ids) :]))

    def stops_at(self, token: int) -> bool:
        return token in self._stops

    def close(self) -> None:
        del self._model


def stored_as(folder: Path) -> str:
    """The dtype of most of the weight files' elements."""
    count: Counter[str] = Counter()
    for file in weight_files(folder):
        for stored in check_safetensors(file).tensors.values():
            count[stored.dtype] += stored.stop - stored.start
    return count.most_common(1)[0][0]


def open_transformers(folder: Path, context: int, precision: Precision) -> TransformersRuntime:
    """The model in `folder`, computing in `precision`; its context is its own."""
    del context
    return TransformersRuntime(folder, precision)
