"""The displays: what a terminal shows, and that a log file gets plain lines and not too many."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from luthier.train.display import PlainDisplay, RichDisplay, Smoothed, duration, make_display, sparkline
from luthier.train.events import (
    EndEvent,
    InterruptEvent,
    Listener,
    ProgressEvent,
    ProofEvent,
    StartEvent,
    WarningEvent,
)
from tests.train.test_events import eval_event, step_event

START = StartEvent(step=0, steps=50, train_rows=9, eval_rows=2, trainable_parameters=12_345)
END = EndEvent(
    step=50,
    seconds=75.0,
    tokens=16_050,
    first_eval=2.0,
    last_eval=1.5,
    best_eval=1.25,
    adapter_from="best",
    adapter_step=40,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def run_through(display: Listener, clock: Clock) -> None:
    display.on_start(START)
    display.on_eval(eval_event(0, 2.0))
    for step in range(1, 51):
        clock.now += 1.0
        display.on_step(step_event(step, 3.0 - step / 25))
        if step == 40:
            display.on_eval(eval_event(step, 1.25))
    display.on_warning(WarningEvent(step=50, message="fp16 overflow"))
    display.on_end(END)
    display.close()


def test_plain_lines_have_no_control_characters_and_keep_their_distance() -> None:
    stream, clock = io.StringIO(), Clock()
    run_through(PlainDisplay(stream, clock), clock)
    text = stream.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text)
    steps = [line for line in text.splitlines() if line.startswith("step ") and "/50" in line]
    # 50 steps of a second each: the first, the last, and every fifth second between
    assert [line.split()[1] for line in steps] == ["1/50", *(f"{n}/50" for n in range(6, 50, 5)), "50/50"]
    assert "0:24 left" in next(line for line in steps if line.startswith("step 26/"))
    assert "held-out loss 1.2500" in text
    assert "warning at step 50: fp16 overflow" in text
    assert text.splitlines()[-1] == (
        "trained 50 steps, 16,050 tokens in 1:15, held-out loss 2.0000 -> 1.2500; the adapter is of step 40 (best)"
    )


PROOF = ProofEvent(
    step=0,
    tokens=4_096,
    longest=2_048,
    documents=2,
    micro_batch=2,
    checkpointing=3,
    measured_gib=10.5,
    reserved_gib=11.0,
    predicted_gib=10.0,
    error=0.05,
    measured_seconds=1.0,
    predicted_seconds=1.25,
    error_seconds=-0.2,
)


def test_a_log_file_tells_of_the_proof_and_of_a_long_evaluation() -> None:
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, clock)
    display.on_start(START)
    for done in (0, 1):
        display.on_progress(ProgressEvent("proof", 0, done, 2, 4_096))
    display.on_proof(PROOF)
    display.on_proof(replace(PROOF, documents=1, predicted_gib=None, error=None, predicted_seconds=None))
    for done in range(1, 41):
        clock.now += 0.5
        display.on_progress(ProgressEvent("evaluation", 0, done, 40))
    assert stream.getvalue().splitlines()[1:] == [
        "trying the largest micro-batch first (4,096 tokens)",
        "the largest micro-batch, 4,096 tokens in 2 rows, takes 10.50 GiB (predicted 10.00, +5%) and 1 s "
        "(predicted 1.25, -20%)",
        "the largest micro-batch, 4,096 tokens in 1 row, takes 10.50 GiB and 1 s",
        *(f"measuring the held-out loss, {done} of 40 rows" for done in (11, 22, 33)),
    ]


def test_the_live_panel_shows_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=Terminal(), width=100, force_terminal=True)
    display = RichDisplay(console, Clock())

    def shown() -> str:
        with console.capture() as capture:
            console.print(display.render())
        return capture.get()

    display.on_start(START)
    display.on_progress(ProgressEvent("proof", 0, 0, 2, 4_096))
    assert "trying the largest micro-batch first (4,096 tokens)" in shown()
    display.on_proof(PROOF)
    assert "trying" not in shown()
    display.on_progress(ProgressEvent("evaluation", 0, 8, 40))
    assert "8 of 40 rows" in shown()
    display.on_eval(eval_event(0, 2.0))
    assert "of 40 rows" not in shown()
    display.close()


def test_the_live_panel_shows_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream, clock = Terminal(), Clock()
    console = Console(file=stream, width=100, force_terminal=True)
    display = RichDisplay(console, clock)
    display.on_start(START)
    display.on_eval(eval_event(0, 2.0))
    clock.now += 10
    for step in range(1, 11):
        display.on_step(step_event(step, 3.0 - step / 25))
    display.on_eval(eval_event(10, 1.25))
    display.on_step(step_event(11, 2.5))
    with console.capture() as capture:
        console.print(display.render())
    shown = capture.get()
    display.on_interrupt(InterruptEvent(step=11, signal="SIGTERM"))
    display.close()
    assert "11/50" in shown
    assert "0:35 left" in shown  # 10 s for 11 steps, 39 to go: 35.45 s
    assert "loss 2.5000" in shown.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert "█" in shown
    assert "1,234" in shown
    assert "1.25" in shown
    assert "from 2.0000" in shown
    assert "\x1b[?25h" in stream.getvalue(), "the cursor is given back"
    assert "stopped" not in stream.getvalue(), "the error that follows says it"


def test_a_terminal_gets_the_live_panel_and_a_file_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(make_display(Terminal()), RichDisplay)
    assert isinstance(make_display(io.StringIO()), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(Terminal()), PlainDisplay)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=99), st.integers(1, 50))
def test_a_sparkline_is_as_wide_as_asked_and_marks_the_greatest(values: list[float], width: int) -> None:
    bars = sparkline(values, width)
    shown = values[-width:]
    assert len(bars) == len(shown)
    if max(shown) > min(shown):
        assert bars[shown.index(max(shown))] == "█"
        assert bars[shown.index(min(shown))] == "▁"


def test_the_smoothed_loss_of_equal_losses_is_that_loss() -> None:
    mean = Smoothed()
    # the bias correction divides two sums of the same weights: a few ulp
    assert [mean.add(1.7) for _ in range(9)] == pytest.approx([1.7] * 9, rel=1e-14)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
