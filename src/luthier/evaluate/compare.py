"""Base against tuned: the same decoder with its LoRA off and on, on rows that neither trained on.

    held-out rows -> loss and perplexity of both -> the same prompts answered by both -> tasks' figures, samples

Rows are those of the test split, or of the eval split where there is no test split. The result is `eval.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from luthier.data.conversation import IGNORED, Example
from luthier.data.prepare import Dataset
from luthier.data.render import Template
from luthier.errors import DataError, UsageError
from luthier.evaluate.loss import HeldOut, held_out_loss
from luthier.evaluate.tasks import TASKS, Answered, Task, TaskResult, check_task, run_task
from luthier.generate.generate import complete
from luthier.model.decoder import Decoder
from luthier.model.lora import set_lora_enabled
from luthier.recipe.schema import EvaluateRecipe
from luthier.runs import SCHEMA_VERSION

__all__ = ["Comparison", "Progress", "Sample", "as_document", "check_tasks", "compare"]

Progress = Callable[[int, int], None]
"""Called with answers done and answers in all."""


@dataclass(frozen=True)
class Sample:
    """One held-out row, answered before and after."""

    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Comparison:
    """What the evaluation found. `split` names the side the rows come from, `rows` counts those of the loss."""

    split: str
    rows: int
    base: HeldOut
    tuned: HeldOut
    tasks: tuple[TaskResult, ...]
    samples: tuple[Sample, ...]


def as_document(comparison: Comparison) -> dict[str, object]:
    """The content of eval.json."""
    return {
        "schema": SCHEMA_VERSION,
        "split": comparison.split,
        "rows": comparison.rows,
        "base": asdict(comparison.base),
        "tuned": asdict(comparison.tuned),
        "tasks": [asdict(task) for task in comparison.tasks],
        "samples": [asdict(sample) for sample in comparison.samples],
    }


@contextmanager
def _lora(decoder: Decoder, enabled: bool) -> Iterator[None]:
    """The LoRA switched; on again afterwards, which is how it trains and is saved."""
    set_lora_enabled(decoder, enabled)
    try:
        yield
    finally:
        set_lora_enabled(decoder, True)


def _tasks(names: Sequence[str]) -> list[Task]:
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UsageError(f"there is no task {', '.join(unknown)}", f"known tasks: {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


def _reference(example: Example, template: Template) -> str:
    start = example.answer_start
    answer = [int(label) for label in example.labels[start:] if label != IGNORED and label not in template.stop_ids]
    return template.tokenizer.decode(answer, skip_special=True)


def _answers(
    decoder: Decoder, template: Template, examples: Sequence[Example], limit: int, done: Callable[[], None]
) -> list[Answered]:
    found: list[Answered] = []
    for example in examples:
        prompt = example.ids[: example.answer_start].tolist()
        answer = complete(decoder, template.tokenizer, prompt, stop_ids=template.stop_ids, max_new_tokens=limit)
        reference = _reference(example, template)
        found.append(Answered(example.fields, reference, answer.text, len(answer.ids), answer.ended))
        done()
    return found


def _question(example: Example, template: Template) -> str:
    """The row's question as its author wrote it where a field holds it, else the rendered prompt without controls."""
    for name in ("instruction", "question", "prompt", "title"):
        if example.fields.get(name, "").strip():
            return example.fields[name]
    return template.tokenizer.decode(example.ids[: example.answer_start].tolist(), skip_special=True).strip()


def _held_out(dataset: Dataset, limit: int | None) -> tuple[str, Sequence[Example]]:
    split, rows = ("test", dataset.test) if dataset.test else ("eval", dataset.eval)
    if not rows:
        raise DataError("there are no held-out rows to evaluate on", "give split.eval or split.test a share")
    return split, rows[:limit]


def check_tasks(dataset: Dataset, recipe: EvaluateRecipe) -> None:
    """Find what `compare` would refuse, from the rows alone: before a model is loaded, let alone trained.

    Raises UsageError for a task that is not known; DataError where tasks are asked for and nothing is held out, where
    no held-out row fits a task, and where one fits but cannot be scored.
    """
    tasks = _tasks(recipe.tasks)
    if not tasks:
        return
    _, rows = _held_out(dataset, recipe.limit)
    known = [(row.fields, _reference(row, dataset.template)) for row in rows if row.answer_start > 0]
    for task in tasks:
        check_task(task, known)


def compare(decoder: Decoder, dataset: Dataset, recipe: EvaluateRecipe, progress: Progress | None = None) -> Comparison:
    """Evaluate `decoder` without and with its LoRA, which is on afterwards.

    `recipe` says which tasks, how many rows (`limit`), how many samples, and how long an answer may be.
    Raises DataError where nothing is held out, or no row fits a task; UsageError for a task that is not known.
    """
    check_tasks(dataset, recipe)
    tasks = _tasks(recipe.tasks)
    split, rows = _held_out(dataset, recipe.limit)
    # A prompt that leaves no room for an answer can be scored by its loss, but not answered.
    answerable = [row for row in rows if 0 < row.answer_start < decoder.config.max_positions]
    asked = answerable if tasks else answerable[: recipe.samples]
    count, total = 0, 2 * len(asked)

    def done() -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, total)

    losses: list[HeldOut] = []
    answers: list[list[Answered]] = []
    for enabled in (False, True):
        with _lora(decoder, enabled):
            losses.append(held_out_loss(decoder, rows))
            answers.append(_answers(decoder, dataset.template, asked, recipe.max_new_tokens, done))
    base, tuned = answers
    samples = tuple(
        Sample(_question(row, dataset.template), was.reference, was.text, now.text)
        for row, was, now in list(zip(asked, base, tuned, strict=True))[: recipe.samples]
    )
    results = tuple(run_task(task, base, tuned) for task in tasks)
    return Comparison(split, len(rows), losses[0], losses[1], results, samples)
