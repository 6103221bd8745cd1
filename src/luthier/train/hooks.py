"""What the caller of training has to do with a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from luthier.plan.proof import Adopted
from luthier.train.proof import Forecast

__all__ = ["Hooks"]


@dataclass(frozen=True)
class Hooks:
    """What the caller does on the way, and what it knows that training does not.

    companions: is given the adapter's folder before that is put in place, to write what belongs beside the adapter (a
    tokenizer): all of it appears at once. forecast: what is predicted of a micro-batch, for the proof to be held
    against. adopt: is told, before the first step, which settings the run goes on with where the planned ones were out
    of memory. prove: whether the largest micro-batch is tried before the first step (plan/proof.py: `is_proved`).
    began: when this sitting began, by time.monotonic(), where that was before the training: `train.max_time` counts
    from there. step_seconds: what is predicted of a step, which `train.max_time` leaves room for before one was taken.
    weights: what tells the base's files from others of its name (model/fingerprint.py): a run goes on with these only.
    """

    companions: Callable[[Path], None] | None = None
    forecast: Forecast | None = None
    adopt: Callable[[Adopted], None] | None = None
    prove: bool = True
    began: float | None = None
    step_seconds: float | None = None
    weights: str | None = None
