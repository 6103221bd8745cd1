"""What a person sees while training: a live panel on a terminal, plain lines elsewhere. Both write to stderr.

`make_display` chooses by what stderr is. The live panel redraws at most `REDRAWS_PER_SECOND` times a second, whatever
the speed of the steps; the plain one writes a line every `PLAIN_SECONDS` seconds and no control characters, for log
files and CI. Where stderr can no longer be written to they go on saying nothing (unbroken.py).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from luthier.train.events import (
    EndEvent,
    EvalEvent,
    InterruptEvent,
    Listener,
    ProgressEvent,
    ProofEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from luthier.train.unbroken import unbroken

__all__ = ["PlainDisplay", "RichDisplay", "Smoothed", "duration", "make_display", "sparkline"]

REDRAWS_PER_SECOND = 8
PLAIN_SECONDS = 5.0
SPARK_WIDTH = 40
_BARS = "▁▂▃▄▅▆▇█"


def make_display(stream: TextIO | None = None) -> Listener:
    """The live panel when `stream` (stderr if None) is a terminal that can move its cursor, else plain lines."""
    stream = unbroken(sys.stderr if stream is None else stream)
    console = Console(file=stream)
    live = console.is_terminal and not console.is_dumb_terminal
    return RichDisplay(console) if live else PlainDisplay(stream)


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """The last `width` values as bars between their least and greatest; all equal gives the lowest bar."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in shown)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Smoothed:
    """An exponential mean with its start-up bias removed (as Adam's moments; Kingma & Ba 2015, sec. 3)."""

    def __init__(self, decay: float = 0.9) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def add(self, value: float) -> float:
        """Take one value in; returns the mean."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight


def _against(predicted: float | None, error: float | None, form: str) -> str:
    """What was predicted, behind what was measured."""
    if predicted is None or error is None:
        return ""
    return f" (predicted {predicted:{form}}, {error:+.0%})"


class _Progress:
    """What both displays know: the newest events, the smoothed loss and the time left."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.start: StartEvent | None = None
        self.step: StepEvent | None = None
        self.first_eval: EvalEvent | None = None
        self.last_eval: EvalEvent | None = None
        self.best_eval: EvalEvent | None = None
        self.doing: ProgressEvent | None = None
        self.losses: deque[float] = deque(maxlen=SPARK_WIDTH)
        self.smoothed = 0.0
        self._mean = Smoothed()
        self._began = clock()

    def starts(self, event: StartEvent) -> None:
        self.start, self._began = event, self.clock()

    def takes(self, event: StepEvent) -> None:
        self.step, self.doing = event, None
        self.losses.append(event.loss)
        self.smoothed = self._mean.add(event.loss)

    def evaluates(self, event: EvalEvent) -> None:
        self.doing = None
        self.first_eval = self.first_eval or event
        self.last_eval = event
        self.best_eval = event if event.best else self.best_eval

    @property
    def at(self) -> int:
        return self.step.step if self.step else self.start.step if self.start else 0

    @property
    def steps(self) -> int:
        return self.start.steps if self.start else 0

    def seconds_left(self) -> float | None:
        """By the mean pace since the start, evaluations and saving included; None before the first step."""
        if self.start is None or self.step is None or self.at <= self.start.step:
            return None
        return (self.clock() - self._began) / (self.at - self.start.step) * (self.steps - self.at)

    def doing_what(self, event: ProgressEvent) -> str:
        if event.doing == "proof":
            return f"trying the largest micro-batch first ({event.tokens:,} tokens)"
        return f"measuring the held-out loss, {event.done:,} of {event.total:,} rows"

    def proof(self, event: ProofEvent) -> str:
        self.doing = None
        memory = f"{event.measured_gib:.2f} GiB" + _against(event.predicted_gib, event.error, ".2f")
        seconds = f"{event.measured_seconds:.3g} s" + _against(event.predicted_seconds, event.error_seconds, ".3g")
        rows = f"{event.documents} row" + ("" if event.documents == 1 else "s")
        return f"the largest micro-batch, {event.tokens:,} tokens in {rows}, takes {memory} and {seconds}"

    def ending(self, event: EndEvent) -> str:
        held_out = ""
        if event.first_eval is not None and event.best_eval is not None:
            held_out = f", held-out loss {event.first_eval:.4f} -> {event.best_eval:.4f}"
        if self.start is not None and self.start.step == event.step:
            done = f"all {event.step} steps were done before, nothing was left to train"
            return f"{done}{held_out}; the adapter is of step {event.adapter_step} ({event.adapter_from})"
        return (
            f"trained {event.step} steps, {event.tokens:,} tokens in {duration(event.seconds)}{held_out}; "
            f"the adapter is of step {event.adapter_step} ({event.adapter_from})"
        )


