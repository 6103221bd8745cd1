"""SIGINT, SIGTERM and SIGHUP while training: the first asks for a stop after the step, the second stops at once.

A handler does nothing but note the signal and say that it was seen: the loop looks at the note where its state is whole
(after an update is applied), saves and raises `Interrupted`. The second signal raises StopNow, with the signal, from
wherever the program is; the checkpoint on disk is whole even then, for it is written beside its place and renamed.

SIGHUP comes when the terminal goes (a closed window, a lost connection). What is written to that terminal afterwards
fails, so standard output and error go nowhere from then on. It comes more than once (the shell sends one to its jobs,
then the kernel one to the terminal's processes; systemd one behind its SIGTERM), so it never counts as the second
signal. Where it is ignored already (nohup), it stays so.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

__all__ = ["STOPPING", "StopNow", "StopSignals", "handling", "leave_terminal", "terminals"]

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a process to end and gives it time to."""


class StopNow(KeyboardInterrupt):
    """A signal that is to end what is being done; its argument is the signal.

    A kind of its own, for Python notes where a plain KeyboardInterrupt leaves code that was run from a text (a
    dataclass in a module that is being imported), and at its end kills itself by SIGINT, whatever the exit code was.
    """


def terminals() -> tuple[int, ...]:
    """Which of standard output and error are a terminal; to be asked while it is there."""
    return tuple(number for number in (1, 2) if os.isatty(number))


def leave_terminal(numbers: tuple[int, ...]) -> None:
    """Send what goes to these file descriptors nowhere: the terminal behind them is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals] = STOPPING
) -> Iterator[None]:
    """Have `handler` called for `numbers` while the block runs, but for SIGHUP where it is ignored; then as before.

    Off the main thread Python allows no handlers: there it does nothing.
    """
    on_main = threading.current_thread() is threading.main_thread()
    before = [(number, signal.getsignal(number)) for number in numbers] if on_main else []
    taken = [(number, former) for number, former in before if number != signal.SIGHUP or former != signal.SIG_IGN]
    try:
        for number, _ in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number, former in taken:
            signal.signal(number, former)


class StopSignals:
    """A context in which the first of STOPPING sets `received` instead of ending the program.

    `notice` gives the line that is said on standard error when it comes. The handlers of before are put back at the
    end. Off the main thread Python allows no handlers: there it does nothing.
    """

    def __init__(self, notice: Callable[[signal.Signals], str] | None = None) -> None:
        self.received: signal.Signals | None = None
        self.notice = notice
        self._again: signal.Signals | None = None
        self._handling = handling(self._note)
        self._terminals: tuple[int, ...] = ()

    def __enter__(self) -> StopSignals:
        self._terminals = terminals()
        self._handling.__enter__()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._handling.__exit__(None, None, None)
        # It may have struck within a library's C code that made an error of its own of it (torch does).
        if self._again is not None and isinstance(error, Exception):
            raise StopNow(self._again) from error

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal(self._terminals)
            if self.received is not None:  # a shell and the kernel both send one: nobody insists
                return
        if self.received is not None:
            self._again = signal.Signals(number)
            raise StopNow(self._again)
        self.received = signal.Signals(number)
        if self.notice is not None:
            # Not by way of sys.stderr: the signal may have come while that was being written to.
            with suppress(OSError):  # a pipe whose reader has gone must not end what is to be saved
                os.write(2, f"{self.notice(self.received)}\n".encode())
