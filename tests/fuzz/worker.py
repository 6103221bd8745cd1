"""Reads inputs of one kind in a process of its own: `python -m tests.fuzz.worker KIND COUNT FOLDER`.

Hypothesis draws the seeds, itself seeded with `SEED`, so the same COUNT is the same inputs on every machine. What the
parent cannot see from outside is measured here: the processor time of each input, and what was raised that is no
LuthierError. What this process cannot survive the parent sees: a native crash, an allocation over the limit on the
address space that makes a library abort, and a hang, which a timer ends with SIGPROF. `at` in FOLDER then holds the
seed of the input that it was at.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from tests.fuzz.cases import CASES, Case

SEED = 20261121
MOST_SECONDS = 2.0
MOST_BYTES = 2**30
HANG_SECONDS = 8.0
SHOWN = 12


@dataclass
class Outcome:
    """What came of a kind's inputs. `failures` are (seed, what happened); `slowest` is (seconds, seed)."""

    kind: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    grown_mib: int = 0


def limit_memory() -> None:
    """No more than `MOST_BYTES` on top of what the libraries take."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def warm(case: Case, folder: Path) -> None:
    """Read a few inputs that are not counted."""
    folder.mkdir()
    for number in range(8):
        with suppress(LuthierError):
            case.read(case.make(random.Random(-1 - number)), folder)


def fault(error: LuthierError) -> str | None:
    """What is wrong with how an input was refused; None where nothing is."""
    if isinstance(error.__cause__, MemoryError):
        return "refused only because this process has little memory"
    return "an empty message, or a defect of ours" if not error.message or error.exit_code == 1 else None


def run(kind: str, count: int, folder: Path) -> Outcome:
    """Read `count` inputs of a kind."""
    case, outcome = CASES[kind](), Outcome(kind)
    warm(case, folder / "first")  # what is imported or started once is no input's time or memory
    limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    at = os.open(folder / "at", os.O_RDWR | os.O_CREAT)
    place = folder / "work"
    place.mkdir()

    def one(number: int) -> None:
        if len(outcome.failures) >= SHOWN:
            return
        os.pwrite(at, b"%20d" % number, 0)
        text = case.make(random.Random(number))
        outcome.inputs += 1
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        began = time.process_time()
        try:
            case.read(text, place)
            outcome.read += 1
        except LuthierError as error:
            outcome.refused += 1
            if said := fault(error):
                outcome.failures.append((number, f"{said}: {error!r}"[:3000]))
        except BaseException as error:  # noqa: BLE001  (a panic of a compiled library is no Exception)
            shown = "".join(traceback.format_exception(error)[-6:])
            outcome.failures.append((number, f"{type(error).__name__}: {shown[-1500:]}"))
        took = time.process_time() - began
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome.slowest = max(outcome.slowest, (took, number))
        if took > MOST_SECONDS:
            outcome.failures.append((number, f"took {took:.1f} s"))
        if outcome.inputs % 500 == 0:
            shutil.rmtree(place)
            place.mkdir()

    quiet = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large]
    drawn = given(st.integers(0, 2**62 - 1))(one)
    sized = settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=quiet
    )
    seed(SEED)(sized(drawn))()
    outcome.grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return outcome


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", RUST_BACKTRACE="0", TOKENIZERS_PARALLELISM="false", LUTHIER_CACHE=os.devnull)
    print(json.dumps(asdict(run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))))  # noqa: T201
