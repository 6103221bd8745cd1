"""`luthier demo`: the whole way on the bundled model and data, ending with what a newcomer wants to see."""

from __future__ import annotations

import time
from pathlib import Path

from luthier.cli import console, preparing, show, stages
from luthier.cli.pins import pins_of
from luthier.cli.resuming import check_free, goes_on
from luthier.cli.working import stage, working
from luthier.recipe.init import preset_file
from luthier.recipe.load import load_recipe
from luthier.runs import RunDirectory
from luthier.train.display import duration

__all__ = ["run"]

PRESET = "pirate"


def run(out: Path | None, resume: bool, as_json: bool) -> None:
    """Run the preset in `out`, or in a run directory that is not there yet; to resume, in the newest that is."""
    began = time.perf_counter()
    directory = RunDirectory(_numbered(Path("runs") / "demo", newest=resume) if out is None else out)
    console.say(
        "[bold]luthier demo[/]: sprig, a small model that answers plain questions, learns to answer them like a pirate "
        "and must keep what it knows."
    )
    recipe = load_recipe(preset_file(PRESET))
    with working(directory.path, "luthier demo", resumes=True):
        with stage("the data was read"):
            resume = goes_on(directory, recipe, resume=resume)
            check_free(directory, recipe, resume=resume)
            pins = pins_of(directory, resume=True) if resume else None
            prepared = preparing.prepare(recipe, pins=pins, folder=directory.path)
        document = stages.run_all(prepared, directory, resume=resume)
    if as_json:
        console.print_json(document)
        return
    show.ending(directory, document)
    console.say(f"\ndone in {duration(time.perf_counter() - began)}")


def _numbered(first: Path, *, newest: bool) -> Path:
    """runs/demo, runs/demo-2, …: the first that is not there, or the last that is."""
    found, number = first, 1
    while found.exists():
        number += 1
        before, found = found, first.with_name(f"{first.name}-{number}")
    return before if newest and number > 1 else found
