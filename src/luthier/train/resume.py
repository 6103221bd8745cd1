"""Where a run goes on: what is in its directory, whether it is this run, and what is to be said of that."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import UsageError
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.checkpoint import Progress, State, load_checkpoint, made_with, read_state
from luthier.train.checkpoints import Checkpoints, name_of
from luthier.train.identity import Identity, TrainingRows, changes, identify
from luthier.train.manifest import strangers
from luthier.train.step import Trainee

__all__ = ["Start", "check_directory", "check_resumable", "resume_from"]


@dataclass(frozen=True)
class Start:
    """What a sitting begins from. `saved`: the step of the checkpoint it was loaded from, None for a new run; `notes`:
    what the user should know."""

    checkpoints: Checkpoints
    progress: Progress
    saved: int | None
    notes: tuple[str, ...]


def check_directory(run: RunDirectory, *, resume: bool) -> None:
    """Raise UsageError where `run` holds a finished run and is not to be gone on with. `train` does this itself; a
    caller that writes into the directory before it asks first."""
    if not run.adapter.exists():
        return
    if not resume:
        raise UsageError(
            f"{run.path} already holds a trained run",
            "add --resume to do what is left of it (evaluation, exports) or to give it more steps; or train into "
            "another directory (--out)",
        )
    if not Checkpoints(run.checkpoints).steps():
        raise UsageError(
            f"{run.path} holds a trained run without a checkpoint: it would be trained anew, from step 0",
            "luthier eval, merge and export use its adapter as it is; to train, put the checkpoints back from a copy "
            "or train into another directory (--out)",
        )


def resume_from(run: RunDirectory, trainee: Trainee, identity: Identity, *, resume: bool) -> Start:
    """Put the newest whole checkpoint of `run`, if there is one, into `trainee` and torch's generators.

    Raises:
        UsageError: it is of another run than `identity` says, with the differences.
        TrainingError: there are checkpoints, and none is whole.
    """
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.tidy()
    found = checkpoints.newest_whole()
    if found.step is None:
        return Start(checkpoints, Progress(), None, ())
    folder = checkpoints.path(found.step)
    state = read_state(folder)
    notes = [f"{one}: going on from {name_of(found.step)}" for one in found.damaged]
    if others := strangers(folder):
        notes.append(f"{name_of(found.step)} holds what luthier did not write there, and does not open: {others}")
    if allowed := _allowed(run, state, identity, resume=resume):
        notes.append(f"this run goes on with other settings than before: {'; '.join(allowed)}")
    notes += _other_machine(state, trainee)
    load_checkpoint(folder, trainee)
    return Start(checkpoints, state.progress, found.step, tuple(notes))


def check_resumable(
    run: RunDirectory, dataset: TrainingRows, settings: Settings, base: str, weights: str | None = None
) -> None:
    """Raise UsageError, with the differences, where the checkpoints in `run` are of another run than this would be;
    TrainingError where none of them is whole.

    `train` refuses it too; a caller that writes the recipe and the plan into the directory asks before it does.
    """
    checkpoints = Checkpoints(run.checkpoints)
    newest = checkpoints.newest_whole().step
    if newest is not None:
        _allowed(run, read_state(checkpoints.path(newest)), identify(settings, dataset, base, weights), resume=True)


def _allowed(run: RunDirectory, state: State, identity: Identity, *, resume: bool) -> tuple[str, ...]:
    """The differences with which the run may go on. Raises UsageError where there are others."""
    found = changes(state.identity, identity, untrained=state.progress.step == 0)
    refused = found.refused if resume else (*found.refused, *found.allowed)
    if refused:
        listed = "\n".join(f"  {difference}" for difference in (*found.refused, *found.allowed))
        remedy = "give the run's own recipe.yaml and data (and no other --set), or train into another directory (--out)"
        if not found.refused:
            remedy = "add --resume to go on with these, or train into another directory (--out)"
        raise UsageError(f"{run.path}: the run that was begun is not the one asked for now:\n{listed}", remedy)
    done, steps = state.progress.step, identity.settings["steps"]
    if isinstance(steps, int) and done > steps:
        raise UsageError(f"{run.path}: {done} steps are done, and {steps} are asked for", "ask for more steps")
    return found.allowed


def _other_machine(state: State, trainee: Trainee) -> list[str]:
    """What keeps the rest of the run from being that of an uninterrupted one to the last bit."""
    device = trainee.decoder.device
    then, now = state.made_with, made_with(device)
    on_cpu = device.type == "cpu"
    differences = [
        f"{name} {before} then, {after} now"
        for name, before, after, counts in (
            ("torch", then.torch, now.torch, True),
            ("threads", then.threads, now.threads, on_cpu),
            ("processor", then.processor, now.processor, on_cpu),
            ("GPU", then.card, now.card, not on_cpu),
        )
        if before != after and counts
    ]
    if not on_cpu:  # there sums are added in an order that is nobody's to choose, on one machine too
        differences.insert(0, f"this is {device.type}, and only a CPU repeats them to the bit")
    if not differences:
        return []
    listed = "; ".join(differences)
    return [f"sums may differ in their last bits from those of a run that was not interrupted: {listed}"]
