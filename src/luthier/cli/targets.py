"""What is looked at before any weights are loaded: the recipe, the tokenizer, tokens that were never trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli import console
from luthier.recipe.schema import BUNDLED_MODEL
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.data.dataset import Examples
    from luthier.data.render import Template
    from luthier.data.tokenizer import ChatTokenizer
    from luthier.plan.rows import Epoch
    from luthier.recipe.schema import Recipe

__all__ = [
    "UNTRAINED_REMEDY",
    "epoch_of",
    "find_tokenizer",
    "is_recipe",
    "read_target",
    "say_waiting",
    "untrained_names",
]

UNTRAINED_REMEDY = "take the Instruct version of the model, or `template: alpaca`, which needs none of them"
"""What to do where a template's tokens were never trained."""


def is_recipe(target: str) -> bool:
    """Whether the target is a recipe, or a run directory that holds one; else it is data."""
    return Path(target).suffix.lower() in (".yaml", ".yml") or RunDirectory(Path(target)).recipe.is_file()


def read_target(target: str, model: str | None, sets: Sequence[str]) -> Recipe:
    """The recipe that `target` is, or that a run directory holds; or one that takes it as data, with nothing else said.

    Raises:
        RecipeError: the recipe, or an override, is wrong.
    """
    from luthier.recipe.load import load_recipe, recipe_from_mapping

    if model is not None and os.path.isdir(model):
        model = os.path.abspath(model)  # a recipe's relative paths are taken from where it lies, this one from here
    if not is_recipe(target):
        values = {"model": model or BUNDLED_MODEL, "data": target}
        return recipe_from_mapping(values, overrides=list(sets), where="--set")
    run = RunDirectory(Path(target))
    overrides = [*([] if model is None else [f"model={model}"]), *sets]
    return load_recipe(run.recipe if run.recipe.is_file() else Path(target), overrides)


def find_tokenizer(model: str) -> tuple[Path, ChatTokenizer]:
    """The model's folder and tokenizer. A folder with a tokenizer alone will do: nothing is loaded but that."""
    from luthier.data.tokenizer import load_tokenizer
    from luthier.model.locate import locate_model

    folder = Path(model)
    if model == BUNDLED_MODEL or not (folder / "tokenizer.json").is_file():
        folder = locate_model(model)
    return folder, load_tokenizer(folder)


def epoch_of(train: Examples, seed: int, capacity: int | None) -> Epoch:
    """What an epoch of these rows comes to; `capacity` tokens make a pack, None: rows are not packed."""
    from luthier.data.epochs import Epochs
    from luthier.plan.rows import Epoch

    found = Epochs(len(train), seed, weights=train.weights, lengths=train.lengths, capacity=capacity)
    return Epoch(found.rows, found.tokens, None if capacity is None else found.units)


def say_waiting() -> None:
    """Where another process is at work on the same data."""
    console.say("another luthier is preparing the same data; waiting for it …")


def untrained_names(base: Path, template: Template) -> list[str]:
    """The tokens that the template writes and the model was never trained on; none where the folder has no weights."""
    from luthier.data.conversation import Turn
    from luthier.model.untrained import untrained_tokens

    if not any(base.glob("*.safetensors")):
        return []
    tokenizer = template.tokenizer
    written = {*template.prompt_ids([Turn("user", "a")]), template.end_of_turn} & tokenizer.control_ids
    return [str(tokenizer.token_text(number)) for number in untrained_tokens(base, sorted(written))]
