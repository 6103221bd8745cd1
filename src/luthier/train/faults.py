"""What is said of a step that went wrong: one that cannot be applied, one that is left out, one whose loss leaps.

A step whose loss or gradient is not finite changes nothing (step.py). Whether the run then stops or goes on with the
next one says `train.on_nonfinite`: `skip N` leaves out up to N steps of the whole run. The step counts, so data and
learning rate go on as they would; the number left out is kept in the checkpoints, so a resumed run does the same.
"""

from __future__ import annotations

from luthier.errors import TrainingError
from luthier.train.events import WarningEvent
from luthier.train.identity import TrainingRows
from luthier.train.remedies import places
from luthier.train.step import NotFiniteError, StepError

__all__ = ["fault", "left_out", "spike"]


def fault(step: int, error: StepError, skipped: int, last_good: str, dataset: TrainingRows) -> TrainingError:
    """The error that ends the run: what happened, in which step, to which rows, and what is still good."""
    before = f" ({skipped} left out before, as train.on_nonfinite allows)" if skipped else ""
    where = places(dataset, error.rows)
    return TrainingError(f"step {step}: {error.what}{before}{last_good}; {where}", error.remedy)


def left_out(step: int, error: NotFiniteError, skipped: int, most: int, dataset: TrainingRows) -> WarningEvent:
    """The step is the `skipped`th that is left out, of at most `most`."""
    what = f"{error.what}: the step is left out ({skipped} of at most {most}), nothing is updated"
    return WarningEvent(step=step, message=f"{what}; {places(dataset, error.rows)}", kind="skip", rows=error.rows)


def spike(step: int, loss: float, bound: float, rows: tuple[int, ...], dataset: TrainingRows) -> WarningEvent:
    """The loss of the step is above `bound` (spikes.py)."""
    what = f"the loss {loss:.4g} is far above that of the steps before (up to {bound:.4g} is usual)"
    return WarningEvent(step=step, message=f"{what}; {places(dataset, rows)}", kind="spike", rows=rows)
