"""Programs of their own, watched from outside: how long each took, its peak memory, and when it printed what.

Whoever imports this must stay small: Linux counts what a process held before it became another program into that
program's peak resident set, so a parent with torch in it would add its own gigabyte to every child.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ended:
    """A program that came to its end without an error.

    started: seconds since 1970 just before it was made. seconds: from then to its end. peak_gib: largest resident set
    of the process (2^30 bytes). lines: what it printed, each with the seconds since `started` at which it was read.
    """

    started: float
    seconds: float
    peak_gib: float
    lines: tuple[tuple[float, str], ...]

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)


def watched(words: Sequence[str], folder: Path, more: Mapping[str, str] | None = None) -> Ended:
    """Run `words` in `folder`, with `more` in the environment; what it says on stderr goes to a file there.

    Raises SystemExit, with the end of what it said, where it fails.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(more or {})}
    complaints = folder / "stderr.txt"
    with complaints.open("wb") as errors:
        started = time.time()
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, cwd=folder, env=environment, text=True
        ) as child:
            assert child.stdout is not None  # noqa: S101  (a pipe was asked for)
            lines = tuple((time.time() - started, line) for line in child.stdout)
            _, status, used = os.wait4(child.pid, 0)
            seconds = time.time() - started
            child.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    if child.returncode:
        said = complaints.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(words)} ended with {child.returncode}:\n{said}")
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return Ended(started, seconds, used.ru_maxrss * unit / 2**30, lines)


def answer(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """The JSON object that a program prints, on its last line or over all of them."""
    text = watched(words, folder).text
    found: dict[str, Any] = json.loads(text if text.startswith("{") else text.splitlines()[-1])
    return found


def gemm(precision: str, folder: Path) -> dict[str, float]:
    """FLOP/s of the products of gemm.py, in a process of its own; `best` is the fastest of them."""
    rates = answer([sys.executable, str(HERE / "gemm.py"), precision], folder)
    return {**rates, "best": max(rates.values())}


def machine(folder: Path, peer_python: Path | None) -> dict[str, Any]:
    """Where a measurement was made: processor, cores, memory, system, and the versions of both sides."""
    device = answer([str(luthier()), "doctor", "--json"], folder)["machine"]["device"]
    names = ("torch", "transformers", "bitsandbytes", "trl", "peft", "accelerate")
    ask = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    ours = "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in ('luthier', 'torch')}))"
    return {
        "processor": device["name"],
        "cores": device["cores"],
        "memory_gib": round(device["memory_gib"], 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "system": platform.system(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "python": sys.version.split()[0],
        "ours": answer([sys.executable, "-c", ours], folder),
        **({"peer": answer([str(peer_python), "-c", ask], folder)} if peer_python else {}),
    }


def source() -> str:
    """Which state of our code is measured: a digest of all files of the package that are not compiled from others."""
    package, digest = HERE.parent / "src" / "luthier", hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".c", ".h")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def luthier() -> Path:
    """The command, as installed beside the Python that runs this."""
    return Path(sys.executable).parent / "luthier"
