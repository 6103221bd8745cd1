"""How a run is kept and how it stops: what the recipe says of it, and within how many seconds a stop is done.

    stop within  ≤  one optimizer step + two saves        (a signal, the stop file): one may be on its way
    max_time     ends before it: no step is begun that would not leave time for itself and what is to be saved

Seconds of a save before any was measured: its bytes at SLOW_DISK, plus what flushing the files costs.
"""

from __future__ import annotations

from luthier.plan.decision import DEFAULT, YOURS, Decision
from luthier.plan.disk import checkpoint_bytes
from luthier.plan.settings import Optimizer
from luthier.plan.show import amount, duration
from luthier.recipe.schema import Recipe, TrainRecipe
from luthier.recipe.times import seconds_of

__all__ = ["choose_stopping", "max_seconds", "save_seconds", "skips_of"]

SLOW_DISK = 50e6
"""Bytes a second: a network disk of the slower kind, assumed, for no save has been measured yet."""
_FLUSHES = 0.5


def save_seconds(trained: int, optimizer: Optimizer) -> float:
    """Of one checkpoint with `trained` parameters in its adapter: an upper estimate."""
    return _FLUSHES + checkpoint_bytes(trained, optimizer) / SLOW_DISK


def max_seconds(train: TrainRecipe) -> float | None:
    """`train.max_time` in seconds; None: no limit."""
    return None if train.max_time is None else seconds_of(train.max_time)


def skips_of(train: TrainRecipe) -> int:
    """How many steps `train.on_nonfinite` allows to be left out; 0: stop at the first."""
    return 0 if train.on_nonfinite == "stop" else int(train.on_nonfinite.removeprefix("skip "))


def choose_stopping(
    recipe: Recipe, trained: int, optimizer: Optimizer, step_seconds: float
) -> tuple[Decision[object], ...]:
    """keep, on_nonfinite, max_time and stop_file, as the recipe has them, with what they come to."""
    train = recipe.train
    save = save_seconds(trained, optimizer)
    # Two: the one that may be on its way, and the last.
    bound = f"one step ({duration(step_seconds)}) and two saves ({duration(save)} or less each)"
    one = amount(checkpoint_bytes(trained, optimizer))
    skips = skips_of(train)
    if train.max_time is None:
        limit = f"No limit. Ctrl-C, SIGTERM or SIGHUP stops it with a checkpoint within {bound}."
    else:
        limit = f"As you set it. Before that it stops with a checkpoint (exit code 75), with room for {bound}."
    if skips:
        left_out = f"As you set it: {skips} steps whose loss or gradient is not finite are left out; then it stops."
    else:
        left_out = "A loss or gradient that is not finite stops the run before anything is updated."
    keep = f"{one} each; so many of the newest and the best, so that there is one to go back to."
    if train.stop_file is None:
        file = "None. With a name, a file that appears (of a notice to leave the machine) stops the run as Ctrl-C does."
    else:
        file = f"As you set it. When this file appears, the run stops as at Ctrl-C, within {bound}."
    found: tuple[tuple[str, object, object, str], ...] = (
        ("train.keep", train.keep, 3, keep),
        ("train.on_nonfinite", train.on_nonfinite, "stop", left_out),
        ("train.max_time", train.max_time, None, limit),
        ("train.stop_file", train.stop_file, None, file),
    )
    return tuple(
        Decision(name, value, reason, DEFAULT if value == default else YOURS) for name, value, default, reason in found
    )
