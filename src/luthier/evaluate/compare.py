"""Base against tuned: the same decoder with its LoRA off and on, on rows that neither trained on.

    held-out rows -> loss and perplexity of both -> the same prompts answered by both -> tasks' figures, samples

Rows are those of the test split, or of the eval split where there is no test split. The result is `eval.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from luthier.data.conversation import Example
from luthier.data.prepare import Dataset
from luthier.data.render import Template
from luthier.evaluate.loss import HeldOut, held_out_loss
from luthier.evaluate.questions import check_tasks, held_out_rows, reference_of, tasks_named
from luthier.evaluate.tasks import Answered, TaskResult, run_task
from luthier.generate.generate import complete
from luthier.model.decoder import Decoder
from luthier.model.lora import lora_enabled
from luthier.recipe.schema import EvaluateRecipe
from luthier.runs import SCHEMA_VERSION

__all__ = ["Comparison", "Progress", "Sample", "as_document", "compare"]

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all: rows whose loss is measured, and answers, of both models."""


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


def _answers(
    decoder: Decoder, template: Template, examples: Sequence[Example], limit: int, done: Callable[[], None]
) -> list[Answered]:
    found: list[Answered] = []
    for example in examples:
        prompt = example.ids[: example.answer_start].tolist()
        answer = complete(decoder, template.tokenizer, prompt, stop_ids=template.stop_ids, max_new_tokens=limit)
        reference = reference_of(example, template)
        found.append(Answered(example.fields, reference, answer.text, len(answer.ids), answer.ended))
        done()
    return found


def _question(example: Example, template: Template) -> str:
    """The row's question as its author wrote it where a field holds it, else the rendered prompt without controls."""
    for name in ("instruction", "question", "prompt", "title"):
        if example.fields.get(name, "").strip():
            return example.fields[name]
    return template.tokenizer.decode(example.ids[: example.answer_start].tolist(), skip_special=True).strip()


def _more(done: Callable[[int], None]) -> Callable[[int], None]:
    """Pass on to `done` by how many a count has grown since it was told last."""
    before = 0

    def told(count: int) -> None:
        nonlocal before
        more, before = count - before, count
        done(more)

    return told


def compare(decoder: Decoder, dataset: Dataset, recipe: EvaluateRecipe, progress: Progress | None = None) -> Comparison:
    """Evaluate `decoder` without and with its LoRA, which is on afterwards.

    `recipe` says which tasks, how many rows (`limit`), how many samples, and how long an answer may be.
    Raises DataError where nothing is held out, or no row fits a task; UsageError for a task that is not known.
    """
    check_tasks(dataset, recipe)
    tasks = tasks_named(recipe.tasks)
    split, rows = held_out_rows(dataset, recipe.limit)
    # A prompt that leaves no room for an answer can be scored by its loss, but not answered.
    answerable = [row for row in rows if 0 < row.answer_start < decoder.config.max_positions]
    asked = answerable if tasks else answerable[: recipe.samples]
    count, total = 0, 2 * (len(rows) + len(asked))

    def done(more: int = 1) -> None:
        nonlocal count
        count += more
        if progress is not None:
            progress(count, total)

    losses: list[HeldOut] = []
    answers: list[list[Answered]] = []
    for enabled in (False, True):
        with lora_enabled(decoder, enabled):
            losses.append(held_out_loss(decoder, rows, between=_more(done)))
            answers.append(_answers(decoder, dataset.template, asked, recipe.max_new_tokens, done))
    base, tuned = answers
    samples = tuple(
        Sample(_question(row, dataset.template), was.reference, was.text, now.text)
        for row, was, now in list(zip(asked, base, tuned, strict=True))[: recipe.samples]
    )
    results = tuple(run_task(task, base, tuned) for task in tasks)
    return Comparison(split, len(rows), losses[0], losses[1], results, samples)
