"""What a run began with, held fast: resuming and evaluating must not choose anew.

What a plan leaves open depends on the machine's state (free memory, measured rates), so the same recipe may be planned
otherwise tomorrow; a resumed run must be the run that it was, bit for bit. `pins_of` reads the settings that stand in
the run's plan.json, `pinned` writes them into the recipe where that says `auto`, and `as_begun` says so in the plan.

On a device of another kind (trained on CUDA, evaluated on a CPU) what belongs to the device is chosen for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from luthier.errors import UsageError
from luthier.plan.proof import MEASURED
from luthier.plan.settings import Settings
from luthier.plan.support import QUANTIZE_DEVICES
from luthier.runs import RunDirectory
from luthier.train.checkpoints import Checkpoints
from luthier.train.identity import WATCHED

if TYPE_CHECKING:
    from luthier.plan.decision import Decision
    from luthier.plan.plan import Plan
    from luthier.recipe.schema import Recipe

__all__ = ["Pins", "as_begun", "base_name", "pinned", "pins_of", "with_revision"]

REVISION = "model.revision"
SOURCE = "the run's plan.json"
_BEGUN = "As this run began. "
_ADAPTER = ("rank", "alpha")
_OF_THE_DEVICE = ("precision", "micro_batch", "optimizer", "checkpointing", "attention")
_TRAIN = (
    *("batch_size", "learning_rate", "warmup_steps", "max_length", "packing", "eval_every", "save_every"),
    *_OF_THE_DEVICE,
)


@dataclass(frozen=True)
class Pins:
    """The settings of a run that has begun. `reasons`: what plan.json says of each decision; `resume`: whether it is to
    be gone on with, not only looked at; `revision`: the commit of its base, where that came from the hub."""

    run: Path
    settings: Settings
    reasons: Mapping[str, tuple[str, str]]
    resume: bool
    revision: str | None = None


@dataclass(frozen=True)
class _Reason:
    setting: str
    reason: str
    source: str
    value: object = None


@dataclass(frozen=True)
class _Stored:
    """What is taken of plan.json."""

    settings: Settings
    decisions: tuple[_Reason, ...]


def pins_of(run: RunDirectory, *, resume: bool) -> Pins | None:
    """What the run in this folder began with; None where none has.

    Raises:
        UsageError: its plan.json cannot be read.
    """
    if not run.plan.is_file() or not (run.adapter.is_dir() or Checkpoints(run.checkpoints).steps()):
        return None
    try:
        stored = TypeAdapter(_Stored).validate_json(run.plan.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{run.plan} is not a plan that this version of luthier wrote, so nothing says what the run began with: "
            f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}",
            "train again, into another directory (--out)",
        ) from error
    reasons = {one.setting: (one.reason, one.source) for one in stored.decisions}
    return Pins(run.path, stored.settings, reasons, resume, _revision(stored.decisions))


def _revision(decisions: Sequence[_Reason]) -> str | None:
    found = next((one.value for one in decisions if one.setting == REVISION), None)
    return found if isinstance(found, str) else None


def base_name(recipe: Recipe, pins: Pins | None) -> str:
    """What to look the recipe's model up by: at the commit that the run began with, where it came from the hub."""
    from luthier.model.locate import pinned_to

    return recipe.model if pins is None else pinned_to(recipe.model, pins.revision)


def with_revision(plan: Plan, folder: Path, name: str) -> Plan:
    """The plan, saying at its beginning which commit of the hub's model `name` the folder is; else as it was."""
    from luthier.model.locate import revision_of
    from luthier.plan.decision import Decision

    commit = revision_of(folder)
    if commit is None:
        return plan
    reason = (
        f"{name.partition('@')[0]} is at this commit. Whatever is done with this run later (resume, evaluate, merge) "
        "takes the same one."
    )
    decision: Decision[object] = Decision(REVISION, commit, reason, "the Hugging Face hub")
    return replace(plan, decisions=(decision, *plan.decisions))


