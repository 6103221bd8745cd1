"""The end of a run: the adapter of its best checkpoint, or of its last, becomes the run's adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import TrainingError
from luthier.model.adapter import load_adapter
from luthier.model.decoder import Decoder
from luthier.model.load import return_freed
from luthier.runs import atomic_folder
from luthier.train.checkpoint import Progress
from luthier.train.checkpoints import Checkpoints, name_of
from luthier.train.manifest import read, seal

__all__ = ["Finished", "choose_adapter", "put_adapter"]


@dataclass(frozen=True)
class Finished:
    """The checkpoint whose adapter is the run's: its step, and its held-out loss where it is chosen for that.

    `best_step` is then `step`; both are None where nothing was held out. `notes`: what a user should know of it.
    """

    step: int
    best_eval: float | None
    best_step: int | None
    notes: tuple[str, ...] = ()


def choose_adapter(checkpoints: Checkpoints, progress: Progress) -> Finished:
    """The whole checkpoint of the lowest held-out loss; the last where nothing was held out. Reads it to the end.

    Raises TrainingError where there is none.
    """
    notes: list[str] = []
    for step, loss in _candidates(progress):
        if not checkpoints.path(step).is_dir():
            notes.append(f"{name_of(step)} is missing")
        elif faults := checkpoints.faults(step):
            notes.append(f"{name_of(step)} is not whole ({faults[0]})")
        else:
            said = () if not notes else (f"{'; '.join(notes)}: the adapter is that of step {step}",)
            return Finished(step, loss, None if loss is None else step, said)
    listed = "\n".join(f"  {note}" for note in notes)
    raise TrainingError(
        f"training is done, and the checkpoint that its adapter is to come from cannot be used:\n{listed}",
        "run the same command again with --resume: it goes on from the last whole checkpoint",
    )


def _candidates(progress: Progress) -> Iterator[tuple[int, float | None]]:
    """Best first: (step, held-out loss)."""
    yield from progress.ranked
    if progress.best_step is None:
        yield progress.step, None


def put_adapter(
    chosen: Path, step: int, adapter: Path, decoder: Decoder, companions: Callable[[Path], None] | None
) -> None:
    """Copy the adapter of the checkpoint `chosen`, of this step, to `adapter`, with what belongs beside it and a
    manifest, all at once; the decoder then holds it."""
    with atomic_folder(adapter) as beside:
        for name in read(chosen).files:  # and nothing else that lies there: somebody else put it there, or linked it
            place, _, file = name.rpartition("/")
            if place == "adapter":
                shutil.copy2(chosen / name, beside / file, follow_symlinks=False)
        if companions is not None:
            companions(beside)
        seal(beside, "adapter", step)
    return_freed()  # of the steps, lest the adapter's file, and what a caller does next, come on top of it
    load_adapter(decoder, adapter)
    decoder.eval()
