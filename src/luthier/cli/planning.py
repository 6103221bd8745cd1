"""The `plan` command: what a recipe will do on a machine, what it takes, and why, before any weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luthier.cli import console, preparing, show
from luthier.errors import UsageError

__all__ = ["run"]


def run(
    recipe: Path,
    sets: list[str] | None,
    hardware: str | None,
    price: float | None,
    margin: float | None,
    why: bool,
    as_json: bool,
) -> None:
    """Plan and show it. `hardware` goes before the recipe's; `price` an hour of the machine; `margin` of memory."""
    from luthier.plan.plan import as_document
    from luthier.recipe.load import load_recipe

    if margin is not None and not 0 <= margin < 1:
        raise UsageError(f"--margin {margin:g} is no share of memory", "0.08 keeps 8 % free; 0 or more, below 1")
    prepared = preparing.prepare(
        load_recipe(recipe, sets or ()),
        weights=False,
        hardware=hardware,
        margin=margin,
    )
    plan = replace(prepared.plan, time=prepared.plan.time.priced(price))
    if as_json:
        console.print_json({**as_document(plan), "notes": prepared.dataset.report.notes})
        return
    show.data_table(prepared)
    show.full_plan(plan, why=why)
    show.data_notes(prepared)
    console.say(f"[dim]next:[/] luthier data check {recipe}  [dim]or[/]  luthier run {recipe}")
