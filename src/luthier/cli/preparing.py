"""What a recipe means on a machine: everything that is known before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli import console
from luthier.cli.targets import UNTRAINED_REMEDY, epoch_of, say_waiting, untrained_names

if TYPE_CHECKING:
    from luthier.data.prepare import Dataset
    from luthier.model.config import ModelConfig
    from luthier.plan.choose import DataFacts, Epoch
    from luthier.plan.plan import Plan
    from luthier.recipe.schema import Recipe

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What a recipe means on this machine: everything that is known before weights are loaded."""

    recipe: Recipe
    base: Path
    config: ModelConfig
    dataset: Dataset
    plan: Plan

    @property
    def digest(self) -> str:
        """What the rows are, on all sides: the same rows, split and template give the same one."""
        return self.dataset.digest


def prepare(recipe: Recipe) -> Prepared:
    """Find the model, read and tokenise the data, and decide what the recipe leaves open."""
    from luthier.data.prepare import limit_length
    from luthier.data.prepare import prepare as prepare_data
    from luthier.data.tokenizer import load_tokenizer
    from luthier.evaluate.compare import check_tasks
    from luthier.hardware.probe import this_device
    from luthier.model.config import read_config
    from luthier.model.locate import locate_model
    from luthier.plan.choose import choose

    base = locate_model(recipe.model)
    config = read_config(base)
    with console.counting("reading the data") as advance:
        dataset = prepare_data(recipe, load_tokenizer(base), progress=advance, waiting=say_waiting)
    if names := untrained_names(base, dataset.template):
        note = f"the model was never trained on {', '.join(names)}, which the template writes: {UNTRAINED_REMEDY}"
        report = dataset.report
        dataset = replace(dataset, report=replace(report, notes=(*report.notes, note)))
    facts = _facts(dataset)
    plan = choose(recipe, this_device(), config, facts)
    check_tasks(dataset, recipe.evaluate)
    return Prepared(recipe, base, config, limit_length(dataset, plan.settings.max_length), plan)


def _facts(dataset: Dataset) -> DataFacts:
    """What the plan needs to know of the rows."""
    import numpy as np

    from luthier.data.prepare import limit_length
    from luthier.data.split import SIDES
    from luthier.plan.choose import DataFacts, Lengths

    def epoch(max_length: int, packing: bool) -> Epoch:
        train = limit_length(dataset, max_length).train
        return epoch_of(train, dataset.recipe.seed, max_length if packing else None)

    lengths = np.concatenate([dataset.split(side).lengths for side in SIDES])
    return DataFacts(
        train_rows=len(dataset.train),
        eval_rows=len(dataset.eval),
        lengths=Lengths.of(lengths.tolist()),
        labelled_tokens=round(float((dataset.train.labelled * dataset.train.weights).sum())),
        epoch=epoch,
    )
