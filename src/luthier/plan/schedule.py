"""Choices about how long and how often: batch size, epochs and steps, warm-up, evaluations, checkpoints.

    steps = ceil(epochs * units / batch size)

A unit is a row, or with packing a pack of rows. The units are one endless stream, epoch after epoch, and every step
takes a whole batch of it (data/batches.py). So an epoch need not be a whole number of steps, and only the run's last
step may take units beyond the epochs asked for.
"""

from __future__ import annotations

import math

from luthier.errors import UsageError
from luthier.plan import sources
from luthier.plan.decision import YOURS, Decision
from luthier.plan.rows import Epoch
from luthier.plan.timing import evaluation_count
from luthier.recipe.schema import Recipe

__all__ = [
    "choose_batch_size",
    "choose_epochs",
    "choose_eval_every",
    "choose_save_every",
    "choose_steps",
    "choose_warmup",
]

_ENOUGH_STEPS = 100
_MOST_EPOCHS = 10
_EVALUATIONS = 10
_EVALUATION_SHARE = 0.1


def choose_batch_size(recipe: Recipe, epoch: Epoch) -> Decision[int]:
    """8, 16 or 32 rows by the size of the data, never more than there are; as many packs as hold about so many."""
    asked, units, rows = recipe.train.batch_size, epoch.units, epoch.rows
    if asked != "auto":
        reason = f"As you set it: {_steps_each(epoch, asked)} per epoch."
        if asked > units:
            reason += f" There are only {epoch.named(units)}, so each step holds some more than once."
        if asked * epoch.rows_per_unit > 32:
            reason += " LoRA pays a growing penalty at large batches, which rank does not cure."
            return Decision("train.batch_size", asked, reason, f"{YOURS}; {sources.WITHOUT_REGRET}")
        return Decision("train.batch_size", asked, reason, YOURS)
    wanted = 8 if rows < 1000 else 16 if rows < 10_000 else 32
    size = max(1, min(units, round(wanted / epoch.rows_per_unit)))
    rule = "8 below 1,000, 16 below 10,000, else 32" if wanted <= rows else "8, but never more than there are"
    if epoch.packs is not None:
        rule = f"rows a step are {wanted} by this project's rule, and a pack has {epoch.rows_per_unit:.3g} of them"
    reason = f"{epoch}: {rule}. Small, because LoRA loses at large batches. Sources conflict on how large is too large."
    rejected = ("128: where Tinker starts", "more than 32: TRL's page says stay below")
    return Decision("train.batch_size", size, reason, sources.WITHOUT_REGRET, rejected)


def choose_epochs(recipe: Recipe, epoch: Epoch, batch_size: int) -> Decision[float]:
    """Three passes, one over many rows, more over few; where steps are given, what they come to."""
    train = recipe.train
    each = _steps_each(epoch, batch_size)
    if train.steps is not None:
        reason = f"What {train.steps:,} steps of {epoch.named(batch_size)} come to."
        return Decision("train.epochs", round(train.steps * batch_size / epoch.units, 2), reason, YOURS)
    if train.epochs != "auto":
        return Decision("train.epochs", train.epochs, f"As you set it: {each} each.", YOURS)
    usual = 3 if epoch.rows <= 50_000 else 1
    wanted = math.ceil(_ENOUGH_STEPS * batch_size / epoch.units)
    epochs = max(usual, min(wanted, _MOST_EPOCHS))
    reason = f"{epoch}, {each} each: {usual} is usual for so many."
    if epochs > usual:
        reason = (
            f"{epoch} make only {each} an epoch: more epochs than the usual {usual}, towards "
            f"{_ENOUGH_STEPS} steps (at most {_MOST_EPOCHS} epochs). The checkpoint of the best held-out loss is kept."
        )
    return Decision("train.epochs", float(epochs), reason, sources.EPOCHS)


def choose_steps(recipe: Recipe, epoch: Epoch, batch_size: int, epochs: float) -> Decision[int]:
    """Given, or units * epochs / batch size, rounded up."""
    if recipe.train.steps is not None:
        return Decision("train.steps", recipe.train.steps, "As you set it.", YOURS)
    wanted = round(epochs * epoch.units, 6)  # 0.1 * 30 is a little more than 3
    steps = max(1, math.ceil(wanted / batch_size))
    reason = f"{epochs:g} epochs of {epoch.named(epoch.units)}, {batch_size} a step."
    if steps * batch_size > wanted:
        reason += " The last step is filled up from the epoch after."
    return Decision("train.steps", steps, reason, "arithmetic")