def pinned(recipe: Recipe, pins: Pins, kind: str) -> tuple[Recipe, frozenset[str]]:
    """The recipe with the run's settings where it says `auto`, and the names of these (`train.precision`).

    What the proof took back, for it was out of memory (plan/proof.py), is the run's too, whatever the recipe says.

    A recipe that now says otherwise than the run began is left as it is: training refuses it, with all differences.

    Args:
        recipe: as its file and `--set` have it.
        pins: what the run began with.
        kind: the device's of this machine.

    Raises:
        UsageError: the run is to be resumed, and began on a device of another kind.
    """
    settings, train, adapter = pins.settings, recipe.train, recipe.adapter
    proved = frozenset(
        name.removeprefix("train.") for name, (_, said) in pins.reasons.items() if MEASURED in said.split("; ")
    )
    if _is_another(recipe, settings, proved):
        return recipe, frozenset()
    if pins.resume and settings.device != kind:
        raise UsageError(
            f"the run in {pins.run} began on {settings.device}, and this machine has {kind}: it cannot be gone on with "
            "here as the run that it was",
            f"resume it on a machine with {settings.device}, or train anew in another directory (--out)",
        )
    moved = settings.device != kind
    able = QUANTIZE_DEVICES[settings.quantize]
    if kind not in able:
        raise UsageError(
            f"the base of the run in {pins.run} is held in {settings.quantize}, which this machine's {kind} cannot do",
            f"evaluate it on a machine with {' or '.join(able)}",
        )
    # To be evaluated it need not have what only training needs, nor a backend that this device may lack.
    freed: tuple[str, ...] = ("optimizer", "attention") if moved else ("attention",)
    if pins.resume or (settings.attention != "flash" and not moved):
        freed = ()
    names = [
        name
        for name in _TRAIN
        if (getattr(train, name) == "auto" or name in proved) and not (moved and name in _OF_THE_DEVICE)
    ]
    values: dict[str, object] = {name: getattr(settings, name) for name in names if name not in freed}
    if train.epochs == "auto" and train.steps is None:
        values["steps"] = settings.steps
    of_adapter = {name: getattr(settings, name) for name in _ADAPTER if getattr(adapter, name) == "auto"}
    changed: dict[str, object] = {
        "train": train.model_copy(update=values | dict.fromkeys(freed, "auto")),
        "adapter": adapter.model_copy(update=of_adapter),
    }
    if recipe.quantize == "auto":
        changed["quantize"] = settings.quantize
    held = [*(f"train.{name}" for name in values), *(f"adapter.{name}" for name in of_adapter)]
    held += ["train.epochs"] * ("steps" in values) + ["quantize"] * ("quantize" in changed)
    return recipe.model_copy(update=changed), frozenset(held)


def _is_another(recipe: Recipe, settings: Settings, proved: frozenset[str]) -> bool:
    """Whether the recipe sets something that the run has otherwise, but for what the proof took back and for what a run
    may change as it goes on: how it is watched, and more steps."""
    # What a recipe says of `checkpointing` (true, more layers than there are) stands for a number that the model knows.
    names = [name for name in _TRAIN if name not in proved and name not in ("checkpointing", *WATCHED)]
    said = [(getattr(recipe.train, name), getattr(settings, name)) for name in names]
    said += [(getattr(recipe.adapter, name), getattr(settings, name)) for name in _ADAPTER]
    steps = recipe.train.steps or settings.steps
    said += [(recipe.quantize, settings.quantize), (min(steps, settings.steps), settings.steps)]
    return any(now not in ("auto", then) for now, then in said)


def as_begun(plan: Plan, pins: Pins, held: frozenset[str]) -> Plan:
    """The plan with its pinned decisions in their own words: why the run began with them, not `as you set it`."""

    def told(one: Decision[object]) -> Decision[object]:
        if one.setting not in held:
            return one
        reason, source = pins.reasons.get(one.setting, ("", ""))
        source = source.removeprefix(SOURCE).removeprefix("; ")
        return replace(
            one,
            reason=(_BEGUN + reason.removeprefix(_BEGUN)).strip(),
            source=f"{SOURCE}; {source}" if source else SOURCE,
        )

    return replace(plan, decisions=tuple(told(one) for one in plan.decisions))
