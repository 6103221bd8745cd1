"""`luthier data check` and `luthier data show`: their options and help.

`show` has more arguments than the rule allows: they are its command line, each documented where it stands.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json, Sets

__all__ = ["app"]

app = typer.Typer(help="Look at your data: what is wrong with it, and what the model will see.", no_args_is_help=True)

Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE-or-DATA", help="A recipe (.yaml); or a file, a folder, pirate, tales or a data set on the hub."
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Whose tokenizer and chat template; without a recipe sprig's, if left out."),
]


class Side(str, Enum):
    """The sides of a split, as options take them."""

    TRAIN = "train"
    EVAL = "eval"
    TEST = "test"


@app.command()
def check(target: Target, model: Model = None, sets: Sets = None, as_json: Json = False) -> None:
    """Find what is wrong with the rows: every bad one, duplicates, leaks, suspicious texts, lengths; in one pass."""
    from luthier.cli import data_check

    data_check.check(target, model, sets, as_json)


@app.command()
def show(
    target: Target,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="How many rows, spread over the data.")] = None,
    row: Annotated[int | None, typer.Option("--row", min=0, help="One row, by its number from 0.")] = None,
    at: Annotated[str | None, typer.Option("--at", metavar="FILE:LINE", help="One row, by where it stands.")] = None,
    split: Annotated[Side | None, typer.Option("--split", help="Only rows of this side.")] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="The packs of the first step, with their boundaries.")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Every token's border, with its id.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page to look at instead.")
    ] = None,
    model: Model = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Show real rows as the model will see them: what is trained, what is prompt, which tokens are special."""
    from luthier.cli import data_show

    options = data_show.ShowOptions(
        model=model,
        sets=tuple(sets or ()),
        rows=rows,
        row=row,
        at=at,
        split=None if split is None else split.value,
        packed=packed,
        tokens=tokens,
        html=html,
        as_json=as_json,
    )
    data_show.show(target, options)
