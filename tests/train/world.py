"""What the training tests share: a small decoder, rows of random tokens that can be learned, settings, a listener."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from luthier.data.conversation import Example, Source
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.plan.settings import Settings
from luthier.train.events import (
    EndEvent,
    EvalEvent,
    Event,
    InterruptEvent,
    ProgressEvent,
    ProofEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)

DEFAULTS = Settings(
    rank=3,
    alpha=7.0,
    dropout=0.0,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    scale="standard",
    quantize="none",
    precision="fp32",
    steps=8,
    batch_size=4,
    micro_batch=2,
    learning_rate=5e-3,
    schedule="cosine",
    warmup_steps=2,
    optimizer="adamw",
    weight_decay=0.01,
    clip=1.0,
    checkpointing=0,
    attention="flash",
    max_length=128,
    packing=False,
    longest_first=False,
    train_on="completions",
    prompt_loss_weight=0.0,
    long_rows="truncate",
    eval_every=3,
    save_every=2,
    seed=5,
    device="cpu",
)


def make_settings(**changes: object) -> Settings:
    """The settings above with `changes`."""
    return replace(DEFAULTS, **changes)  # type: ignore[arg-type]


def tiny_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(folder, dtype=dtype)


def make_examples(count: int, *, seed: int, shortest: int = 3, longest: int = 40, first_row: int = 0) -> list[Example]:
    """Rows of very unequal lengths and labelled shares, of 30 of the 400 tokens: which 30 can be learned quickly."""
    random = np.random.default_rng(seed)
    examples = []
    for row in range(first_row, first_row + count):
        length = int(random.integers(shortest, longest + 1))
        ids = random.integers(20, 50, size=length).astype(np.int32)
        prompt = int(random.integers(1, length))  # at least one token is left to train
        labels = np.concatenate([np.full(prompt, -100), ids[prompt:]]).astype(np.int32)
        examples.append(Example(ids, labels, row))
    return examples


@dataclass(frozen=True)
class Rows:
    """A data.prepare.Dataset as far as training looks at one."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    places: tuple[Source, ...]

    @property
    def digest(self) -> str:
        """Of the ids and labels of all rows, in order."""
        found = hashlib.sha256()
        for example in (*self.train, *self.eval):
            found.update(example.ids.tobytes() + example.labels.tobytes())
        return found.hexdigest()


def make_rows(train: int = 11, held_out: int = 5) -> Rows:
    return Rows(
        tuple(make_examples(train, seed=1)),
        tuple(make_examples(held_out, seed=2, first_row=train)),
        tuple(Source("rows.jsonl", 1 + row) for row in range(train + held_out)),
    )


@dataclass
class Recorder:
    """A listener that keeps what it is told."""

    events: list[Event] = field(default_factory=list)
    progress: list[ProgressEvent] = field(default_factory=list)
    closed: int = 0

    def on_start(self, event: StartEvent) -> None:
        self.events.append(event)

    def on_proof(self, event: ProofEvent) -> None:
        self.events.append(event)

    def on_progress(self, event: ProgressEvent) -> None:
        self.progress.append(event)

    def on_step(self, event: StepEvent) -> None:
        self.events.append(event)

    def on_eval(self, event: EvalEvent) -> None:
        self.events.append(event)

    def on_save(self, event: SaveEvent) -> None:
        self.events.append(event)

    def on_warning(self, event: WarningEvent) -> None:
        self.events.append(event)

    def on_interrupt(self, event: InterruptEvent) -> None:
        self.events.append(event)

    def on_end(self, event: EndEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


def events_of(path: Path, *kinds: str) -> list[dict[str, object]]:
    """The lines of an events.jsonl, all of them or those of `kinds`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if not kinds or line["event"] in kinds]


def checkpoint(out: Path, which: str = "LATEST") -> Path:
    """The folder of the checkpoint that LATEST or BEST names, of the run in `out`."""
    return out / "checkpoints" / (out / "checkpoints" / which).read_text(encoding="ascii").rstrip("\n")


def without_clocks(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """The lines without what depends on when and how fast they were made."""
    clocks = (
        "time",
        "seconds",
        "tokens_per_second",
        "memory_active_gib",
        "memory_allocated_gib",
        "memory_reserved_gib",
    )
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]
