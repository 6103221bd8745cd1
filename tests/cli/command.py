"""Run a `luthier` command line in this process, as `main` would, and catch what it prints and its exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from luthier.cli.main import main


@dataclass(frozen=True)
class Ended:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stands on stderr, line breaks that the terminal's width made taken out."""
        return " ".join(self.err.split())


class Command:
    """`luthier WORD…`; the call never raises, as a shell would not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *words: object) -> Ended:
        self._capfd.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        out, err = self._capfd.readouterr()
        return Ended(code, out, err)
