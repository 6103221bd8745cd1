"""Never anything but success or a LuthierError, no input over 2 s, no memory over 1 GiB.

200 inputs of each kind in the ordinary suite, 20,000 in the slow tier, in processes of their own (worker.py). A failure
is named by kind and seed: `CASES[kind]().make(Random(seed))` is the input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.cases import CASES
from tests.fuzz.worker import MOST_BYTES, SEED

ROOT = Path(__file__).resolve().parents[2]


def fuzz(kind: str, count: int, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.worker", kind, str(count), str(folder)]
    paths = [str(ROOT / "src"), str(ROOT)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        at = (
            (folder / "at").read_text(encoding="ascii").strip()
            if (folder / "at").is_file()
            else "before the first input"
        )
        name = signal.Signals(-done.returncode).name if done.returncode < 0 else str(done.returncode)
        pytest.fail(f"{kind}: the process ended with {name} at the seed {at}:\n{done.stderr[-3000:]}")
    outcome = json.loads(done.stdout.splitlines()[-1])
    said = "\n".join(f"seed {seed}: {what}" for seed, what in outcome["failures"])
    assert not outcome["failures"], f"{kind}: {len(outcome['failures'])} of {outcome['inputs']} inputs:\n{said}"
    assert outcome["inputs"] >= count
    assert outcome["grown_mib"] < MOST_BYTES / 2**20
    # Both happen, or the inputs are none that could find anything.
    assert min(outcome["read"], outcome["refused"]) >= count // 50, outcome
    said = f"{outcome['inputs']:,} inputs, seed {SEED}, {outcome['refused']:,} refused, slowest {outcome['slowest']}"
    sys.stdout.write(f"{kind}: {said}\n")


@pytest.mark.parametrize("kind", CASES)
def test_a_few(kind: str, tmp_path: Path) -> None:
    fuzz(kind, 200, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many(kind: str, tmp_path: Path) -> None:
    fuzz(kind, 20_000, tmp_path)
