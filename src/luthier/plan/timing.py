"""How long a run takes, and what it costs: the speed model's seconds over all steps and evaluations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from luthier.plan.search import Candidate, Task
from luthier.plan.speed import Speed

__all__ = ["TimePlan", "evaluation_count", "evaluation_seconds", "plan_time"]


@dataclass(frozen=True)
class TimePlan:
    """Seconds: of an average optimizer step, of all `steps`, of all `evaluations`, of both. tokens_per_second: while
    training. price_per_hour: of the whole machine, as given; cost: of the run, in the same money; None: no price given.
    Loading the model, the answers after training, and exports are not counted. source: whose rates.
    """

    step_seconds: float
    steps: int
    training_seconds: float
    evaluations: int
    evaluation_seconds: float
    total_seconds: float
    tokens_per_second: float
    source: str
    price_per_hour: float | None = None
    cost: float | None = None

    def priced(self, per_hour: float | None) -> TimePlan:
        """With the cost at this price an hour."""
        cost = None if per_hour is None else per_hour * self.total_seconds / 3600
        return replace(self, price_per_hour=per_hour, cost=cost)


def evaluation_seconds(task: Task, speed: Speed) -> float:
    """Of all held-out rows once: forward only."""
    rows = task.lengths.rows
    mean = task.lengths.total(task.max_length) / rows if rows else 0.0
    return speed.evaluation_seconds * task.eval_rows * mean / 1000


def evaluation_count(steps: int, every: int) -> int:
    """How often held-out rows are measured: at step 0, every `every` steps (0: not between), and after the last."""
    if every == 0:
        return 2
    return 1 + -(-steps // every)


def plan_time(task: Task, found: Candidate, steps: int, eval_every: int) -> TimePlan:
    """The time of the whole run."""
    training = steps * found.speed.step_seconds
    times = evaluation_count(steps, eval_every) if task.eval_rows else 0
    evaluating = times * evaluation_seconds(task, found.speed)
    total = training + evaluating
    return TimePlan(
        step_seconds=found.speed.step_seconds,
        steps=steps,
        training_seconds=training,
        evaluations=times,
        evaluation_seconds=evaluating,
        total_seconds=total,
        tokens_per_second=found.speed.tokens_per_second,
        source=found.speed.source,
    )