def _steps_each(epoch: Epoch, batch_size: int) -> str:
    """The steps of an epoch, as a person says it: `1 step`, `100.4 steps`, `about 0.16 steps`."""
    steps = epoch.units / batch_size
    if steps == 1:
        return "1 step"
    shown = f"{steps:,.1f}".removesuffix(".0") if steps >= 1 else f"{steps:.2g}"
    return f"{shown} steps" if epoch.units % batch_size == 0 else f"about {shown} steps"


def choose_warmup(recipe: Recipe, steps: int) -> Decision[int]:
    """3 % of the steps.

    Raises:
        UsageError: the user's warm-up is as long as the run.
    """
    asked = recipe.train.warmup_steps
    if asked != "auto":
        if asked >= steps:
            message = f"train.warmup_steps is {asked}, but the run has only {steps} steps"
            raise UsageError(message, f"train.warmup_steps: at most {steps - 1}, or auto")
        return Decision("train.warmup_steps", asked, f"As you set it: {asked / steps:.0%} of {steps:,} steps.", YOURS)
    warmup = min(max(1, round(0.03 * steps)), steps - 1)
    return Decision("train.warmup_steps", warmup, f"3 % of {steps:,} steps, at least one.", sources.QLORA)


def choose_eval_every(recipe: Recipe, steps: int, eval_rows: int, training: float, evaluation: float) -> Decision[int]:
    """Ten times after the start, fewer where that would take more than a tenth of the run's time.

    training: seconds of all steps. evaluation: seconds of measuring all held-out rows once. Step 0 and the last are
    always measured, so two evaluations are the fewest there can be.

    Raises:
        UsageError: the user asks for evaluations, and nothing is held out.
    """
    asked = recipe.train.eval_every
    if eval_rows == 0:
        if asked not in ("auto", 0):
            message = f"train.eval_every is {asked}, but no row is held out"
            raise UsageError(message, "hold some out (split: {train: 0.9, eval: 0.1}), or train.eval_every: 0")
        return Decision(
            "train.eval_every", 0, "No row is held out, so there is nothing to measure.", "the data, counted"
        )
    # times * evaluation <= share * (training + times * evaluation)
    affordable = int(_EVALUATION_SHARE * training / ((1 - _EVALUATION_SHARE) * evaluation)) if evaluation else steps + 1
    wanted = max(2, min(_EVALUATIONS + 1, affordable, steps + 1))
    every = math.ceil(steps / (wanted - 1)) if asked == "auto" else asked
    times = evaluation_count(steps, every)
    share = times * evaluation / (training + times * evaluation) if evaluation else 0.0
    what = f"{times} times in {steps:,} steps, the start and the end among them; {eval_rows:,} held-out rows each"
    costs = f"{what}: {_percent(share)} of the time."
    if asked != "auto":
        never = "" if asked else " Not while training."
        return Decision("train.eval_every", asked, f"As you set it.{never} {costs}", YOURS)
    rule = "this project's rule: ten times, within a tenth of the predicted time"
    if share > _EVALUATION_SHARE:
        fewer = max(1, int(eval_rows * (1 - share) / share * _EVALUATION_SHARE / (1 - _EVALUATION_SHARE)))
        costs += f" That is the fewest there can be; holding out {_rows(fewer)} (split) would take a tenth."
    rejected = (f"{_EVALUATIONS + 1} times: more than a tenth of the time",) if affordable < _EVALUATIONS + 1 else ()
    return Decision("train.eval_every", every, costs, rule, rejected)


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1 %"


def choose_save_every(recipe: Recipe, steps: int, eval_every: int) -> Decision[int]:
    """With every evaluation, so that the best can be kept; without any, ten times."""
    asked = recipe.train.save_every
    if asked != "auto":
        return Decision("train.save_every", asked, "As you set it.", YOURS)
    rule = "this project's rule"
    if eval_every:
        return Decision("train.save_every", eval_every, "With every evaluation, so that the best can be kept.", rule)
    return Decision("train.save_every", max(1, math.ceil(steps / 10)), f"Ten times in {steps:,} steps.", rule)
