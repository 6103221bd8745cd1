"""The whole flow, top to bottom: what `run` does, one function a stage.

    recipe -> prepare -> train -> evaluate -> export (merge first)

A stage takes what a recipe means on this machine (`Prepared`) and a run directory, leaves its files there, and tells on
stderr what it does. The commands call these, `run` calls all of them in order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli import console
from luthier.errors import UsageError
from luthier.runs import SCHEMA_VERSION, RunDirectory, write_json, write_text

if TYPE_CHECKING:
    from luthier.data.prepare import Dataset
    from luthier.model.config import ModelConfig
    from luthier.model.decoder import Decoder
    from luthier.plan.plan import Plan
    from luthier.recipe.schema import Recipe
    from luthier.train.loop import TrainResult

__all__ = ["Prepared", "evaluate", "load_tuned", "prepare", "reopen", "run_all", "train", "train_document"]


@dataclass(frozen=True)
class Prepared:
    """What a recipe means on this machine: everything that is known before weights are loaded."""

    recipe: Recipe
    base: Path
    config: ModelConfig
    dataset: Dataset
    plan: Plan


def prepare(recipe: Recipe) -> Prepared:
    """Find the model, read and tokenise the data, and decide what the recipe leaves open."""
    from luthier.data.prepare import limit_length
    from luthier.data.prepare import prepare as prepare_data
    from luthier.data.tokenizer import load_tokenizer
    from luthier.hardware.probe import this_device
    from luthier.model.config import read_config
    from luthier.model.locate import locate_model
    from luthier.plan.choose import DataFacts, choose

    base = locate_model(recipe.model)
    config = read_config(base)
    with console.counting("reading the data") as advance:
        dataset = prepare_data(recipe, load_tokenizer(base), progress=advance)
    facts = DataFacts(
        train_rows=len(dataset.train),
        eval_rows=len(dataset.eval),
        longest=dataset.report.longest,
        labelled_tokens=dataset.report.splits["train"].labelled,
    )
    plan = choose(recipe, this_device(), config, facts)
    return Prepared(recipe, base, config, limit_length(dataset, plan.settings.max_length), plan)


def reopen(path: Path) -> tuple[RunDirectory, Prepared]:
    """A run directory that was trained in, and what its recipe means here."""
    from luthier.recipe.load import load_recipe

    run = RunDirectory(path)
    if not run.recipe.is_file():
        raise UsageError(f"{path} is not a run directory: it has no {run.recipe.name}", "luthier train makes one")
    if not run.adapter.is_dir():
        raise UsageError(
            f"the run in {path} has not ended: it has no adapter yet", f"luthier train --resume --out {path}"
        )
    return run, prepare(load_recipe(run.recipe))


def train(prepared: Prepared, run: RunDirectory, *, resume: bool) -> TrainResult:
    """Tune an adapter; leaves recipe.yaml, plan.json, data/data.json, events.jsonl, checkpoints/ and adapter/."""
    from luthier.export.merge import write_tokenizer
    from luthier.plan.plan import as_document
    from luthier.recipe.load import dump_recipe
    from luthier.train.display import make_display
    from luthier.train.loop import check_directory, check_resumable
    from luthier.train.loop import train as train_loop

    check_directory(run, resume=resume)
    check_resumable(run, prepared.dataset, prepared.plan.settings, prepared.recipe.model)
    write_text(run.recipe, dump_recipe(prepared.recipe))
    write_json(run.plan, as_document(prepared.plan))
    write_json(run.data, prepared.dataset.report.as_document())
    with console.waiting(f"loading {prepared.recipe.model}"):
        decoder = _load(prepared)
    result = train_loop(
        decoder,
        prepared.dataset,
        prepared.plan.settings,
        run,
        base=prepared.recipe.model,
        listener=make_display(),
        resume=resume,
    )
    # As PEFT's users do: the adapter's folder alone then says how to talk to it.
    write_tokenizer(prepared.base, run.adapter, prepared.dataset.template)
    return result


def _load(prepared: Prepared) -> Decoder:
    from luthier.cli.loading import dtype_of
    from luthier.model.load import load_decoder

    settings = prepared.plan.settings
    dtype = dtype_of(settings.precision)
    return load_decoder(prepared.base, dtype=dtype, device=settings.device, quantize=settings.quantize)


def load_tuned(prepared: Prepared, run: RunDirectory) -> Decoder:
    """The base as it was trained on, with the run's adapter."""
    from luthier.model.adapter import load_adapter

    with console.waiting(f"loading {prepared.recipe.model} and its adapter"):
        decoder = _load(prepared)
        load_adapter(decoder, run.adapter)
    return decoder.eval()


def evaluate(prepared: Prepared, run: RunDirectory, decoder: Decoder | None = None) -> dict[str, object]:
    """Base against tuned on held-out rows; leaves eval.json and gives its document. Loads the model if not given."""
    from luthier.evaluate.compare import as_document, compare

    decoder = load_tuned(prepared, run) if decoder is None else decoder
    with console.counting("asking base and tuned the same held-out questions") as advance:
        comparison = compare(decoder, prepared.dataset, prepared.recipe.evaluate, progress=advance)
    document = as_document(comparison)
    write_json(run.evaluation, document)
    return document


def run_all(prepared: Prepared, run: RunDirectory, *, resume: bool) -> dict[str, object]:
    """Every stage in order; gives what each came to."""
    from luthier.cli import show
    from luthier.cli.exporting import export
    from luthier.plan.plan import as_document

    show.data(prepared)
    show.plan(prepared)
    result = train(prepared, run, resume=resume)
    evaluated: dict[str, object] | None = None
    if prepared.dataset.eval or prepared.dataset.test:
        evaluated = evaluate(prepared, run)
    exported = [export(prepared, run, kind, None) for kind in prepared.recipe.export]
    return {
        "schema": SCHEMA_VERSION,
        "run": str(run.path),
        "plan": as_document(prepared.plan),
        "train": train_document(result),
        "evaluation": evaluated,
        "exports": exported,
    }


def train_document(result: TrainResult) -> dict[str, object]:
    """What training came to, for `--json`."""
    return {**asdict(result), "adapter": str(result.adapter)}
