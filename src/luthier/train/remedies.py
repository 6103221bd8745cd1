"""What is said beside an error of a step: what would make the run smaller, and where its rows stand."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.plan.settings import Settings
from luthier.plan.support import QUANTIZE_DEVICES
from luthier.train.identity import TrainingRows

__all__ = ["places", "smaller"]


def smaller(settings: Settings, layers: int, *, trains: bool) -> str:
    """What makes the run smaller and is not done yet. An evaluation has neither micro-batches nor a backward pass."""
    ways: list[str] = []
    if trains and settings.micro_batch > 1:
        ways.append(f"train.micro_batch: {settings.micro_batch // 2} or less (the result is the same)")
    if trains and settings.checkpointing < layers:
        now = f" (now {settings.checkpointing} of {layers} layers)" if settings.checkpointing else ""
        ways.append(f"train.checkpointing: true{now}")
    if settings.quantize == "none" and settings.device in QUANTIZE_DEVICES["nf4"]:
        ways.append("quantize: nf4")
    ways.append(f"a train.max_length below {settings.max_length}")
    listed = " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)
    return f"{listed}; it is then another run, with a directory of its own (--out)"


def places(dataset: TrainingRows, rows: Sequence[int], shown: int = 20) -> str:
    """Where the rows of a batch stand in the user's files."""
    listed = ", ".join(str(dataset.places[row]) for row in rows[:shown])
    return f"the rows of the batch: {listed}" + (f" and {len(rows) - shown} more" if len(rows) > shown else "")
