"""`luthier demo`: the whole way on the bundled model and data, ending with what a newcomer wants to see."""

from __future__ import annotations

import time
from pathlib import Path

from luthier.cli import console, show, stages
from luthier.recipe.init import preset_file
from luthier.recipe.load import load_recipe
from luthier.runs import RunDirectory
from luthier.train.display import duration

__all__ = ["run"]

PRESET = "pirate"


def run(out: Path | None, as_json: bool) -> None:
    """Run the preset in `out`, or in a run directory that is not there yet."""
    began = time.perf_counter()
    directory = RunDirectory(_free(Path("runs") / "demo") if out is None else out)
    console.say(
        "[bold]luthier demo[/]: sprig, a small model that answers plain questions, learns to answer them like a pirate "
        "and must keep what it knows."
    )
    document = stages.run_all(stages.prepare(load_recipe(preset_file(PRESET))), directory, resume=False)
    if as_json:
        console.print_json(document)
        return
    show.ending(directory, document)
    console.say(f"\ndone in {duration(time.perf_counter() - began)}")


def _free(wanted: Path) -> Path:
    """`wanted`, or with the first number behind it that no run has."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path
