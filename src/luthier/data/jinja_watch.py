"""A limit on the time that somebody else's program may run in our process, in any thread.

    within_limit(render, values)       render(values), or RunawayError where that takes more than a few seconds

Every thread that is inside such a call has a `_Watched`; one watchdog thread looks at all of them four times a second,
and throws an exception into a thread that has been in the same call for too long (`PyThreadState_SetAsyncExc`: it is
raised between two steps of Python; what is one long step in C is bounded by jinja_limits.py instead).

Time is the CPU time of the watched thread where the system tells it, so that a machine busy with other things raises no
false alarm; elsewhere it is the clock, with a wider limit.

The exception must never hit code outside the call. Firing and leaving both happen under the thread's lock, and leaving
takes back what was fired and not yet raised; so nothing is fired or pending once the call is left, and an exception
that is raised while it is being left is caught there.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

__all__ = ["CPU_SECONDS", "RunawayError", "within_limit"]

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")

CPU_SECONDS = 1.0
_CLOCK_SECONDS = 20.0
_LOOK_SECONDS = 0.25
_IDLE_LOOKS = 40
"""With nothing to watch for so many looks the watchdog thread ends; the next call starts another."""


class RunawayError(Exception):
    """The call took too long."""


class _Stop(BaseException):
    """What is thrown into a thread."""


class _Watched:
    """A thread. `call` numbers the watched call that it is in, 0 for none; `count` is the last number given."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.lock = threading.Lock()
        self.call = self.count = 0
        # The watchdog's notes: the call it saw last, since when, and when it last fired.
        self.seen, self.cpu, self.clock, self.fired = 0, 0.0, 0.0, 0.0

    def leave(self) -> None:
        """Nothing is fired at this thread, and nothing is pending, when this returns without an exception."""
        with self.lock:
            self.call = 0
            if self.fired:
                self.fired = 0.0
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), None)

    def look(self) -> None:
        """The watchdog's look at the thread: fire where it has been in one call for too long."""
        with self.lock:
            if not self.call:
                return
            now, cpu = time.monotonic(), _cpu_of(self.thread)
            if self.call != self.seen:
                self.seen, self.cpu, self.clock = self.call, cpu or 0.0, now
                return
            spent = cpu - self.cpu >= CPU_SECONDS if cpu is not None else now - self.clock >= _CLOCK_SECONDS
            # Again at each look: what is raised inside a finalizer is lost.
            if spent:
                self.fire(now)

    def fire(self, now: float) -> None:
        """Throw into the thread; with the lock held and the thread in a call."""
        self.fired = now
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(_Stop))


def _cpu_of(thread: int) -> float | None:
    """CPU seconds of a thread that is alive; None where the system does not tell."""
    find = getattr(time, "pthread_getcpuclockid", None)
    return time.clock_gettime(find(thread)) if find is not None else None


class _Watchdog:
    def __init__(self) -> None:
        self._threads: weakref.WeakSet[_Watched] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.awake = False

    def add(self, thread: _Watched) -> None:
        """Look at this thread too, as long as it lives."""
        with self._lock:
            self._threads.add(thread)

    def wake(self) -> None:
        """Start the watchdog's thread."""
        with self._lock:
            if not self.awake:
                self.awake = True
                threading.Thread(target=self._run, name="template watchdog", daemon=True).start()

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                threads = list(self._threads)
            for thread in threads:
                thread.look()
            idle = 0 if any(thread.call for thread in threads) else idle + 1
            if idle >= _IDLE_LOOKS and self._sleeps():
                return

    def _sleeps(self) -> bool:
        """Say that the thread ends, then look again: a call that began before it was said did not start another."""
        self.awake = False
        with self._lock:
            if self.awake or not any(thread.call for thread in self._threads):
                return True
            self.awake = True
        return False


class _Here(threading.local):
    """The state of the thread that asks."""

    def __init__(self) -> None:
        self.watched = _Watched()
        _watchdog.add(self.watched)


_watchdog = _Watchdog()
_here = _Here()


def _after_fork() -> None:
    """A child has no watchdog thread, and its locks may be held by threads that it has not."""
    global _watchdog, _here
    _watchdog = _Watchdog()
    _here = _Here()  # after it: this thread is made known to the new one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def within_limit(function: Callable[[_Given], _Made], given: _Given) -> _Made:
    """What `function` makes of `given`, stopped where it takes too long. Such calls do not nest.

    Raises:
        RunawayError: it took too long.
    """
    watched = _here.watched
    try:
        try:
            watched.count += 1
            watched.call = watched.count
            if not _watchdog.awake:
                _watchdog.wake()
            return function(given)
        finally:
            watched.leave()
    except _Stop:
        _leave_for_good(watched)
        raise RunawayError from None


def _leave_for_good(watched: _Watched) -> None:
    while True:
        try:
            return watched.leave()
        except _Stop:  # fired again just now
            continue
