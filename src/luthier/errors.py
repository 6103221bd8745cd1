"""Every error a user can meet, and the exit code it ends the command with.

    LuthierError                exit 1   a defect of ours
    ├── UsageError              exit 2   the command or the recipe is wrong
    │   ├── RecipeError                  one or more problems in a recipe, each with its line
    │   ├── ModelError                   the base model cannot be had or is not of a known family
    │   └── FileError                    a file is damaged, or not what it claims to be
    ├── DataError               exit 3   the data is wrong
    ├── FitError                exit 4   it does not fit this machine
    ├── TrainingError           exit 5   training stopped: non-finite loss, a fault
    ├── ExportError             exit 6   an export failed or failed its verification
    └── Interrupted             exit 75  stopped by a signal, a stop file or the clock, with what was done saved

A message says what happened and where (file, line, row); `remedy` says what to try next. Errors of other
libraries are turned into these at the place where the library is called, never shown raw.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DataError",
    "ExportError",
    "FileError",
    "FitError",
    "Interrupted",
    "LuthierError",
    "ModelError",
    "Problem",
    "RecipeError",
    "TrainingError",
    "UsageError",
    "is_disk_full",
]


class LuthierError(Exception):
    """The root. `remedy` is one sentence: what to try next."""

    exit_code = 1

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(LuthierError):
    """The command line asks for something that cannot be."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one place. `line` counts from 1; None where there is no line (a `--set`, a missing key)."""

    where: str
    line: int | None
    reason: str
    remedy: str | None = None

    def __str__(self) -> str:
        place = self.where if self.line is None else f"{self.where}:{self.line}"
        return f"{place}: {self.reason}" + (f" ({self.remedy})" if self.remedy else "")


def _listed(problems: Sequence[Problem]) -> str:
    return "\n".join(f"  {problem}" for problem in problems)


class RecipeError(UsageError):
    """All problems of a recipe at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        many = f"{len(self.problems)} problems" if len(self.problems) != 1 else "a problem"
        super().__init__(f"the recipe has {many}:\n{_listed(self.problems)}")


class ModelError(UsageError):
    """The base model cannot be found, fetched or understood."""


class FileError(UsageError):
    """A file is damaged, or not what it claims to be, and was not opened any further.

    `path` is the file and `reason` what is wrong with it, for those who list several.
    """

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path} {reason}", remedy)


class DataError(LuthierError):
    """The data is wrong; `problems` lists the rows where there are any."""

    exit_code = 3

    def __init__(self, message: str, remedy: str | None = None, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message + (f"\n{_listed(self.problems)}" if self.problems else ""), remedy)


class FitError(LuthierError):
    """The plan does not fit the machine."""

    exit_code = 4


class TrainingError(LuthierError):
    """Training stopped before its end."""

    exit_code = 5


class ExportError(LuthierError):
    """An export failed, or what was exported is not the model that was trained."""

    exit_code = 6


class Interrupted(LuthierError):  # noqa: N818  (it names what happened, as KeyboardInterrupt does)
    """A signal, a stop file or the clock ended it; what was done is saved, or nothing was left half-written."""

    exit_code = 75


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_WORDS = re.compile(
    rf"os error ({'|'.join(map(str, _FULL))})\b"  # safetensors, in Rust, has an error of its own
    r"|^\d+ requested and \d+ written$"  # numpy's tofile leaves out why; a short write to a file has no other reason
)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that a write found no room: a full disk, a used-up quota, the largest file allowed."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return _FULL_IN_WORDS.search(str(error)) is not None
