"""Snapshots made by hand, small enough to be written a thousand times, and a process that dies at a chosen moment."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from luthier.model.lora import LoRASpec
from luthier.train.checkpoint import Follows, Progress, Snapshot, State, made_with
from luthier.train.checkpoints import Checkpoints
from luthier.train.identity import Identity
from luthier.train.keeper import Failed, Keeper, Saved
from luthier.train.manifest import SCHEMA


def snapshot(step: int, best_step: int | None = None, history: tuple[tuple[int, float], ...] = ()) -> Snapshot:
    """Of a run with one projection of rank 2, whose tensors say which step it is. A best one has the lower loss."""
    if best_step is not None and not history:
        history = ((best_step, 1.0),) if best_step == step else ((best_step, 1.0), (step, 2.0))
    state = State(
        schema=SCHEMA,
        progress=Progress(step=step, tokens=7 * step, best_step=best_step, history=history),
        follows=Follows(0, step, 100, 1e-3),
        identity=Identity("a/model", "digest", {"steps": 100}),
        recipe_sha256=None,
        plan_sha256="0" * 64,
        made_with=made_with(torch.device("cpu")),
        loss_scale=None,
    )
    masters = {"q.lora_A.weight": torch.full((2, 3), float(step)), "q.lora_B.weight": torch.full((4, 2), -float(step))}
    moments = {f"{name}/exp_avg": leaf + 1 for name, leaf in masters.items()}
    spec = LoRASpec(2, 3.0, 0.1, ("q_proj",), "standard")
    return Snapshot(state, spec, masters, moments, {"cpu": torch.arange(40, dtype=torch.uint8)})


def save(folder: Path, snap: Snapshot, *, keep: int, saved: int | None = None) -> Saved | Failed:
    """Write it as a run does, and wait for it."""
    keeper = Keeper(Checkpoints(folder), keep, saved)
    keeper.begin(snap)
    outcome = keeper.collect(wait=True)
    assert outcome is not None
    return outcome


def whole(folder: Path) -> set[int]:
    """The steps of the checkpoints that are whole."""
    checkpoints = Checkpoints(folder)
    return {step for step in checkpoints.steps() if not checkpoints.faults(step)}


class KilledError(BaseException):
    """The process is dead: no operation of its has an effect from here on, not even those that clean up."""


_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
_dying: dict[str, int | None] = {"left": None}
_killed = [0]


def _count() -> bool:
    """One operation less to live; whether this one is past the end."""
    left = _dying["left"]
    if left is None:
        return False
    _dying["left"] = left - 1
    if left <= 0:
        _killed[0] += 1
    return left <= 0


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _dying["left"] is None or event not in _CHANGES:
        return
    if event == "open":
        flags = arguments[2]
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    if _count():
        raise KilledError


sys.addaudithook(_audit)
_real_fsync = os.fsync


def _fsync(handle: int) -> None:
    """A flush; the process that dies in it leaves half of the file, as a power cut may."""
    alive = _dying["left"] is None or _dying["left"] > 0
    if _count():
        written = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY  # else it was flushed before
        if alive is False and _killed[0] == 1 and written and stat.S_ISREG(os.fstat(handle).st_mode):
            _dying["left"] = None
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            _dying["left"] = -1
        raise KilledError
    _real_fsync(handle)


@contextmanager
def dying_after(operations: int) -> Iterator[list[int]]:
    """In the block, the process dies after so many operations that change the disk. Gives a list whose only entry is
    how many were refused for that: 0 where it lived."""
    _killed[0], _dying["left"] = 0, operations
    os.fsync = _fsync
    try:
        yield _killed
    finally:
        os.fsync = _real_fsync
        _dying["left"] = None
