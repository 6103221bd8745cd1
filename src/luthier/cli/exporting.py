"""The export stage: the merged model in exports/hf, and from it what other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape

from luthier.cli import console
from luthier.cli.working import stage
from luthier.errors import UsageError
from luthier.guard.documents import INDEX_BYTES, read_object
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.export.gguf import About, GGUFFile
    from luthier.export.huggingface import CardFigure, ModelCard
    from luthier.recipe.schema import Recipe

__all__ = ["export"]

Quantize = Literal["f16", "q8_0"]
KINDS: dict[str, Quantize | None] = {"hf": None, "gguf": "f16", "ollama": "q8_0"}
"""Kind -> the type of its weights where the user does not say."""


def export(run: RunDirectory, recipe: Recipe, base: Path, kind: str, quantize: str | None = None) -> dict[str, object]:
    """Write one export of the run and say what was written. gguf and ollama merge first where that was not done."""
    if kind not in KINDS:
        raise UsageError(f"there is no export {kind!r}", f"known: {', '.join(KINDS)}")
    if quantize is not None and quantize not in ("f16", "q8_0"):
        raise UsageError(f"there is no --quantize {quantize}", "f16 or q8_0")
    if quantize is not None and kind == "hf":
        raise UsageError("--quantize is for gguf and ollama; hf is written in 16-bit", "leave it out")
    chosen = cast("Quantize | None", quantize) or KINDS[kind]
    if kind == "hf" or chosen is None:
        return _merge(run, recipe, base)
    if not (run.export("hf") / "config.json").is_file():
        _merge(run, recipe, base)
    with console.waiting(f"writing {kind} ({chosen})"), stage(f"{kind} was written"):
        return _gguf(run, recipe, base, chosen) if kind == "gguf" else _ollama(run, recipe, base, chosen)


def _merge(run: RunDirectory, recipe: Recipe, base: Path) -> dict[str, object]:
    from luthier.data.render import make_template
    from luthier.data.tokenizer import load_tokenizer
    from luthier.export.huggingface import export_huggingface

    out = run.export("hf")
    # What was trained lies beside the adapter: an export needs neither the rows nor this machine's plan.
    template = make_template("model", load_tokenizer(run.adapter))
    with console.waiting("merging the adapter into the base, in 16-bit"), stage("the adapter was merged"):
        merged = export_huggingface(base, run.adapter, out, template, _card(run, recipe, base))
    _say_notes(merged.notes)
    facts = {"dtype": merged.dtype, "tensors": merged.tensors, "merged": merged.merged, "notes": list(merged.notes)}
    return {"kind": "hf", "path": str(out), **facts}


def _gguf(run: RunDirectory, recipe: Recipe, base: Path, quantize: Quantize) -> dict[str, object]:
    from luthier.export.gguf import write_gguf

    path = run.export("gguf") / f"model-{quantize}.gguf"
    written = write_gguf(run.export("hf"), path, quantize, _about(run, recipe, base))
    _say_notes(written.notes)
    return _file("gguf", path, written)


def _ollama(run: RunDirectory, recipe: Recipe, base: Path, quantize: Quantize) -> dict[str, object]:
    from luthier.export.ollama import export_ollama

    made = export_ollama(run.export("hf"), run.export("ollama"), quantize=quantize, about=_about(run, recipe, base))
    _say_notes(made.notes)
    return {**_file("ollama", made.folder, made.gguf), "notes": list(made.notes), "command": made.command}


def _file(kind: str, path: Path, written: GGUFFile) -> dict[str, object]:
    facts = {"quantize": written.quantize, "bytes": written.size, "tensors": written.tensors}
    return {"kind": kind, "path": str(path), **facts, "notes": list(written.notes)}


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.say(f"[dim]{escape(note)}[/]")


def _about(run: RunDirectory, recipe: Recipe, base: Path) -> About:
    from luthier.export.gguf import About
    from luthier.export.huggingface import base_license

    return About(run.path.resolve().name, recipe.model, base_license(base))


def _card(run: RunDirectory, recipe: Recipe, base: Path) -> ModelCard:
    from luthier.export.huggingface import ModelCard, base_license
    from luthier.plan.explain import shown_value

    # As it was when it was trained, not as this machine would plan it today.
    data, plan = _read(run.data, _Data), _read(run.plan, _Plan)
    # File names, not paths: a card travels, and where things lay on this machine is nobody's business.
    names = dict.fromkeys(Path(source.path).name for source in data.sources)
    return ModelCard(
        name=run.path.resolve().name,
        base=recipe.model,
        data=f"{data.splits.train.rows:,} rows of {', '.join(names)}",
        license=base_license(base),
        facts=[(one.setting, shown_value(one.value)) for one in plan.decisions if one.setting in _ON_CARD],
        figures=_figures(run),
    )


@dataclass(frozen=True)
class _Split:
    rows: int


@dataclass(frozen=True)
class _Splits:
    train: _Split


@dataclass(frozen=True)
class _Source:
    path: str


@dataclass(frozen=True)
class _Data:
    """What is read of data/data.json."""

    sources: list[_Source]
    splits: _Splits


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
class _Evaluation:
    """What is read of eval.json."""

    base: _Losses
    tuned: _Losses


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
    return [CardFigure("loss", base.loss, tuned.loss), CardFigure("perplexity", base.perplexity, tuned.perplexity)]
