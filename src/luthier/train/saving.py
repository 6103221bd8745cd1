"""What a run says and does when a checkpoint has been written, or could not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from luthier.errors import TrainingError
from luthier.train.checkpoint import Snapshot
from luthier.train.checkpoints import name_of
from luthier.train.events import SaveEvent, WarningEvent
from luthier.train.keeper import Failed, Keeper, Saved

__all__ = ["Saving"]


@dataclass(frozen=True)
class Saving:
    """Hands snapshots to the keeper, and tells what came of them where the loop asks for it."""

    keeper: Keeper
    tell: Callable[[SaveEvent | WarningEvent], None]
    flush_log: Callable[[], None]

    def begin(self, snapshot: Snapshot) -> None:
        """Write this one, after the one before, and after the log of all that led to it."""
        self.settle(snapshot.step, wait=True)
        try:
            self.flush_log()
        except OSError as error:
            self.keeper.fail(snapshot.step, error)
        else:
            self.keeper.begin(snapshot)

    def settle(self, step: int, *, wait: bool = False, must: str | None = None) -> None:
        """Tell, after `step` updates, what has come of the last snapshot, where it is done.

        Where there was no room for it the run goes on without, and tries again when the next is due.

        Args:
            step: updates done by now.
            wait: until it is done.
            must: what it means to the run where it could not be written; waited for.

        Raises:
            TrainingError: it could not be written, for another reason or with `must`; names the last good one.
        """
        outcome = self.keeper.collect(wait=wait or must is not None)
        if isinstance(outcome, Saved):
            self._tell(outcome)
        if not isinstance(outcome, Failed):
            return
        what = f"the checkpoint of step {outcome.step} could not be written: {outcome.reason}{self.whole()}"
        if must is None and outcome.no_room:
            message = f"{what}; the run goes on and tries again at its next checkpoint: make room on that disk"
            self.tell(WarningEvent(step=step, message=message, kind="disk"))
            return
        until = "make room on that disk" if outcome.no_room else f"mend {self.keeper.checkpoints.folder}"
        raise TrainingError(
            what + (f"; {must}" if must else ""),
            f"{until}, then run the same command again with --resume: it goes on from the last whole checkpoint",
        ) from outcome.error

    def last_good(self) -> str:
        """What is whole on disk, for the end of an error's message; what is being written is waited for."""
        outcome = self.keeper.collect(wait=True)
        if isinstance(outcome, Saved):
            self._tell(outcome)
        failed = f" (that of step {outcome.step}: {outcome.reason})" if isinstance(outcome, Failed) else ""
        return self.whole() + failed

    def whole(self) -> str:
        """The last checkpoint that is whole, for the end of an error's message; "" where there is none."""
        saved = self.keeper.saved
        return "" if saved is None else f"; the last checkpoint, of step {saved}, is whole"

    def _tell(self, saved: Saved) -> None:
        self.tell(SaveEvent(step=saved.step, checkpoint=name_of(saved.step), best=saved.best, seconds=saved.seconds))
