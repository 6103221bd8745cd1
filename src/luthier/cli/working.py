"""Around every command that writes into a run directory: it alone works there, and it ends well when it is interrupted.

    with working(run, "luthier export", resumes=False):     the lock; SIGINT, SIGTERM and SIGHUP become Interrupted
        with stage("gguf was written"):                     what the message says was going on
            …

Outside training every write is atomic, so a stage is simply left where it is, and done again by the next command; in
training train/signals.py takes the signals over until it is through. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

from rich.markup import escape

from luthier import lock
from luthier.cli import console
from luthier.errors import Interrupted
from luthier.runs import remove_litter
from luthier.train.signals import StopNow, handling, leave_terminal, terminals

__all__ = ["sitting_began", "stage", "stopped_by", "working"]

_AGAIN = "run the same command again"
_BEGAN: ContextVar[float | None] = ContextVar("began", default=None)


@contextmanager
def working(run: Path, command: str, *, resumes: bool) -> Iterator[None]:
    """Hold the run directory `run` as `command` while the block runs; `resumes`: whether the command knows --resume.

    Raises UsageError where another process works there, Interrupted where a signal came.
    """
    began = _BEGAN.set(time.monotonic())
    again = f"{_AGAIN} with --resume to go on from there" if resumes else _AGAIN
    try:
        with stage(f"{command} was at work"), _stopping_signals(), lock.hold(run, command, _say):
            remove_litter(run)
            yield
    except Interrupted as stop:
        raise Interrupted(stop.message, stop.remedy or again) from stop
    finally:
        _BEGAN.reset(began)


def _say(line: str) -> None:
    console.say(f"[dim]{escape(line)}[/]")


@contextmanager
def stage(doing: str) -> Iterator[None]:
    """Turn an interruption in the block into Interrupted, which says what was going on: the innermost stage's word."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(f"{stopped_by(stop)}: stopped while {doing}; nothing is left half-written") from stop


def stopped_by(stop: KeyboardInterrupt) -> str:
    """The name of the signal behind it."""
    received = stop.args[0] if stop.args else signal.SIGINT  # without one it is Python's own handler's
    return signal.Signals(received).name


def sitting_began() -> float | None:
    """When the command at work began, by time.monotonic(); None outside of `working`."""
    return _BEGAN.get()


@contextmanager
def _stopping_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise in the main thread, the first time; handlers are as before afterwards.

    What they raise may come out as another error: where it strikes within a library's C code that makes its own of it
    (torch: "could not determine the shape of object"). So after a signal any error is taken for the interruption.
    """
    here = terminals()
    came: signal.Signals | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if number == signal.SIGHUP:  # the terminal is gone: what is written to it now would be an error
            leave_terminal(here)
            if came is not None:  # it comes more than once (train/signals.py)
                return
        if came is not None:
            os._exit(Interrupted.exit_code)
        came = signal.Signals(number)
        raise StopNow(came)

    try:
        with handling(stop):
            yield
    except Interrupted:
        raise
    except Exception as error:
        if came is None:
            raise
        raise StopNow(came) from error
