"""What an evaluation asks: the held-out rows, their references, and the tasks by name. Known from the rows alone.

No torch here, so that the plan can refuse what `compare` would refuse without the seconds that torch takes to import.
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.data.conversation import IGNORED, Example
from luthier.data.prepare import Dataset
from luthier.data.render import Template
from luthier.errors import DataError, UsageError
from luthier.evaluate.tasks import TASKS, Task, check_task
from luthier.recipe.schema import EvaluateRecipe

__all__ = ["check_tasks", "held_out_rows", "reference_of", "tasks_named"]


def tasks_named(names: Sequence[str]) -> list[Task]:
    """The tasks of these names. Raises UsageError for one that is not known."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UsageError(f"there is no task {', '.join(unknown)}", f"known tasks: {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


def reference_of(example: Example, template: Template) -> str:
    """The row's own answer as text, without the tokens that end it."""
    start = example.answer_start
    answer = [int(label) for label in example.labels[start:] if label != IGNORED and label not in template.stop_ids]
    return template.tokenizer.decode(answer, skip_special=True)


def held_out_rows(dataset: Dataset, limit: int | None) -> tuple[str, Sequence[Example]]:
    """(side, rows): the test split, or the eval split where there is no test split. DataError where nothing is held
    out."""
    split, rows = ("test", dataset.test) if dataset.test else ("eval", dataset.eval)
    if not rows:
        raise DataError("there are no held-out rows to evaluate on", "give split.eval or split.test a share")
    return split, rows[:limit]


def check_tasks(dataset: Dataset, recipe: EvaluateRecipe) -> None:
    """Find what `compare` would refuse, from the rows alone: before a model is loaded, let alone trained.

    Raises UsageError for a task that is not known; DataError where tasks are asked for and nothing is held out, where
    no held-out row fits a task, and where one fits but cannot be scored.
    """
    tasks = tasks_named(recipe.tasks)
    if not tasks:
        return
    _, rows = held_out_rows(dataset, recipe.limit)
    known = [(row.fields, reference_of(row, dataset.template)) for row in rows if row.answer_start > 0]
    for task in tasks:
        check_task(task, known)
