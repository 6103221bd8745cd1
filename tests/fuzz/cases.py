"""What is fuzzed: for each kind of input, how one is made of a seed and how it is read.

An input is a valid one with a few changes drawn from it by structure (a field's value, an entry twice, a number out of
range, a bracket too many) and, now and then, by bytes. The seed is the only source of chance: `make(Random(seed))` is
the same input on every machine, so a failure is repeated by its kind and seed alone.

To add a kind: a class with `make` and `read` (models.py, texts.py, runs.py and others), one line in `CASES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.fuzz.adapters import Adapter
from tests.fuzz.models import Config, Header, Index, Manifest, Tokenizer
from tests.fuzz.runs import Checkpoint, EventLines
from tests.fuzz.settings import TokenizerSettings
from tests.fuzz.texts import Recipe, Rows, Template


class Case(Protocol):
    """One kind of input."""

    def make(self, chance: random.Random) -> bytes:
        """An input."""

    def read(self, text: bytes, folder: Path) -> None:
        """Read it as luthier does; `folder` is empty but for what this case puts there itself."""


CASES: dict[str, Callable[[], Case]] = {
    "safetensors headers": Header,
    "sharded indexes": Index,
    "model configs": Config,
    "recipes": Recipe,
    "JSONL rows": Rows,
    "chat templates": Template,
    "tokenizer.json": Tokenizer,
    "tokenizer settings": TokenizerSettings,
    "adapters": Adapter,
    "checkpoint manifests": Manifest,
    "checkpoint files": Checkpoint,
    "event logs": EventLines,
}
