"""A GGUF file in llama.cpp, through llama-cpp-python: what Ollama, LM Studio and others build on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Turn
from luthier.errors import ExportError
from luthier.export.ollama import ADAPTER_NAME
from luthier.export.runtime import Precision

__all__ = ["LlamaCppRuntime", "gguf_files", "open_llama_cpp", "open_llama_cpp_adapter"]

_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf")


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in `folder`; of one in several parts the first, which llama.cpp finds the others by."""
    return [path for path in sorted(folder.glob("*.gguf")) if not _LATER_PART.search(path.name)]


SMALL = 2**28
"""Bytes of a file that is read with one thread: several that wait for each other on a busy machine take minutes."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LlamaCppRuntime:
    """llama.cpp on the CPU, with an adapter on the model if given; `context` is what the longest text and its
    continuation need."""

    def __init__(self, path: Path, context: int, adapter: Path | None = None) -> None:
        import gguf
        import llama_cpp

        threads = _cores() if path.stat().st_size > SMALL else 1
        try:
            self._model = llama_cpp.Llama(
                str(path),
                n_ctx=context,
                n_batch=context,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=0,
                lora_path=None if adapter is None else str(adapter),
                logits_all=True,
                verbose=False,
            )
        except ValueError as error:  # its only word for a file that it cannot read
            raise ExportError(f"llama.cpp cannot load {path}: {error}", "export it again") from error
        metadata = self._model.metadata
        kind = gguf.LlamaFileType(int(metadata["general.file_type"])).name
        self.weights = kind.removeprefix("MOSTLY_").removeprefix("ALL_")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model.model)
        self._is_end = llama_cpp.llama_vocab_is_eog
        self._template = metadata.get("tokenizer.chat_template", "")

    def tokenize(self, text: str) -> list[int]:
        return list(self._model.tokenize(text.encode(), add_bos=False, special=True))

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        bos, eos = self._text(self._model.token_bos()), self._text(self._model.token_eos())
        write = Jinja2ChatFormatter(self._template, eos_token=eos, bos_token=bos)
        return self.tokenize(write(messages=[{"role": turn.role, "content": turn.content} for turn in turns]).prompt)

    def _text(self, token: int) -> str:
        return "" if token < 0 else self._model.detokenize([token], special=True).decode()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._model.reset()
        self._model.eval(list(ids))
        return np.array(self._model.scores[: len(ids)], dtype=np.float32)

    def greedy(self, ids: Sequence[int], limit: int) -> list[int]:
        self._model.reset()
        self._model.eval(list(ids))
        found: list[int] = []
        while len(found) < limit:
            token = int(np.argmax(self._model.scores[self._model.n_tokens - 1]))
            found.append(token)
            if self.stops_at(token) or len(found) == limit:
                break
            self._model.eval([token])
        return found

    def stops_at(self, token: int) -> bool:
        return bool(self._is_end(self._vocabulary, token))

    def close(self) -> None:
        self._model.close()


def open_llama_cpp(path: Path, context: int, precision: Precision) -> LlamaCppRuntime:
    """The file at `path`; llama.cpp computes as the file's types have it, whatever `precision`."""
    del precision
    return LlamaCppRuntime(path, context)


def open_llama_cpp_adapter(path: Path, context: int, precision: Precision) -> LlamaCppRuntime:
    """The base at `path` with the adapter that lies beside it."""
    del precision
    return LlamaCppRuntime(path, context, path.with_name(ADAPTER_NAME))
