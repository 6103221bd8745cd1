"""`luthier merge` and `luthier export`: one run directory, held meanwhile; what was written, or verified again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli import console
from luthier.cli.exporting import KINDS, Wanted
from luthier.cli.proving import Prover, again, exported
from luthier.cli.working import working
from luthier.errors import UsageError
from luthier.runs import SCHEMA_VERSION

if TYPE_CHECKING:
    from luthier.cli.pins import Pins
    from luthier.export.merge import How

__all__ = ["export_one", "run", "verify_again"]


@contextmanager
def _opened(path: Path, command: str, sets: Sequence[str] = ()) -> Iterator[tuple[Prover, Pins | None]]:
    """The run in `path`, with its base at the commit that it began with, held as `command`; its recipe with `sets`."""
    from luthier.cli import stages
    from luthier.cli.pins import base_name, pins_of
    from luthier.model.locate import locate_model

    other = [one for one in sets if not one.startswith("ollama.")]
    if other:
        raise UsageError(f"--set {other[0]} is not for an export: the model is trained", "--set ollama.… alone")
    directory, recipe = stages.reopen(path, sets)
    with working(directory.path, command, resumes=False):
        pins = pins_of(directory, resume=False)
        yield Prover(directory, recipe, locate_model(base_name(recipe, pins))), pins


def run(path: Path, onto_quantised: bool, reversible: bool, undo: bool, verify: bool) -> dict[str, object]:
    """Merge, or undo a merge."""
    if undo:
        if onto_quantised or reversible:
            raise UsageError("--undo goes with no other option of merge", "leave the others out")
        return _undo(path)
    with _opened(path, "luthier merge") as (prover, pins):
        return exported(prover, Wanted("hf", how=_how(path, pins, onto_quantised, reversible)), verify=verify)


def _how(path: Path, pins: Pins | None, onto_quantised: bool, reversible: bool) -> How:
    from luthier.export.merge import How

    if not onto_quantised:
        return How(reversible=reversible)
    held = "none" if pins is None else pins.settings.quantize
    if pins is None or held != "nf4":
        what = "not quantised" if held == "none" else f"held in {held}"
        raise UsageError(
            f"the base of {path} was {what} in training, so there is no 4-bit base to merge onto",
            "leave out --onto-quantised",
        )
    return How(pins.settings.precision, reversible)


def _undo(path: Path) -> dict[str, object]:
    from luthier.cli import stages
    from luthier.cli.working import stage
    from luthier.export.unmerge import unmerge

    directory, _ = stages.reopen(path)
    with working(directory.path, "luthier merge", resumes=False):
        out = directory.export("base")
        with console.waiting("writing the base back"), stage("the base was written back"):
            found = unmerge(directory.export("hf"), out)
    return {"kind": "base", "path": str(found.folder), "files": found.files}


def export_one(
    path: Path, wanted: Wanted, sets: Sequence[str], *, verify: bool, push_to: str | None
) -> dict[str, object]:
    """Write one export, and verify it where that is asked; push it to the hub as `push_to`. `sets` change settings of
    the recipe for this export alone."""
    if push_to is not None:
        from luthier.export.push import check_name

        check_name(push_to)
        if wanted.kind != "hf" or not verify:
            raise UsageError("--push is for --to hf, verified", "luthier export RUN --to hf --push owner/name")
    with _opened(path, "luthier export", sets) as (prover, _):
        if push_to is None:
            return exported(prover, wanted, verify=verify)
        made = _merged_before(prover) or exported(prover, wanted, verify=verify)
        return made | {"pushed": _push(prover, made, push_to)}


def _merged_before(prover: Prover) -> dict[str, object] | None:
    """The merged model that is there, verified: it may be onto the quantised base, or reversible. None: it is stale."""
    from luthier.export.origin import is_merged_from

    folder = prover.run.export("hf")
    if not is_merged_from(folder, prover.run.adapter):
        return None
    return {"kind": "hf", "path": str(folder), "verified": prover.prove("hf", None).passed}


def _push(prover: Prover, made: dict[str, object], name: str) -> str:
    from luthier.export.push import push

    if made["verified"] is not True:
        raise UsageError("what was not verified is not pushed", "see above why it was not; then run this again")
    with console.waiting(f"pushing to {name}"):
        return push(prover.run.export("hf"), name)


def verify_again(path: Path, kind: str | None, quantize: str | None, *, asked: bool) -> dict[str, object]:
    """Verify what was exported before; `asked`: by --verify, without which an export needs its --to."""
    if not asked:
        raise UsageError(
            "nothing says what to export to", f"--to {', '.join(KINDS)}; or --verify, for what was exported"
        )
    if quantize is not None:
        raise UsageError("--quantize is for an export, and --verify writes none", "leave one of the two out")
    with _opened(path, "luthier export") as (prover, _):
        found = again(prover, kind)
    return {"schema": SCHEMA_VERSION, "run": str(path), "exports": found}
