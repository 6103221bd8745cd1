"""One process at a time works on a run directory: whoever writes into it holds `<run>/.lock`.

The lock is the system's (flock on that file): it ends with its process, however that ends, so a dead process holds
none. The file says who holds it, for the message that a second one gets: process, host, since when, doing what. It is
removed at a clean end; one that is there without being locked was left by a process that died, and is taken over.

    held by somebody                                   refused
    free, the note is of this machine                  its process is dead: taken over, and told
    free, the note is of another machine               refused: see below
    this file system has no locks                      judged by the note: is the process, started then, still there?

flock reaches over machines only where the file system does (NFS from Linux 2.6.12 on, unless mounted with
`local_lock` or `nolock`). So a note of another machine is believed, whatever flock says: nothing here can tell whether
that machine is gone or only out of sight. Which machine it is says its boot (`/proc/sys/kernel/random/boot_id`), which
two containers on one kernel share, and its name, which one machine keeps over a restart. A process is known by number
and start, for numbers are used again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import psutil
from pydantic import TypeAdapter, ValidationError

from luthier.errors import UsageError
from luthier.runs import check_places, make_private

__all__ = ["LOCK_NAME", "Holder", "check_free", "hold"]

LOCK_NAME = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_SAME_START = 2.0
"""Seconds by which two readings of a process's start differ at most: the system's clock is corrected now and then."""
_A_LOOK = 0.05
"""Seconds after which whoever only looked has let go."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory. `started`: of the process, `since`: of the lock, seconds since 1970; `boot`: of the
    machine, "" where it is not known."""

    pid: int
    host: str
    boot: str
    started: float
    since: float
    command: str

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} ({self.command}), since {when}"


_HOLDER = TypeAdapter(Holder)
_held: dict[tuple[str, int], int] = {}
"""How often this thread holds a directory already: what holds it calls what would."""


@contextmanager
def hold(run: Path, command: str, told: Callable[[str], None] | None = None) -> Iterator[None]:
    """Be the only process that works on the run directory `run`, which is made if missing; again in it: no more.

    `command` is what a second process is told is going on. `told` is given the line that says that a dead process's
    lock was taken over. A directory that was made for this and is still empty at the end is removed.

    Raises UsageError, naming the holder, where another process has it; FileError where a place in it is a link;
    OSError where it cannot be made.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run} is a file, not a run directory", "choose another place with --out")
    key = (os.path.realpath(run), threading.get_ident())
    if _held.get(key, 0):
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    check_places(run)
    made = _missing(run)
    make_private(run)
    handle = -1
    try:
        handle = _taken(run, command, told)
        _held[key] = 1
        yield
    finally:
        _held.pop(key, None)
        if handle >= 0:
            (run / LOCK_NAME).unlink(missing_ok=True)  # before it is let go: whoever opened it meanwhile looks again
            os.close(handle)
        for folder in made:
            with suppress(OSError):  # not empty: there is a run in it
                folder.rmdir()


def check_free(run: Path) -> None:
    """Raise UsageError, naming the holder, where another process works on `run`. Nothing is written."""
    path = run / LOCK_NAME
    if not path.is_file() or _held.get((os.path.realpath(run), threading.get_ident()), 0):
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise _refusal(run, _read(path)) from None
            if error.errno not in _NO_LOCKS:
                raise
            _judge(run, _read(path), locks=False)


def _missing(folder: Path) -> list[Path]:
    """`folder` and those above it that are not there, innermost first."""
    found: list[Path] = []
    while not folder.exists():
        found.append(folder)
        folder = folder.parent
    return found


def _taken(run: Path, command: str, told: Callable[[str], None] | None) -> int:
    """The open lock file, locked and with this process's note in it."""
    path = run / LOCK_NAME
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # whoever made the directory, and left it empty, has removed it just now
            make_private(run)
            continue
        try:
            locks = _locked(handle)
            if locks is None:  # `check_free` may have it for a moment
                time.sleep(_A_LOOK)
                locks = _locked(handle)
            if locks is None:
                raise _refusal(run, _read(path))
            if not _is_at(handle, path):  # its holder removed it after it was opened here
                os.close(handle)
                continue
            is_new = locks and os.fstat(handle).st_size == 0
            left = None if is_new else _judge(run, _read(path), locks=locks)
            os.ftruncate(handle, 0)
            os.pwrite(handle, orjson.dumps(asdict(_me(command)), option=orjson.OPT_APPEND_NEWLINE), 0)
        except BaseException:
            with suppress(OSError):  # closed already, where it was opened anew and that failed
                os.close(handle)
            raise
        if left is not None and told is not None:
            told(f"{run}: the lock of {left} is taken over: that process is no more")
        return handle


def _locked(handle: int) -> bool | None:
    """Lock the file; None where another process has it, False where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


def _read(path: Path) -> Holder | None:
    """The note in the lock file; None where there is none (yet), or nothing that can be read."""
    for _ in range(5):  # its holder locks it first, and then writes
        try:
            return _HOLDER.validate_json(path.read_bytes())
        except (OSError, ValidationError):
            time.sleep(0.01)
    return None


def _judge(run: Path, left: Holder | None, *, locks: bool) -> Holder | None:
    """The dead process whose note is in a lock file that nobody holds; None where there is no note.

    Raises UsageError where it may be alive.
    """
    if left is None:
        return None
    me = _me("")
    if left.host != me.host and (not left.boot or left.boot != me.boot):
        raise UsageError(
            f"{run} was in use by {left}, and nothing here can tell whether that machine still works on it",
            f"if it does not, remove {run / LOCK_NAME} and run the same command again",
        )
    if not locks and left.boot == me.boot and _is_alive(left):
        raise _refusal(run, left)
    return left


def _is_alive(left: Holder) -> bool:
    try:
        return abs(psutil.Process(left.pid).create_time() - left.started) <= _SAME_START
    except psutil.NoSuchProcess:
        return False


def _refusal(run: Path, holder: Holder | None) -> UsageError:
    if holder is None:
        return UsageError(f"{run} is in use by another process", "wait for it to end, or choose another place (--out)")
    here = holder.host == _me("").host
    stop = f"kill {holder.pid} (it saves a checkpoint first), " if here else ""
    return UsageError(f"{run} is in use by {holder}", f"wait for it to end, {stop}or choose another place (--out)")


def _me(command: str) -> Holder:
    boot = _BOOT.read_text(encoding="ascii").strip() if _BOOT.is_file() else ""
    process = psutil.Process()
    return Holder(process.pid, socket.gethostname(), boot, process.create_time(), time.time(), command)
