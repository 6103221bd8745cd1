"""The `luthier` command: its commands, and the one place where errors become messages and exit codes.

0 done, 1 a defect of ours, 2 usage or recipe, 3 data, 4 does not fit, 5 training stopped, 6 export failed,
75 interrupted (with a checkpoint saved where training was under way), 130 interrupted with nothing half-written.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.markup import escape

from luthier.cli import commands, console
from luthier.errors import FitError, Interrupted, LuthierError, UsageError, is_disk_full
from luthier.guard.secrets import printable
from luthier.train.unbroken import unbroken_streams

__all__ = ["app", "main"]

app = typer.Typer(
    name="luthier",
    help="Fine-tune Llama-family models by LoRA and QLoRA on your own data. New here? Type [bold]luthier demo[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.register(app)

_INTERRUPTED = 130
_ENDED: dict[int, LuthierError] = {
    2: UsageError(
        "the command line is not understood: stderr says why", "luthier --help, or --help behind the command"
    ),
    _INTERRUPTED: Interrupted("interrupted; nothing was left half-written"),
}
"""What typer ended itself, by its exit code, for `--json`."""
_REPORT = "the same command with --debug for the traceback, and please report it"


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; may stand anywhere."),
) -> None:
    """Holds the option for `--help`; `main` takes it out of the line before the commands see it."""


def main() -> None:
    """Run a command; every error of the user's becomes a message without a traceback."""
    # Set before the libraries are imported: no warnings about forks nobody asked for, no progress bars but ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debugging, as_json = len(words) < len(sys.argv) - 1, "--json" in words
    with unbroken_streams():
        _run(words, debugging, as_json)


def _run(words: list[str], debugging: bool, as_json: bool) -> None:
    try:
        app(args=words, prog_name="luthier")
    except Interrupted as stopped:  # what was asked for, not an error
        message, remedy = printable(stopped.message), printable(stopped.remedy or "")
        console.say(f"{escape(message)}\n  [bold]next:[/] {escape(remedy)}")
        _end(stopped, as_json)
    except LuthierError as error:
        if debugging:
            raise
        console.print_error(error)
        _end(error, as_json)
    except KeyboardInterrupt:  # before the command began: from there on typer makes an exit of it
        console.say(_ENDED[_INTERRUPTED].message)
        if as_json:
            console.print_failure(_ENDED[_INTERRUPTED], _INTERRUPTED)
        sys.exit(_INTERRUPTED)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            console.say(_ENDED[_INTERRUPTED].message)
        if as_json and isinstance(ended.code, int) and (failed := _ENDED.get(ended.code)):
            console.print_failure(failed, ended.code)
        raise
    except OSError as error:
        if debugging:
            raise
        # A path of the user's: not there, not writable, a file where a folder should be, a full disk.
        _end_badly(error, as_json)
    except Exception as error:
        if debugging:
            raise
        _end_badly(error, as_json)
    finally:
        sys.excepthook = console.print_traceback  # typer has put its own there, which shows secrets


def _end(error: LuthierError, as_json: bool) -> NoReturn:
    if as_json:
        console.print_failure(error, error.exit_code)
    sys.exit(error.exit_code)


def _end_badly(error: Exception, as_json: bool) -> NoReturn:
    """With an error that nobody has put into words for the user."""
    told = LuthierError(f"a defect of ours: {type(error).__name__}: {error}", _REPORT)
    if is_disk_full(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        told = FitError(f"no room on the disk{where}: {error}", "make room, then run the same command again")
    elif isinstance(error, OSError) and error.filename is not None:
        told = UsageError(f"{error.filename}: {error.strerror}", "choose another place, or mend this one")
    console.print_error(told)
    _end(told, as_json)
