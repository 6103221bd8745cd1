"""What the forking server (server.py) is asked to do, and what comes of it: lines of JSON both ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Full:
    """The disk is full: from the `nth` opening (from 0) of a file whose path has `match` in it, for writing, no file
    may grow beyond `size` bytes. After `room` seconds there is room again; None: not in this process."""

    match: str
    size: int
    nth: int = 0
    room: float | None = None


@dataclass(frozen=True)
class Job:
    """A command of luthier, in `folder`, and what happens to it.

    after: seconds from its start to `signal`. operation: the operation on checkpoints (from 0) before which it is
    killed, or `delay` seconds later where that is not 0.
    """

    words: tuple[str, ...]
    folder: str
    environment: Mapping[str, str] = field(default_factory=dict)
    after: float | None = None
    signal: int = int(signal.SIGKILL)
    operation: int | None = None
    delay: float = 0.0
    full: Full | None = None

    @classmethod
    def read(cls, line: str) -> Job:
        document = json.loads(line)
        full = document.pop("full")
        return cls(**document, full=None if full is None else Full(**full))


@dataclass(frozen=True)
class Outcome:
    """`code`: its exit code, or minus the signal that ended it. `operations`: how many on checkpoints it began, and
    `last` the last of them. `said`: all of stdout and stderr. `sent`: whether the signal was sent before its end."""

    code: int
    seconds: float
    operations: int
    last: str
    said: str
    sent: bool


class Server:
    """The forking server, as a process of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        settled = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
        settled |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env={**os.environ, **settled, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: Job) -> Outcome:
        """Do a job, to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the server ended with {self._process.wait()}"
        return Outcome(**json.loads(line))

    def close(self) -> None:
        self._process.communicate()
