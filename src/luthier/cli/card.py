"""What a model card says of a run: its data, the recipe, the evaluation, the base and its licence."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from luthier.cli.pins import REVISION
from luthier.errors import UsageError
from luthier.guard.documents import INDEX_BYTES, read_object
from luthier.guard.secrets import printable
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.export.huggingface import CardFigure, ModelCard
    from luthier.recipe.schema import Recipe

__all__ = ["model_card"]


def model_card(run: RunDirectory, recipe: Recipe, base: Path) -> ModelCard:
    """The card of the merged model. Raises FileError or UsageError where the run's documents lack what it says."""
    from luthier.export.huggingface import ModelCard, base_license
    from luthier.plan.explain import shown_value

    # As it was when it was trained, not as this machine would plan it today.
    data, plan = _read(run.data, _Data), _read(run.plan, _Plan)
    # File names, not paths: a card travels, and where things lay on this machine is nobody's business.
    names = dict.fromkeys(Path(source.path).name for source in data.sources)
    return ModelCard(
        name=run.path.resolve().name,
        base=recipe.model,
        data=f"{data.splits['train'].rows:,} rows of {', '.join(names)}",
        license=base_license(base),
        facts=[(one.setting, shown_value(one.value)) for one in plan.decisions if one.setting in _ON_CARD],
        figures=_figures(run),
        revision=_revision(plan),
        rows=[(side, one.rows, one.tokens, one.labelled_tokens) for side, one in data.splits.items() if one.rows],
        notes=[f"{Path(source.path).name}: {source.rows:,} rows read as {source.format}" for source in data.sources],
        recipe=_public(recipe),
    )


def _revision(plan: _Plan) -> str:
    """The commit of the base, where it came from the hub."""
    found = next((one.value for one in plan.decisions if one.setting == REVISION), None)
    return found if isinstance(found, str) else ""


def _public(recipe: Recipe) -> str:
    """The recipe with file names for the paths of this machine, and without what looks like a key."""
    from luthier.recipe.document import write_document

    def shown(value: object) -> object:
        if isinstance(value, dict):
            return {name: shown(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [shown(one) for one in value]
        return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value

    document = recipe.model_dump(mode="json")
    return printable(write_document({name: shown(value) for name, value in document.items()}))


@dataclass(frozen=True)
class _Split:
    rows: int
    tokens: int
    labelled_tokens: int


@dataclass(frozen=True)
class _Source:
    path: str
    rows: int
    format: str


@dataclass(frozen=True)
class _Data:
    """What is read of data/data.json."""

    sources: list[_Source]
    splits: dict[str, _Split]


@dataclass(frozen=True)
class _Decision:
    setting: str
    value: object


@dataclass(frozen=True)
class _Plan:
    """What is read of plan.json."""

    decisions: list[_Decision]


@dataclass(frozen=True)
class _Losses:
    loss: float
    perplexity: float


@dataclass(frozen=True)
class _Task:
    name: str
    base: dict[str, float]
    tuned: dict[str, float]


@dataclass(frozen=True)
class _Evaluation:
    """What is read of eval.json."""

    base: _Losses
    tuned: _Losses
    tasks: list[_Task]


_Read = TypeVar("_Read", _Data, _Plan, _Evaluation)


def _read(path: Path, kind: type[_Read]) -> _Read:
    """What is needed of a document of the run. Raises FileError or UsageError where it does not have it."""
    try:
        return TypeAdapter(kind).validate_python(read_object(path, INDEX_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{path} is not what this version of luthier wrote: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            "put it back as it was: luthier eval writes eval.json again, training the others",
        ) from error


_ON_CARD = (
    *("adapter.rank", "adapter.alpha", "adapter.targets", "quantize", "train.steps", "train.batch_size"),
    *("train.learning_rate", "train.schedule", "train.precision", "seed"),
)


def _figures(run: RunDirectory) -> list[CardFigure]:
    """Base against tuned, where it was measured before the merge."""
    from luthier.export.huggingface import CardFigure

    if not run.evaluation.is_file():
        return []
    found = _read(run.evaluation, _Evaluation)
    base, tuned = found.base, found.tuned
    figures = [CardFigure("loss", base.loss, tuned.loss), CardFigure("perplexity", base.perplexity, tuned.perplexity)]
    for task in found.tasks:
        shared = [name for name in task.base if name in task.tuned]
        figures += [
            CardFigure(f"{task.name}: {name.replace('_', ' ')}", task.base[name], task.tuned[name]) for name in shared
        ]
    return figures
