"""What a signal becomes in a command at work: Interrupted, also where a library made another error of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.working import stage, working
from luthier.errors import DataError, Interrupted
from luthier.train.signals import StopSignals


def torch_swallows(number: signal.Signals) -> None:
    """As torch's C code does with an exception that comes while it looks at its arguments."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object type torch.storage.UntypedStorage") from None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_error_made_of_a_signal_is_the_interruption(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(Interrupted, match=f"{number.name}: stopped while luthier run was at work"),
        working(tmp_path, "luthier run", resumes=True),
    ):
        torch_swallows(number)
    assert signal.getsignal(number) is before
    assert not list(tmp_path.iterdir())


def test_the_stage_that_was_stopped_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(Interrupted, match="SIGTERM: stopped while gguf was written"),
        working(tmp_path, "luthier run", resumes=True),
        stage("gguf was written"),
    ):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_goes_is_no_second_signal(tmp_path: Path, first: signal.Signals) -> None:
    """It would end the process here and now."""

    def both() -> None:
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(signal.SIGHUP)

    with pytest.raises(Interrupted, match=f"{first.name}: stopped"), working(tmp_path, "luthier run", resumes=True):
        both()


WITHIN_A_TEXT = """
import signal, sys
from pathlib import Path
from luthier.cli.working import working
from luthier.errors import Interrupted
try:
    with working(Path(sys.argv[1]), "luthier run", resumes=True):
        exec("signal.raise_signal(signal.SIGTERM)")
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


def test_a_signal_within_code_from_a_text_ends_with_our_exit_code(tmp_path: Path) -> None:
    """As a module's dataclasses are made while it is imported: Python would kill itself at its end."""
    ended = subprocess.run([sys.executable, "-c", WITHIN_A_TEXT, str(tmp_path)], check=False)
    assert ended.returncode == 75


def test_an_error_without_a_signal_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3"), working(tmp_path, "luthier run", resumes=True):
        raise DataError("rows.jsonl: line 3")


def test_an_error_made_of_a_second_signal_in_training_is_that_signal() -> None:

    def both() -> None:
        signal.raise_signal(signal.SIGTERM)
        torch_swallows(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught, StopSignals():
        both()
    assert caught.value.args == (signal.SIGINT,)


def test_an_error_after_the_first_signal_in_training_is_an_error() -> None:
    """The first does not interrupt anything: what goes wrong afterwards went wrong by itself."""

    def both() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"), StopSignals():
        both()
