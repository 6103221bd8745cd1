"""Keeps a run's checkpoints: each is written by a thread of its own while training goes on, one at a time.

What is written is a snapshot (checkpoint.py), so the numbers of training do not depend on when it is done. The thread
tells nobody anything: the loop asks between two steps what has come of it (`collect`), so events keep their order and
an error shows where the run can act on it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

from luthier.errors import is_disk_full
from luthier.train.checkpoint import Progress, Snapshot, read_state, write_checkpoint
from luthier.train.checkpoints import Checkpoints, Pointer

__all__ = ["Failed", "Keeper", "Saved"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint is whole on disk. `seconds` from the snapshot on."""

    step: int
    best: bool
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The checkpoint of `step` could not be written; those before it are as they were."""

    step: int
    error: BaseException

    @property
    def no_room(self) -> bool:
        """Whether there was no room for it, which somebody may make while the run goes on."""
        return isinstance(self.error, OSError) and is_disk_full(self.error)

    @property
    def reason(self) -> str:
        """What happened, in the system's words."""
        if isinstance(self.error, OSError) and self.error.strerror is not None:
            return self.error.strerror
        return f"{type(self.error).__name__}: {self.error}"


class _LeftError(Exception):
    """The run was stopped at once: whoever works on it next must not find it changing."""


class Keeper:
    """Writes the checkpoints of one run, and removes those that are no longer wanted.

    Args:
        checkpoints: where they are.
        keep: how many of the newest stay, beside the best.
        saved: the step of the newest whole one on disk; None: there is none.
    """

    def __init__(self, checkpoints: Checkpoints, keep: int, saved: int | None) -> None:
        self.checkpoints, self.keep, self.saved = checkpoints, keep, saved
        self._thread: threading.Thread | None = None
        self._step: int | None = None
        self._outcome: Saved | Failed | None = None
        self._left = False

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def has(self, step: int) -> bool:
        """Whether the checkpoint of this step is on disk, or on its way there."""
        return step in (self.saved, self._step)

    def begin(self, snapshot: Snapshot) -> None:
        """Start to write a snapshot. What came of the one before has been collected."""
        if self._thread is not None:
            raise ValueError("the checkpoint before is not collected yet")
        self._step = snapshot.step
        # A daemon: a second signal ends the program at once, and what is half-written has no checkpoint's name.
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def fail(self, step: int, error: OSError) -> None:
        """Note that the checkpoint of this step could not even be begun; what came of the one before is collected."""
        self._outcome = Failed(step, error)

    def collect(self, *, wait: bool) -> Saved | Failed | None:
        """What has come of the last snapshot, once; None where nothing is being written, or it is not done yet.

        wait: until it is done.
        """
        if self._thread is not None:
            if not wait and self._thread.is_alive():
                return None
            self._thread.join()
        outcome, self._outcome, self._thread, self._step = self._outcome, None, None, None
        if isinstance(outcome, Saved):
            self.saved = outcome.step
        return outcome

    def leave(
        self,
        _kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        _trace: TracebackType | None = None,
    ) -> None:
        """Let what is being written come to its end, but not where somebody asks to stop at once: then nothing on the
        disk takes its name any more. For an ExitStack."""
        if isinstance(error, KeyboardInterrupt):
            self._left = True
        elif self._thread is not None:
            self._thread.join()

    def _go_on(self) -> None:
        if self._left:
            raise _LeftError

    def _work(self, snapshot: Snapshot) -> None:
        began = time.perf_counter()
        try:
            best = self._write(snapshot)
        except BaseException as error:  # noqa: BLE001  handed to the thread that collects
            self._outcome = Failed(snapshot.step, error)
        else:
            self._outcome = Saved(snapshot.step, best, time.perf_counter() - began)

    def _write(self, snapshot: Snapshot) -> bool:
        checkpoints, step = self.checkpoints, snapshot.step
        if not self._is_written(snapshot):
            with checkpoints.writing(step) as beside:
                write_checkpoint(beside, snapshot)
                self._go_on()
        self._go_on()
        best = self._point(step, snapshot.state.progress)
        self._go_on()
        checkpoints.retain(step, self.keep, best)
        return checkpoints.pointer("BEST") == step

    def _point(self, newest: int, progress: Progress) -> int | None:
        """Have LATEST and BEST name what they are to name; gives the best, None where nothing was held out.

        That is the one of the lowest held-out loss of those that are there: for a better one there may have been no
        room on the disk.
        """
        checkpoints = self.checkpoints
        best = next((step for step, _ in progress.ranked if checkpoints.path(step).is_dir()), None)
        pointers: tuple[tuple[Pointer, int | None], ...] = (("LATEST", newest), ("BEST", best))
        for which, step in pointers:
            if step is not None and checkpoints.pointer(which) != step:
                self._go_on()
                checkpoints.point(which, step)
        return best

    def _is_written(self, snapshot: Snapshot) -> bool:
        """Whether this very state is whole on disk: a stop came when it had been saved. Without the held-out loss that
        was measured of it afterwards it is not."""
        step, checkpoints = snapshot.step, self.checkpoints
        if not checkpoints.path(step).exists() or checkpoints.faults(step):
            return False
        return read_state(checkpoints.path(step)).progress == snapshot.state.progress

    def mend(self, progress: Progress) -> None:
        """After a kill: have LATEST and BEST name what a resumed run goes on from, with this progress, and remove older
        ones that are no longer wanted, for the last save of a run may have been cut short before it did.

        Where a newer one is damaged all stay, to be looked at until a newer one is whole.
        """
        if self.saved is None:
            return
        best = self._point(self.saved, progress)
        if self.saved == max(self.checkpoints.steps()):
            self.checkpoints.retain(self.saved, self.keep, best)
