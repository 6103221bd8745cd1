"""Where words go: results to stdout, progress and messages to stderr; one JSON document on stdout with `--json`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import orjson
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from luthier.errors import LuthierError

__all__ = ["Advance", "counting", "output", "print_error", "print_json", "say", "table", "waiting"]

output = Console(highlight=False)
messages = Console(stderr=True, highlight=False)

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


def print_error(error: LuthierError) -> None:
    """What happened, where, and what to try next; never a traceback."""
    say(f"[bold red]error:[/] {escape(error.message)}")
    if error.remedy:
        say(f"  [bold]try:[/] {escape(error.remedy)}")


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


@contextmanager
def counting(what: str) -> Iterator[Advance]:
    """A bar for work that can be counted; nothing moves where there is no terminal."""
    if not messages.is_terminal:
        say(f"{what} …")
        yield lambda _done, _total: None
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
