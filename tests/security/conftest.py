from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.command import Command, Ended

ROWS: list[dict[str, object]] = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(12)]

Refused = Callable[..., Ended]


class Payload:
    """Writes a file when it is unpickled: what a real one would do, without the harm."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that a payload would write."""
    return tmp_path / "marker"


@pytest.fixture
def payload(marker: Path, tmp_path: Path) -> bytes:
    """A pickle that writes the marker when it is opened; tried once, so that it is known to work."""
    made = pickle.dumps(Payload(marker))
    pickle.loads(made)  # noqa: S301  (ours)
    assert marker.exists()
    marker.unlink()
    return made


@pytest.fixture
def luthier(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capfd)


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole_model: Path, tmp_path: Path) -> Path:
    """A model's folder to do harm to, with rows and a recipe beside it."""
    folder = tmp_path / "model"
    shutil.copytree(whole_model, folder)
    tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    text = "model: ./model\ndata: rows.jsonl\ntrain: {steps: 2, batch_size: 2, precision: fp32}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def refused(luthier: Command, marker: Path) -> Refused:
    """Run a command that must end with a message and no more: not a traceback, not a run directory, not the marker."""

    def run(words: tuple[object, ...], *said: str, code: int = 2, try_said: bool = True, panics: bool = False) -> Ended:
        ended = luthier(*words)
        assert ended.code == code, ended.err
        for word in said:
            assert word in ended.message, ended.err
        assert len(re.findall("^error:", ended.err, re.MULTILINE)) == 1, ended.err
        assert "try:" in ended.err or not try_said  # a recipe's problems have their remedies beside them
        assert "Traceback" not in ended.err
        assert ("panicked" in ended.err) is panics  # said by the library itself, before ours
        assert not marker.exists()
        return ended

    return run
