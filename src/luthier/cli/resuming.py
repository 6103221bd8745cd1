"""Whether a command goes on with the run that its directory holds: as it is told to, or because that is unfinished."""

from __future__ import annotations

import os
from difflib import unified_diff
from typing import TYPE_CHECKING

from rich.markup import escape

from luthier.cli import console
from luthier.errors import UsageError
from luthier.recipe.load import dump_recipe
from luthier.runs import RunDirectory
from luthier.train.checkpoints import Checkpoints

if TYPE_CHECKING:
    from luthier.recipe.schema import Recipe

__all__ = ["check_free", "check_stop_file", "goes_on", "is_unfinished"]


def is_unfinished(run: RunDirectory) -> bool:
    """Whether a run was begun here and did not come to its end."""
    return not run.adapter.exists() and (run.events.exists() or run.checkpoints.exists())


def goes_on(run: RunDirectory, recipe: Recipe, *, resume: bool) -> bool:
    """Whether to go on: with `resume`, or where an unfinished run of the very same recipe is there, which is said.

    Training itself looks whether all else is the same too, and refuses where it is not.
    """
    Checkpoints(run.checkpoints).tidy()  # a kill may have left the only checkpoint set aside
    if resume and not Checkpoints(run.checkpoints).steps():
        console.say("nothing to go on from: begins at step 0")
    if resume or not is_unfinished(run) or not run.recipe.is_file():
        return resume
    if run.recipe.read_text(encoding="utf-8") != dump_recipe(recipe):
        return False
    newest = next(iter(Checkpoints(run.checkpoints).steps()), None)
    place = "from its beginning: it had no checkpoint yet" if newest is None else f"from step {newest}"
    console.say(f"{escape(str(run.path))} holds this run, unfinished: going on {place}")
    return True


def check_free(run: RunDirectory, recipe: Recipe, *, resume: bool) -> None:
    """Raise UsageError where `run` holds another run, or a recipe that this one would overwrite."""
    from luthier.train.resume import check_directory

    check_directory(run, resume=resume)
    if resume or not run.recipe.is_file() or run.recipe.read_text(encoding="utf-8") == dump_recipe(recipe):
        return
    if is_unfinished(run):
        raise UsageError(
            f"{run.path} holds an unfinished run, and its recipe.yaml is not what is asked for now:\n"
            + _difference(run.recipe.read_text(encoding="utf-8"), dump_recipe(recipe)),
            "--resume shows the difference, and goes on where that is safe: more train.steps, another train.keep, "
            "save_every, eval_every, max_time, stop_file or on_nonfinite, other exports; or train into another "
            "directory (--out)",
        )
    raise UsageError(
        f"{run.recipe} is there already, and training would write another in its place",
        "train into a directory of its own (--out)",
    )


def _difference(then: str, now: str) -> str:
    """The lines in which two recipes differ, under the part that each is in."""
    part, said = "", list[str]()
    for line in unified_diff(then.splitlines(), now.splitlines(), lineterm="", n=1000):
        sign, text = line[:1], line[1:]
        if line.startswith(("---", "+++", "@@")):
            continue
        if text[:1].strip():
            part = text.partition(":")[0]
        if sign in "+-":
            inner = text if text[:1].strip() else f"{part}: {text.strip()}"
            said.append(f"  {'then' if sign == '-' else 'now '}  {inner}")
    return "\n".join(said)


def check_stop_file(recipe: Recipe) -> None:
    """Raise UsageError where the stop file is there before the command has begun: the run would stop at once."""
    if recipe.train.stop_file is not None and os.path.exists(recipe.train.stop_file):
        raise UsageError(
            f"train.stop_file: {recipe.train.stop_file} is there already, so the run would stop at once",
            "remove it, or name another one",
        )
