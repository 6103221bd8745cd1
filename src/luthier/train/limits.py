"""What ends a sitting before its run is done: a signal, a file that appears, the clock.

    signal      SIGINT, SIGTERM, SIGHUP (signals.py)
    stop file   `train.stop_file`, looked for once a second: what a spot instance's notice is turned into
    clock       `train.max_time` T: no step is begun where   elapsed + step + save > T

with step and save the longest of this sitting (of the newest steps; of all saves), both a quarter longer for safety;
before the first of each, the step of the sitting before, the proof's or the plan's, and plan/stopping.py's save. While
a checkpoint is being written, two saves count. The loop asks `reason` where its state is whole, so from a signal to the
end of the process it takes one step and two saves at most: one that is on its way, and the last.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable

from luthier.plan.settings import Settings
from luthier.plan.show import duration
from luthier.plan.stopping import save_seconds
from luthier.train.events import Event, ProofEvent, SaveEvent, StepEvent
from luthier.train.signals import StopSignals

__all__ = ["Stops"]

_LOOK_EVERY = 1.0
"""Seconds between two looks for the stop file: a look at a network disk may take a millisecond."""
_LONGER = 1.25
_NEWEST = 20


class Stops:
    """Whether and why a sitting is to end now. It learns from the events how long a step and a save take.

    trained: parameters of the adapter. began: when the sitting began, by `clock`, seconds. A stop file that is there
    has come: one that was there before the command is what the command refuses (cli/resuming.py).

    first_step: seconds of a step, before one was taken. is_writing: whether a checkpoint is on its way to the disk.
    """

    def __init__(
        self,
        signals: StopSignals,
        settings: Settings,
        trained: int,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signals, self._settings, self._clock = signals, settings, clock
        self._began = clock() if began is None else began
        self._file = settings.stop_file
        self._looked, self._file_came = clock(), self._file_is_there()
        self._steps: deque[float] = deque(maxlen=_NEWEST)
        self.first_step = 0.0
        self.is_writing: Callable[[], bool] = lambda: False
        self._save = save_seconds(trained, settings.optimizer)
        self._saves: list[float] = []
        signals.notice = self._noticed

    def learn(self, event: Event) -> None:
        """Take in how long a step or a save took."""
        match event:
            case ProofEvent():
                passes = -(-self._settings.batch_size // max(1, event.micro_batch))
                self.first_step = event.measured_seconds * passes
            case StepEvent():
                self._steps.append(event.seconds)
            case SaveEvent():
                self._saves = [max([event.seconds, *self._saves])]

    @property
    def seconds(self) -> float:
        """How long a step and what is to be saved take at most, as far as is known."""
        step = max(self._steps) if self._steps else self.first_step
        saves = 2 if self.is_writing() else 1
        return _LONGER * (step + saves * (self._saves[0] if self._saves else self._save))

    @property
    def asked(self) -> str | None:
        """The signal, or the stop file, that asks for an end; None where nobody does."""
        if self._signals.received is not None:
            return self._signals.received.name
        if self._file is None:
            return None
        now = self._clock()
        if not self._file_came and now - self._looked >= _LOOK_EVERY:
            self._looked, self._file_came = now, self._file_is_there()
        return f"the stop file {self._file}" if self._file_came else None

    def _file_is_there(self) -> bool:
        # os.path: on a disk that does not answer the file is not there, where Path.exists would raise
        return self._file is not None and os.path.exists(self._file)

    @property
    def reason(self) -> str | None:
        """Why to stop now; None: go on."""
        limit = self._settings.max_time
        if limit is not None and self._clock() - self._began + self.seconds > limit and self.asked is None:
            return f"train.max_time of {duration(limit)}"
        return self.asked

    def _noticed(self, received: signal.Signals) -> str:
        within = f", about {duration(self.seconds)} at most" if self._steps else ""
        return f"{received.name}: finishing the step, then saving{within}; a second signal stops at once"
