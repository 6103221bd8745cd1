"""SIGINT and SIGTERM while training: the first asks for a stop after the step at hand, the second stops at once.

A handler does nothing but note the signal: the loop looks at the note where its state is whole (after an update is
applied), saves and raises `Interrupted`. The second signal raises KeyboardInterrupt from wherever the program is; the
checkpoint on disk is whole even then, for it is written beside its place and renamed.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["StopSignals"]

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """A context in which the first SIGINT or SIGTERM sets `received` instead of ending the program.

    The handlers of before are put back at its end. Off the main thread Python allows no handlers: there it does
    nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: list[tuple[signal.Signals, signal._HANDLER]] = []

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = [(number, signal.signal(number, self._note)) for number in _HANDLED]
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
