"""`luthier verify`: are the files of a run what was written, and does it come to the same losses again?"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from luthier import lock
from luthier.cli import console
from luthier.errors import DataError, FileError, TrainingError, UsageError
from luthier.guard.documents import read_object
from luthier.runs import SCHEMA_VERSION, RunDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from luthier.cli.pins import Pins
    from luthier.train.verify import FileCheck, LoggedStep, Repeated

__all__ = ["run"]


def run(path: Path, steps: int, as_json: bool) -> None:
    """Look at the files, repeat `steps` steps, show both; ends with exit code 5 where something differs.

    Raises UsageError where `path` is no run directory or somebody works in it.
    """
    from luthier.train.verify import check_files, check_strangers

    directory = RunDirectory(path)
    if not directory.recipe.is_file():
        raise UsageError(f"{path} is not a run directory: it has no {directory.recipe.name}", "luthier train makes one")
    lock.check_free(path)
    with console.waiting("reading the run's files"):
        files = check_files(directory)
    start, repeated, notes = _repeated(directory, steps) if steps else (None, [], [])
    notes = [*check_strangers(directory), *notes]
    passed = all(one.fault is None for one in files) and all(one.same for one in repeated)
    if as_json:
        console.print_json(_document(directory, files, start, repeated, notes, passed))
    else:
        _show_files(files)
        _show_steps(start, repeated)
        for note in notes:
            console.say(f"[dim]{escape(note)}[/]")
        console.say("[green]all as it was[/]" if passed else "[bold red]not as it was[/]")
    if not passed:
        raise typer.Exit(TrainingError.exit_code)


def _repeated(run: RunDirectory, steps: int) -> tuple[int | None, list[Repeated], list[str]]:
    """The step repeated from, what came of it, and what else is to be said."""
    from luthier.cli.pins import pins_of
    from luthier.hardware.probe import this_device
    from luthier.train.identity import settings_digest
    from luthier.train.verify import TOLERANCE, changed_settings, choose_start, logged_steps

    logged = logged_steps(run)
    start, pins = choose_start(run, logged, steps), pins_of(run, resume=True)
    if start is None:
        has = f"events.jsonl has {len(logged):,} step" + ("" if len(logged) == 1 else "s")
        return None, [], [f"no step was repeated: {has}, and {steps} in a row are asked for (--steps)"]
    if pins is None:
        return None, [], [f"no step was repeated: the run has {_lacks(run)}"]
    if (kind := this_device().kind) != pins.settings.device:
        trained = f"the run was trained on {pins.settings.device}, and this machine has {kind}"
        return None, [], [f"no step was repeated: {trained}"]
    changed = changed_settings(run, settings_digest(asdict(pins.settings)))
    notes = [changed] if changed else []
    if start == 0:
        notes.append(f"no whole checkpoint has {steps} logged steps after it, so the first steps were taken again")
    wanted = {start + number: logged[start + number] for number in range(1, steps + 1)}
    repeated = _take(run, pins, start, wanted)
    if not all(one.exact for one in repeated):
        notes.append(
            f"steps are held within {TOLERANCE:.1%}: only the CPU and the torch of the run repeat them to the bit"
        )
    return start, repeated, notes


def _lacks(run: RunDirectory) -> str:
    if not run.plan.is_file():
        return f"no {run.plan.name} that says what it began with"
    return "neither an adapter nor a checkpoint"


def _take(run: RunDirectory, pins: Pins, start: int, wanted: Mapping[int, LoggedStep]) -> list[Repeated]:
    from luthier.cli import preparing
    from luthier.cli.loading import load_base
    from luthier.recipe.load import load_recipe
    from luthier.train.verify import repeat

    recipe = load_recipe(run.recipe)
    prepared = preparing.prepare(recipe, pins=pins, folder=run.path)
    if _digest(run) != prepared.digest:
        raise DataError(
            f"the data is not what {run.path} was trained on, so its steps cannot be taken again",
            "put the rows back as they were; --steps 0 looks at the files alone",
        )
    settings = prepared.plan.settings
    found: list[Repeated] = []
    with console.waiting(f"loading {recipe.model}"):
        decoder = load_base(prepared.base, settings.precision, settings.device, settings.quantize)
    with console.counting("taking steps again") as advance:

        def told(one: Repeated) -> None:
            found.append(one)
            advance(len(found), len(wanted))

        repeat(decoder, prepared.dataset, settings, run, start, wanted, told)
    return found


def _digest(run: RunDirectory) -> object:
    """Of the rows that the run was trained on, by its data.json; None where that is not to be read."""
    try:
        return read_object(run.data).get("digest")
    except FileError:
        return None


def _document(
    run: RunDirectory,
    files: Sequence[FileCheck],
    start: int | None,
    repeated: Sequence[Repeated],
    notes: Sequence[str],
    passed: bool,
) -> dict[str, object]:
    return {
        "schema": SCHEMA_VERSION,
        "run": str(run.path),
        "passed": passed,
        "files": [
            {"file": one.file, "bytes": one.bytes, "passed": one.fault is None}
            | ({} if one.fault is None else {**asdict(one.fault), "file": one.file})
            for one in files
        ],
        "repeated": {"from": start, "steps": [asdict(one) for one in repeated]},
        "notes": list(notes),
    }


def _show_files(files: Sequence[FileCheck]) -> None:
    """A line for each folder that is whole, and one for each file that is not as it was."""
    folders: dict[str, list[FileCheck]] = {}
    for one in files:
        parts = Path(one.file).parts
        place = "/".join(parts[:2]) if parts[0] == "checkpoints" else parts[0]
        folders.setdefault(place, []).append(one)
    shown = console.table("files", "file", ">files", ">bytes", "is", "as written", "found")
    for place, inside in folders.items():
        wrong = [one for one in inside if one.fault is not None]
        if not wrong:
            shown.add_row(place, str(len(inside)), f"{sum(one.bytes for one in inside):,}", "whole", "", "")
        for one in wrong:
            if one.fault is not None:
                cells = (one.fault.reason, _short(one.fault.expected), _short(one.fault.found))
                shown.add_row(escape(one.file), "", f"{one.bytes:,}", *(escape(cell) for cell in cells))
    console.output.print(shown)


def _short(text: str) -> str:
    """A hash by its beginning; `--json` has all of it."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)


def _show_steps(start: int | None, repeated: Sequence[Repeated]) -> None:
    if start is None or not repeated:
        return
    place = f"checkpoint step-{start:06d}" if start else "the beginning"
    shown = console.table(
        f"steps taken again from {place}", ">step", ">loss", ">again", ">gradient norm", ">again", "is"
    )
    for one in repeated:
        figures = (one.logged.loss, one.loss, one.logged.grad_norm, one.grad_norm)
        shown.add_row(str(one.step), *(f"{figure!r}" for figure in figures), "the same" if one.same else "different")
    console.output.print()
    console.output.print(shown)
