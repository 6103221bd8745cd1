"""The checkpoints of a run on disk: which there are, which is whole, and how one comes and goes. No torch here.

    checkpoints/step-000100/   a checkpoint (checkpoint.py), with its manifest (manifest.py)
    checkpoints/LATEST         the name of the newest one, a line of text
    checkpoints/BEST           the name of the one with the lowest held-out loss

How one is written, each line on disk before the next begins:

    1  .step-000100.PID.tmp/ and its files, the manifest last
    2  renamed to step-000100
    3  LATEST, and BEST where it is the best, replaced by renaming
    4  older ones that are no longer wanted: renamed to .step-000050.PID.gone, then removed

One that is written again (its held-out loss was measured after it was saved, or it is damaged) is kept beside as
.step-000100.PID.old until the new one has its name; `tidy` puts it back where a kill came between the two.

So a name `step-…` never stands for half a checkpoint, and nothing is removed before something newer is whole: wherever
a process is killed, one good checkpoint is there, if ever one was. LATEST and BEST are for people and programs that
look; a run that goes on reads the folders, for a kill between 2 and 3 leaves LATEST one behind.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from luthier.errors import TrainingError
from luthier.runs import atomic_folder, flush_folder, make_private, recover_folder, remove_path, write_text
from luthier.train.manifest import Fault, check

__all__ = ["Checkpoints", "Found", "Pointer", "name_of"]

Pointer = Literal["LATEST", "BEST"]

_NAME = re.compile(r"step-([0-9]{6,12})", re.ASCII)
_LITTER = re.compile(r"\.step-[0-9]{6,12}\.[0-9]{1,9}\.(?:tmp|gone)|\.(?:LATEST|BEST)\.[0-9]{1,9}\.tmp", re.ASCII)
_OLDER = re.compile(r"\.(step-[0-9]{6,12})\.[0-9]{1,9}\.old", re.ASCII)
_LONGEST_POINTER = 64
_OLDER_LAYOUT = ("last", "best")


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` updates."""
    return f"step-{step:06d}"


def _step_of(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and name == name_of(int(match[1])) else None


@dataclass(frozen=True)
class Found:
    """What a run can go on from. `step` is None where there is no checkpoint; `damaged` names newer ones that are not
    whole, each with what is wrong with it."""

    step: int | None
    damaged: tuple[str, ...] = field(default=())


class Checkpoints:
    """The checkpoints in one folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` updates is, or would be."""
        return self.folder / name_of(step)

    def steps(self) -> list[int]:
        """Of all that are there, whole or not, the newest first."""
        if not self.folder.is_dir():
            return []
        folders = (entry.name for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False))
        return sorted((step for name in folders if (step := _step_of(name)) is not None), reverse=True)

    def faults(self, step: int) -> list[Fault]:
        """What is wrong with the checkpoint of this step; nothing where it is whole. Reads every byte of it."""
        return check(self.path(step), "checkpoint", step)

    def newest_whole(self) -> Found:
        """The newest checkpoint that is whole, and the newer ones that are not. Reads every byte of these.

        Raises TrainingError where there are checkpoints and none is whole, or those of an older version of luthier.
        """
        steps, damaged = self.steps(), list[str]()
        latest = self.pointer("LATEST")
        if latest is not None and latest > max(steps, default=-1):
            damaged.append(f"{name_of(latest)} is missing, and LATEST names it")
        for step in steps:
            faults = self.faults(step)
            if not faults:
                return Found(step, tuple(damaged))
            damaged.append(f"{name_of(step)} is not whole ({faults[0]})")
        if damaged:
            listed = "\n".join(f"  {one}" for one in damaged)
            raise TrainingError(
                f"no checkpoint in {self.folder} can be gone on from:\n{listed}",
                "put them back from a copy, or train again into another directory (--out)",
            )
        if any((self.folder / name).is_dir() for name in _OLDER_LAYOUT):
            raise TrainingError(
                f"{self.folder} holds checkpoints of an older version of luthier, which this one does not read",
                "go on with the version that began the run, or train again into another directory (--out)",
            )
        return Found(None)

    def pointer(self, which: Pointer) -> int | None:
        """The step that LATEST or BEST names; None where the file is missing or names no checkpoint."""
        path = self.folder / which
        try:
            if path.is_symlink():
                return None
            with path.open("rb") as file:
                text = file.read(_LONGEST_POINTER)
        except OSError:  # missing, or not to be read: the folders themselves say it all
            return None
        return _step_of(text.decode("ascii", "replace").removesuffix("\n"))

    def point(self, which: Pointer, step: int) -> None:
        """Have LATEST or BEST name the checkpoint of this step."""
        write_text(self.folder / which, name_of(step) + "\n")

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A new folder to write a checkpoint into: see runs.atomic_folder. One of that name stays beside until it is
        replaced."""
        make_private(self.folder)
        with atomic_folder(self.path(step)) as beside:
            yield beside

    def retain(self, newest: int, keep: int, best: int | None) -> None:
        """Remove all but the best, and the `keep` newest of those up to `newest`, which is whole.

        What is newer than `newest` was left by a sitting that a resumed one took the place of, for it was damaged.
        """
        past = [step for step in self.steps() if step <= newest]
        wanted = {newest, *past[:keep], best}
        for step in self.steps():
            if step not in wanted:
                self._discard(self.path(step))

    def _discard(self, path: Path) -> None:
        """Take a checkpoint away: its name first, so that it is never half of itself under it."""
        gone = path.with_name(f".{path.name}.{os.getpid()}.gone")
        remove_path(gone)
        path.rename(gone)
        flush_folder(self.folder)
        shutil.rmtree(gone, ignore_errors=True)

    def tidy(self) -> None:
        """Put back what a killed process set aside; remove what it left half-written or half-removed.

        To be called with the run's lock held: no other process then writes here, whoever has its number by now.
        """
        if not self.folder.is_dir():
            return
        for entry in list(os.scandir(self.folder)):
            if _LITTER.fullmatch(entry.name):
                remove_path(Path(entry.path))
            if aside := _OLDER.fullmatch(entry.name):
                recover_folder(self.folder / aside[1])
