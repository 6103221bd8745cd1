"""The `luthier` command: its commands, and the one place where errors become messages and exit codes.

0 done, 1 a defect of ours, 2 usage or recipe, 3 data, 4 does not fit, 5 training stopped, 6 export failed,
75 interrupted with a checkpoint saved, 130 interrupted with nothing half-written.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.markup import escape

from luthier.cli import commands, console
from luthier.errors import Interrupted, LuthierError, UsageError

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
    debugging = len(words) < len(sys.argv) - 1
    try:
        app(args=words, prog_name="luthier")
    except Interrupted as stopped:  # what was asked for, not an error
        console.say(f"{escape(stopped.message)}\n  [bold]next:[/] {escape(stopped.remedy or '')}")
        sys.exit(stopped.exit_code)
    except LuthierError as error:
        if debugging:
            raise
        console.print_error(error)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            console.say("interrupted; nothing was left half-written")
        raise
    except OSError as error:
        if debugging:
            raise
        if error.filename is None:
            _defect(error)
        # A path of the user's: not there, not writable, a file where a folder should be, a full disk.
        console.print_error(UsageError(f"{error.filename}: {error.strerror}", "choose another place, or mend this one"))
        sys.exit(UsageError.exit_code)
    except Exception as error:
        if debugging:
            raise
        _defect(error)


def _defect(error: Exception) -> NoReturn:
    console.print_error(LuthierError(f"a defect of ours: {type(error).__name__}: {error}", _REPORT))
    sys.exit(LuthierError.exit_code)
