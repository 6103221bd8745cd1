"""The learning rate of each optimizer step.

With p the peak rate, w the warm-up steps, n all steps and k the updates already done (the first update has k = 0):

    k < w       p · k / w                                   linear warm-up from 0
    constant    p
    linear      p · (n − k) / (n − w)
    cosine      p · ½ · (1 + cos(π · (k − w) / (n − w)))    half a cosine, SGDR without restarts
                                                            (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5)

These are the schedules of transformers' `get_{constant,linear,cosine}_schedule_with_warmup`; a test compares every
step. As there, the very first update of a run with warm-up has the rate 0, and linear and cosine reach 0 only after
the last update, never at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from luthier.plan.settings import Schedule as ScheduleName

__all__ = ["SCHEDULES", "learning_rate"]


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1.0 - progress


def _constant(_progress: float) -> float:
    return 1.0


SCHEDULES: dict[ScheduleName, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}
"""Name -> share of the peak rate at `progress` = (k − w) / (n − w), which runs from 0 to 1."""


def learning_rate(schedule: ScheduleName, *, done: int, peak: float, warmup_steps: int, steps: int) -> float:
    """The rate of the next update after `done` updates, of `steps` in all of which `warmup_steps` are warm-up."""
    if done < warmup_steps:
        return peak * done / warmup_steps
    progress = (done - warmup_steps) / max(1, steps - warmup_steps)
    return peak * max(0.0, SCHEDULES[schedule](min(1.0, progress)))
