"""Where words go: results to stdout, progress and messages to stderr; one JSON document on stdout with `--json`."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

import orjson
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table

from luthier.errors import LuthierError
from luthier.guard.secrets import printable, visible

__all__ = [
    "Advance",
    "counting",
    "output",
    "print_error",
    "print_failure",
    "print_json",
    "print_traceback",
    "say",
    "table",
    "waiting",
]


class _Screen(Console):
    """A console on which only our own words move the cursor: those of files and rows are written out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


output = _Screen(highlight=False)
messages = _Screen(stderr=True, highlight=False)

LINE_SECONDS = 5.0

Advance = Callable[[int, int], None]
"""Called with (done, of how many) as work goes on."""


def say(text: str) -> None:
    """A message to the user, on stderr, in rich's markup: `escape` what is not ours.

    Without a terminal no line is broken, so that log files can be searched.
    """
    messages.print(text, soft_wrap=not messages.is_terminal)


def print_json(document: object) -> None:
    """The one JSON document of a command with `--json`."""
    sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


def print_failure(error: LuthierError, exit_code: int) -> None:
    """The one JSON document of a command with `--json` that failed: what `print_error` says, for programs."""
    remedy = None if error.remedy is None else printable(error.remedy)
    told = {"kind": type(error).__name__, "message": printable(error.message), "remedy": remedy, "exit_code": exit_code}
    print_json({"error": told})


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own traceback on stderr, without secrets and control characters: for `sys.excepthook`."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def print_error(error: LuthierError) -> None:
    """What happened, where, and what to try next; never a traceback."""
    say(f"[bold red]error:[/] {escape(printable(error.message))}")
    if error.remedy:
        say(f"  [bold]try:[/] {escape(printable(error.remedy))}")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something is being done that cannot be counted. `what` is text, not markup."""
    what = escape(what)
    if messages.is_terminal:
        with messages.status(what):
            yield
    else:
        say(f"{what} …")
        yield


def _lines(what: str) -> Advance:
    said = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal said
        if done < total and time.monotonic() - said > LINE_SECONDS:
            said = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")

    return advance


@contextmanager
def counting(what: str) -> Iterator[Advance]:
    """A bar for work that can be counted; where there is no terminal a line every LINE_SECONDS."""
    if not messages.is_terminal:
        say(f"{what} …")
        yield _lines(what)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def table(title: str, *columns: str) -> Table:
    """A table in the house's style; columns that start with `>` are numbers, set to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        made.add_column(name, justify="right" if column != name else "left", overflow="fold")
    return made
