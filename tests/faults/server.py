"""Forks a process for each command it is given, and kills that where it is told to: python -m tests.faults.server.

Each is `luthier …` as it would be typed, from `main` on; only the interpreter's last act, to free every object, is left
out. Forking it from a process that has
imported torch and luthier, and done nothing else, saves two hundred times the imports. Jobs and outcomes: jobs.py.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from typing import NoReturn

from tests.faults.jobs import Full, Job, Outcome

HANGS_AFTER = 120.0
_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_IMPORTED = (
    *("cli.main", "cli.stages", "cli.preparing", "cli.show", "cli.exporting", "cli.verifying", "cli.loading"),
    *("data.prepare", "data.tokenizer", "train.loop", "train.display", "train.verify", "train.measured"),
    *("evaluate.compare", "export.merge", "export.gguf", "hardware.probe", "hardware.calibrate", "plan.plan"),
)
"""Parts of luthier that a command imports when it needs them."""


def preload() -> None:
    """Import what takes long to import."""
    for name in _IMPORTED:
        importlib.import_module(f"luthier.{name}")
    gc.collect()
    gc.freeze()  # a collection in a forked process would write to, and so copy, all of this one's memory


class Operations:
    """Tells the server each operation on the checkpoints before it is done, and dies at the one chosen."""

    def __init__(self, job: Job, to: int) -> None:
        self._job, self._to, self._count, self._lock = job, to, 0, threading.Lock()
        self._fsync = os.fsync
        os.fsync = self._flush

    def heard(self, event: str, path: str) -> None:
        """An audit event; those of the checkpoints' own thread count, and those on their folder."""
        if threading.current_thread().name == "checkpoint" or "/checkpoints" in path:
            self._tell(event, path)

    def _flush(self, handle: int) -> None:
        if threading.current_thread().name == "checkpoint":
            self._tell("fsync", os.readlink(f"/proc/self/fd/{handle}") if os.path.isdir("/proc/self/fd") else "")
        self._fsync(handle)

    def _tell(self, event: str, path: str) -> None:
        with self._lock:
            due = self._count == self._job.operation
            self._count += 1
            os.write(self._to, f"{'!' if due else ' '}{event} {path}\n".encode())
            if due and self._job.delay == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class FullDisk:
    """Sets the process's limit on the size of its files where it is told to."""

    def __init__(self, full: Full) -> None:
        self._full, self._seen = full, 0

    def heard(self, event: str, path: str) -> None:
        if event != "open" or self._full.match not in path:
            return
        self._seen += 1
        if self._seen == self._full.nth + 1:
            self._limit(self._full.size)
            if self._full.room is not None:
                timer = threading.Timer(self._full.room, self._limit, (resource.RLIM_INFINITY,))
                timer.daemon = True
                timer.start()

    @staticmethod
    def _limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def become(job: Job, said: int, operations: int) -> NoReturn:
    """Be the command, to the end of this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(job.folder)
    os.environ.update(job.environment)
    hears = [Operations(job, operations), *([FullDisk(job.full)] if job.full else [])]

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        for one in hears:
            one.heard(event, str(arguments[0]))

    sys.addaudithook(audit)
    sys.argv = ["luthier", *job.words]
    from luthier.cli.main import main

    code: object = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001  as the interpreter does it at its end
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


class Watch:
    """One forked process, from its start to its end."""

    def __init__(self, job: Job, pid: int, said: int, operations: int) -> None:
        self.job, self.pid, self.began = job, pid, time.monotonic()
        self._pipes = {said: bytearray(), operations: bytearray()}
        self._said, self._operations = said, operations
        self._at = None if job.after is None else self.began + job.after
        self._sent = False

    def outcome(self) -> Outcome:
        while True:
            self._listen(0.005)
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                break
            self._act()
        self._listen(0.0)
        lines = self._pipes[self._operations].decode(errors="replace").splitlines()
        due = any(line.startswith("!") for line in lines)
        for pipe in self._pipes:
            os.close(pipe)
        return Outcome(
            code=os.waitstatus_to_exitcode(status),
            seconds=time.monotonic() - self.began,
            operations=len(lines),
            last=lines[-1][1:] if lines else "",
            said=self._pipes[self._said].decode(errors="replace"),
            sent=self._sent or due,
        )

    def _listen(self, wait: float) -> None:
        """Take in what is in the pipes; waits for it, but not beyond the moment of the signal."""
        if self._at is not None:
            wait = min(wait, max(0.0, self._at - time.monotonic()))
        open_pipes = list(self._pipes)
        while ready := select.select(open_pipes, [], [], wait)[0]:
            for pipe in ready:
                piece = os.read(pipe, 1 << 16)
                self._pipes[pipe] += piece
                if not piece:
                    open_pipes.remove(pipe)
                if pipe == self._operations and b"!" in piece and self.job.delay:
                    self._at = time.monotonic() + self.job.delay
            wait = 0.0

    def _act(self) -> None:
        now = time.monotonic()
        if self._at is not None and now >= self._at:
            self._at, self._sent = None, True
            os.kill(self.pid, self.job.signal)
        if now - self.began > HANGS_AFTER:
            os.kill(self.pid, signal.SIGKILL)


def do(job: Job) -> Outcome:
    """Run it in a process of its own."""
    (said, says), (operations, operates) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(said)
        os.close(operations)
        become(job, says, operates)
    os.close(says)
    os.close(operates)
    return Watch(job, pid, said, operations).outcome()


def main() -> None:
    preload()
    if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("a process of several threads is not to be forked")
    for line in sys.stdin:
        os.write(1, (json.dumps(asdict(do(Job.read(line)))) + "\n").encode())


if __name__ == "__main__":
    main()
