"""Never anything but success or a LuthierError, no input over 2 s, no memory over 512 MiB.

200 inputs of each kind in the ordinary suite, 20,000 in the slow tier (2,000 of two slow kinds), in processes of their
own (worker.py). A failure is named by kind and seed: `CASES[kind]().make(Random(seed))` is the input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.errors import DataError
from tests.fuzz.cases import CASES
from tests.fuzz.worker import SEED, fault

ROOT = Path(__file__).resolve().parents[2]
MOST_MIB = 512
"""Half of what the process may take: beyond that it is stopped, so only less can be seen here."""


SLOW = {"tokenizer settings": 2_000, "adapters": 2_000}
"""Kinds of which an input takes a tenth of a second, for transformers reads it or a model is made for it."""


def _at(folder: Path) -> str:
    """The seed of the input that was being read."""
    return (folder / "at").read_text(encoding="ascii").strip() if (folder / "at").is_file() else "of none yet"


def fuzz(kind: str, count: int, folder: Path, limit: float | None = None) -> None:
    """`limit`: seconds; a hang that takes no processor time is seen by it alone."""
    limit = 120 + count if limit is None else limit
    command = [sys.executable, "-m", "tests.fuzz.worker", kind, str(count), str(folder)]
    paths = [str(ROOT / "src"), str(ROOT)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{kind}: no end within {limit:g} s, at the seed {_at(folder)}")
    if done.returncode:
        name = signal.Signals(-done.returncode).name if done.returncode < 0 else str(done.returncode)
        pytest.fail(f"{kind}: the process ended with {name} at the seed {_at(folder)}:\n{done.stderr[-3000:]}")
    outcome = json.loads(done.stdout.splitlines()[-1])
    said = "\n".join(f"seed {seed}: {what}" for seed, what in outcome["failures"])
    assert not outcome["failures"], f"{kind}: {len(outcome['failures'])} of {outcome['inputs']} inputs:\n{said}"
    assert outcome["inputs"] >= count
    assert outcome["grown_mib"] < MOST_MIB, f"{kind}: {outcome['grown_mib']} MiB more than before"
    # Both happen, or the inputs are none that could find anything.
    assert min(outcome["read"], outcome["refused"]) >= count // 50, outcome
    said = f"{outcome['inputs']:,} inputs, seed {SEED}, {outcome['refused']:,} refused, slowest {outcome['slowest']}"
    sys.stdout.write(f"{kind}: {said}\n")


@pytest.mark.parametrize("kind", CASES)
def test_a_few(kind: str, tmp_path: Path) -> None:
    fuzz(kind, 200, tmp_path)


def test_no_end_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"recipes: no end within 0\.1 s, at the seed"):
        fuzz("recipes", 200, tmp_path, limit=0.1)


def test_the_end_of_memory_is_a_failure() -> None:
    refused = DataError("the chat template fails on the conversation: MemoryError")
    assert fault(refused) is None
    refused.__cause__ = MemoryError()
    assert fault(refused) is not None
    assert fault(DataError("")) is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many(kind: str, tmp_path: Path) -> None:
    fuzz(kind, SLOW.get(kind, 20_000), tmp_path)
