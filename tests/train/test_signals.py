"""Real signals to a real training process: the first saves and ends with exit code 75, a second ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from luthier.train.signals import StopSignals
from tests.train.test_loop import assert_same_run, run_it
from tests.train.world import checkpoint, events_of

ROOT = Path(__file__).resolve().parent.parent.parent
STEP = 3


def training(model: Path, out: Path) -> subprocess.Popen[str]:
    """A process that has made three updates, its last checkpoint after the second, and waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.process", str(model), str(out), str(STEP)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != f"at {STEP}\n":
        _, errors = process.communicate(timeout=60)
        pytest.fail(f"the process said {line!r}:\n{errors}")
    return process


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The process has one thread: sums of the same terms, in the same order, here too."""
    import torch

    torch.set_num_threads(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tiny_llama: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    process = training(tiny_llama, out)
    process.send_signal(number)
    _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 75, errors
    assert f"{number.name}: stopped after step 3 of 8" in errors
    assert "--resume" in errors
    assert [(line["event"], line["step"]) for line in events_of(out / "events.jsonl")][-2:] == [
        ("save", 3),
        ("interrupt", 3),
    ]
    expected = run_it(tiny_llama, tmp_path / "whole")
    assert_same_run(out, run_it(tiny_llama, out, resume=True), (tmp_path / "whole", expected))


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_goes_is_no_second_signal(tiny_llama: Path, tmp_path: Path, first: signal.Signals) -> None:
    """The shell sends its jobs one SIGHUP and the kernel another; systemd one behind its SIGTERM."""
    out = tmp_path / "run"
    process = training(tiny_llama, out)
    for number in (first, signal.SIGHUP, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.05)
    _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 75, errors
    assert checkpoint(out).name == "step-000003"


def test_a_second_signal_stops_at_once_with_the_checkpoint_whole(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = training(tiny_llama, out)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # without the line that it waits for
    # Sent at once, they may be handled in either order.
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM), errors
    assert checkpoint(out).name == "step-000002"
    expected = run_it(tiny_llama, tmp_path / "whole")
    assert_same_run(out, run_it(tiny_llama, out, resume=True), (tmp_path / "whole", expected))


def test_a_killed_process_loses_no_more_than_since_its_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = training(tiny_llama, out)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    expected = run_it(tiny_llama, tmp_path / "whole")
    assert_same_run(out, run_it(tiny_llama, out, resume=True), (tmp_path / "whole", expected))


def test_off_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopSignals() as stop:
            seen.extend([stop.received, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]