class PlainDisplay:
    """A line every `PLAIN_SECONDS` seconds, and one for each evaluation, warning and the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._progress, self._said = unbroken(stream), _Progress(clock), clock()

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def on_start(self, event: StartEvent) -> None:
        self._progress.starts(event)
        self._say(
            f"training {event.trainable_parameters:,} parameters on {event.train_rows:,} rows, "
            f"steps {event.step} to {event.steps}"
        )

    def on_proof(self, event: ProofEvent) -> None:
        self._say(self._progress.proof(event))

    def on_progress(self, event: ProgressEvent) -> None:
        """The proof's beginning; of an evaluation a line now and then."""
        now = self._progress.clock()
        if event.done == 0 if event.doing == "proof" else event.done < event.total and now - self._said > PLAIN_SECONDS:
            self._said = now
            self._say(self._progress.doing_what(event))

    def on_step(self, event: StepEvent) -> None:
        progress, now = self._progress, self._progress.clock()
        progress.takes(event)
        if now - self._said < PLAIN_SECONDS and event.step not in (1, progress.steps):
            return
        self._said = now
        left = progress.seconds_left()
        self._say(
            f"step {event.step}/{progress.steps}  loss {event.loss:.4f} (smoothed {progress.smoothed:.4f})  "
            f"lr {event.learning_rate:.2e}  {event.tokens_per_second:,.0f} tokens/s  "
            f"{event.memory_allocated_gib:.2f} GiB" + ("" if left is None else f"  {duration(left)} left")
        )

    def on_eval(self, event: EvalEvent) -> None:
        self._progress.evaluates(event)
        best = "  (best)" if event.best else ""
        self._say(f"step {event.step}  held-out loss {event.loss:.4f}  perplexity {event.perplexity:.2f}{best}")

    def on_save(self, event: SaveEvent) -> None:
        """Nothing: saving is routine, and the event log has it."""

    def on_warning(self, event: WarningEvent) -> None:
        self._say(f"warning at step {event.step}: {event.message}")

    def on_interrupt(self, event: InterruptEvent) -> None:
        """Nothing: the error that follows says it, and what to do next."""

    def on_end(self, event: EndEvent) -> None:
        self._say(self._progress.ending(event))

    def close(self) -> None:
        """Nothing is held open."""


class RichDisplay:
    """A live panel: bar with time left, loss with sparkline, held-out loss, rate, speed, memory."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._progress = console, _Progress(clock)
        self._sparks = console.encoding.lower().startswith("utf")
        self._live = Live(
            console=console, refresh_per_second=REDRAWS_PER_SECOND, get_renderable=self.render, redirect_stdout=False
        )

    def render(self) -> RenderableType:
        """The panel as it is now. Called by the drawing thread; it only reads."""
        progress, step = self._progress, self._progress.step
        left = progress.seconds_left()
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text("training", style="bold"),
            ProgressBar(total=max(1, progress.steps), completed=progress.at, width=SPARK_WIDTH),
            f"{progress.at}/{progress.steps}",
            "" if left is None else f"{duration(left)} left",
        )
        lines: list[RenderableType] = [bar]
        if (doing := progress.doing) is not None:
            lines.append(Text(progress.doing_what(doing), style="dim"))
        if step is not None:
            loss = Text.assemble(("loss ", "dim"), (f"{step.loss:.4f}", "bold"), ("  smoothed ", "dim"))
            loss.append(f"{progress.smoothed:.4f}")
            if self._sparks:
                loss.append(f"  {sparkline(progress.losses)}", style="cyan")
            lines.append(loss)
        if progress.last_eval is not None:
            lines.append(self._held_out())
        if step is not None:
            figures = Text.assemble(("lr ", "dim"), f"{step.learning_rate:.2e}", ("  grad ", "dim"))
            figures.append(f"{step.grad_norm:.3f}  {step.tokens_per_second:,.0f} ").append("tokens/s  ", style="dim")
            figures.append(f"{step.memory_allocated_gib:.2f} ").append("GiB  epoch ", style="dim")
            lines.append(figures.append(f"{step.epoch:.2f}"))
        return Group(*lines)

    def _held_out(self) -> Text:
        progress, text = self._progress, Text.assemble(("held-out loss ", "dim"))
        if progress.last_eval:
            text.append(f"{progress.last_eval.loss:.4f}", style="bold green" if progress.last_eval.best else "bold")
        if progress.first_eval and progress.first_eval is not progress.last_eval:
            text.append(f"  from {progress.first_eval.loss:.4f}", style="dim")
        if progress.best_eval and progress.best_eval is not progress.last_eval:
            text.append(f"  best {progress.best_eval.loss:.4f} at {progress.best_eval.step}", style="dim")
        return text

    def on_start(self, event: StartEvent) -> None:
        self._progress.starts(event)
        self._live.start()

    def on_proof(self, event: ProofEvent) -> None:
        self._console.print(Text(self._progress.proof(event), style="dim"))

    def on_progress(self, event: ProgressEvent) -> None:
        self._progress.doing = event

    def on_step(self, event: StepEvent) -> None:
        self._progress.takes(event)

    def on_eval(self, event: EvalEvent) -> None:
        self._progress.evaluates(event)

    def on_save(self, event: SaveEvent) -> None:
        """Nothing: saving is routine, and the event log has it."""

    def on_warning(self, event: WarningEvent) -> None:
        self._console.print(Text(f"warning at step {event.step}: {event.message}", style="yellow"))

    def on_interrupt(self, event: InterruptEvent) -> None:  # noqa: ARG002  (a listener's)
        """Leave the terminal to the error that follows: it says why, and what to do next."""
        self.close()

    def on_end(self, event: EndEvent) -> None:
        self.close()
        self._console.print(Text(self._progress.ending(event), style="green"))

    def close(self) -> None:
        """Leave the last panel on the screen and give the cursor back. May be called twice."""
        self._live.stop()
