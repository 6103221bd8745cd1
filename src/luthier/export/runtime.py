"""What an export is verified with: the program that people run it in, asked through five questions.

One runtime is one file that has a class with these methods, and one line in runtimes.py's table.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Turn

__all__ = ["Precision", "Runtime", "RuntimeKind"]

Precision = Literal["fp32", "bf16"]
"""What a runtime that can choose computes in; one that cannot takes no notice."""


class Runtime(Protocol):
    """An exported model, loaded in the program that it is for. Computes on the CPU."""

    @property
    def weights(self) -> str:
        """The type of most weights, as GGUF names it: F32, F16, BF16, Q8_0, Q4_K_M …"""
        ...

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, special tokens in it read as such, nothing put before or after it."""
        ...

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of a conversation by the export's own chat template, ready for the next answer."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(T, V): of the token after each of `ids`; V may be more than the model has."""
        ...

    def greedy(self, ids: Sequence[int], limit: int) -> list[int]:
        """What follows `ids`, the likeliest token each time, with the runtime's own cache and its own stop tokens (one
        of them last where it stopped by itself); `limit` tokens at most."""
        ...

    def stops_at(self, token: int) -> bool:
        """Whether the runtime ends an answer at `token`."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


@dataclass(frozen=True)
class RuntimeKind:
    """A program that reads one kind of export.

    Attributes:
        module: what must be importable.
        package: its name in Python's package metadata, which says its version.
        install: the command that brings it.
        models: the models in an export's folder, one path each: what `open` takes.
        open: loads one, for texts of so many tokens at most.
    """

    module: str
    package: str
    install: str
    models: Callable[[Path], list[Path]]
    open: Callable[[Path, int, Precision], Runtime]
