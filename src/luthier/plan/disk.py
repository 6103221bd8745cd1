"""What a run writes to its disk, at the fullest: foreseen before the first step, so that no run ends on a full disk.

With n trained parameters, m bytes of optimizer state for each and k = `train.keep`:

    checkpoints    (k + 2) · n · (4 + m)       the newest k, the best, and the one that is being written
    adapter        2 · (4n + tokenizer)        and the one that is being written
    events         700 bytes a step            the widest step line, warnings and saves: an upper estimate
    exports        2 bytes a weight            hf, from which the others are made; gguf in f16; ollama in q8_0, 34/32;
                                               mlx in 16-bit

plus, for each folder of a checkpoint or export, the tokenizer's files or a few KiB of JSON. Weights in the exports
count in full: that they stand in several files of 5 GB bounds memory, not the disk. The cache of prepared rows
(`~/.cache/luthier`) is not the run's and not counted.

Where it does not fit, remedies.py says what would (exit code 4); what is found full while training is met there
(train/session.py): the run goes on with the checkpoint before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.model.config import ModelConfig, parameters
from luthier.plan.footprint import Part, Phase
from luthier.plan.settings import Optimizer
from luthier.plan.show import amount
from luthier.plan.sizes import moment_bytes

__all__ = ["NOTHING_KEPT", "Written", "checkpoint_bytes", "predict_disk"]

_KIB, _MIB = 2**10, 2**20
_EVENT_BYTES = 700
_SMALL_FILES = 96 * _KIB
"""Of a checkpoint: headers, manifest, state, random generators, and what the file system rounds up to."""
_TOKEN_BYTES = 136
"""Of tokenizer.json, for each token of the vocabulary with its merge: Llama 3's has 17.2 MB for 128,256."""


@dataclass(frozen=True)
class Written:
    """What a run is to write: `exports` (hf, gguf, …), `keep` newest checkpoints, the events of `steps` steps."""

    exports: Sequence[str] = ()
    keep: int = 3
    steps: int = 0


NOTHING_KEPT = Written()
"""For those who ask of memory alone."""


def checkpoint_bytes(trained: int, optimizer: Optimizer) -> int:
    """One checkpoint: the adapter in fp32, the optimizer's state, and small files."""
    return int(trained * (4 + moment_bytes(optimizer))) + _SMALL_FILES


def predict_disk(config: ModelConfig, trained: int, optimizer: Optimizer, written: Written) -> Phase:
    """What is written at most, with `trained` parameters in the adapter."""
    one, tokenizer = checkpoint_bytes(trained, optimizer), _MIB + _TOKEN_BYTES * config.vocab_size
    newest = f"{written.keep} newest" if written.keep > 1 else "newest"
    parts = [
        Part("checkpoints", (written.keep + 2) * one, f"the {newest}, the best, one being written: {amount(one)} each"),
        Part("adapter", 2 * (4 * trained + tokenizer), "fp32, with its tokenizer, and while it is written"),
        Part("events", _EVENT_BYTES * written.steps + 4 * _MIB, "events, plan, recipe, evaluation"),
    ]
    weights = parameters(config)
    if written.exports:  # every export begins with the merged model
        parts.append(Part("merged model", 2 * weights + tokenizer, "16-bit"))
    if "gguf" in written.exports:
        parts.append(Part("gguf", 2 * weights + tokenizer, "16-bit"))
    if "ollama" in written.exports:
        parts.append(Part("ollama", weights * 34 // 32 + tokenizer, "q8_0: 34 bytes for 32 weights"))
    if "mlx" in written.exports:
        parts.append(Part("mlx", 2 * weights + tokenizer, "16-bit"))
    return Phase("disk", tuple(parts))
