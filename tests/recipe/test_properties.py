"""What holds for every recipe: dump and load, overrides and edits, unknown keys and their lines."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from luthier.errors import RecipeError
from luthier.recipe.document import read_document, write_document
from luthier.recipe.expects import is_section, settings_under
from luthier.recipe.init import commented_recipe, list_presets
from luthier.recipe.load import dump_recipe, load_recipe
from luthier.recipe.rules import breaches
from luthier.recipe.schema import (
    AdapterRecipe,
    DataSource,
    EvaluateRecipe,
    Recipe,
    SplitRecipe,
    TrainRecipe,
)

quick = settings(max_examples=60, deadline=None)
# No control characters, which YAML cannot hold plainly, nor lone surrogates, which no file can.
words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co")), min_size=1, max_size=20)
tricky = st.sampled_from(
    ["1e-4", "no", "on", "null", "~", "010", "1:30", "2001-01-01", "=", "<<", "{a}", "a: b", "# x", " a "]
)
names = words | tricky
auto = st.just("auto")
projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
counts = st.integers(1, 10**6)
positive = st.floats(1e-9, 1e6)


def path_of(name: str) -> str:
    return "/rows/" + name.replace("/", "_").replace(".", "_") + ".jsonl"


sources = st.builds(
    DataSource,
    path=names.map(path_of) | st.sampled_from(["pirate", "tales"]),
    format=st.sampled_from(["auto", "alpaca", "question-answer"]),
    fields=st.dictionaries(names, names, max_size=3),
    split=st.sampled_from(["all", "train"]),
)
adapters = st.builds(
    AdapterRecipe,
    rank=counts | auto,
    alpha=positive | auto,
    dropout=st.floats(0, 0.99),
    targets=st.sampled_from(["all-linear", "attention"])
    | st.lists(st.sampled_from(projections), min_size=1, unique=True).map(tuple),
    scale=st.sampled_from(["standard", "rslora"]),
)
trains = st.builds(
    TrainRecipe,
    epochs=positive | auto,
    batch_size=counts | auto,
    learning_rate=st.floats(1e-9, 1) | auto,
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_steps=st.integers(0, 100) | auto,
    weight_decay=st.floats(0, 1),
    clip=st.floats(0, 1e9),
    checkpointing=st.booleans() | st.integers(0, 200) | auto,
    attention=st.sampled_from(["auto", "flash", "efficient", "math"]),
    max_length=st.integers(8, 10**6) | auto,
    eval_every=st.integers(0, 1000) | auto,
    save_every=counts | auto,
)
splits = st.sampled_from(
    [SplitRecipe(), SplitRecipe(train=0.8, eval=0.1, test=0.1), SplitRecipe(train=0.75, eval=0.25)]
)
recipes = st.builds(
    Recipe,
    model=st.sampled_from(["sprig", "meta-llama/Llama-3.1-8B", "/models/ä b"]),
    data=st.lists(sources, min_size=1, max_size=3).map(tuple),
    template=st.sampled_from(["model", "alpaca", "Q: {q}\n\nA: {a}", "{{x}} {a}"]),
    adapter=adapters,
    quantize=st.sampled_from(["auto", "none", "nf4"]),
    train=trains,
    split=splits,
    seed=st.integers(0, 2**32 - 1),
    evaluate=st.builds(
        EvaluateRecipe, tasks=st.sampled_from([(), ("pirate",)]), samples=st.integers(0, 9), limit=counts | st.none()
    ),
    export=st.lists(st.sampled_from(["hf", "gguf", "ollama", "mlx"]), unique=True).map(tuple),
)


def loaded(text: str, *overrides: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)


@quick
@given(recipes)
def test_load_of_dump_is_the_recipe(recipe: Recipe) -> None:
    assume(not breaches(recipe))
    assert loaded(dump_recipe(recipe)) == recipe
    assert dump_recipe(loaded(dump_recipe(recipe))) == dump_recipe(recipe), "1 is not true"


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("true", True), ("0", 0), ("false", False), ("auto", "auto")])
def test_a_number_of_layers_is_not_a_truth_value(text: str, value: object) -> None:
    found = loaded(f"model: sprig\ndata: pirate\ntrain: {{checkpointing: {text}}}\n").train.checkpointing
    assert (found, type(found)) == (value, type(value))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        names | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=8,
    )
)
def test_read_of_write_is_the_value(value: object) -> None:
    document = read_document(write_document({"x": value}), "x")
    assert document.problems == []
    assert document.value == {"x": value}


@pytest.mark.parametrize("preset", [None, *list_presets()])
@pytest.mark.parametrize("data", [None, "my: rows #1.jsonl"])
@pytest.mark.parametrize("model", [None, "1e-4"])
def test_every_init_output_loads(preset: str | None, data: str | None, model: str | None) -> None:
    text = commented_recipe(data, model, preset)
    recipe = loaded(text)
    assert data is None or recipe.data[0].path.endswith(data)
    assert model is None or recipe.model == model
    for name in Recipe.model_fields:
        assert f"\n{name}:" in text
        for inner in settings_under((name,)) if is_section((name,)) else ():
            assert f"\n  {inner}:" in text


SECTIONS = ("", "adapter", "train", "split", "evaluate", "ollama")


@quick
@given(st.sampled_from(SECTIONS), st.text("abcdefgh_", min_size=1, max_size=8), st.integers(0, 5))
def test_every_unknown_key_is_reported_with_its_line(section: str, key: str, blank: int) -> None:
    known = settings_under((section,)) if section else tuple(Recipe.model_fields)
    assume(key not in known)
    lines = ["model: sprig", "data: pirate", *["# nothing"] * blank]
    lines += [f"{section}:", f"  {key}: 1"] if section else [f"{key}: 1"]
    with pytest.raises(RecipeError) as caught:
        loaded("\n".join(lines))
    (problem,) = caught.value.problems
    assert problem.line == len(lines)
    assert f"unknown setting `{f'{section}.' if section else ''}{key}`" in problem.reason


@quick
@given(st.integers(1, 4))
def test_every_unknown_key_of_a_source_is_reported_with_its_line(place: int) -> None:
    lines = ["model: sprig", "data:", *["  - path: a.jsonl"] * place, "    fromat: text"]
    with pytest.raises(RecipeError) as caught:
        loaded("\n".join(lines))
    (problem,) = caught.value.problems
    assert problem.line == len(lines)
    assert problem.reason == f"unknown setting `data.{place - 1}.fromat`"
    assert problem.remedy == f"did you mean `data.{place - 1}.format`?"


CHANGES = {
    "train.steps": "60",
    "train.learning_rate": "1e-4",
    "adapter.targets": "[q_proj, v_proj]",
    "train.checkpointing": "false",
    "train.attention": "math",
    "hardware": "4xa100-40g",
    "split": "{train: 0.5, eval: 0.5}",
    "evaluate.limit": "null",
    "template": '"Q: {q}\\nA: {a}"',
    "data": "tales",
    "export": "[]",
}


@quick
@given(st.dictionaries(st.sampled_from(sorted(CHANGES)), st.none(), min_size=1))
def test_overrides_equal_editing_the_file(chosen: dict[str, None]) -> None:
    base = {"model": "sprig", "data": "pirate"}
    edited: dict[str, object] = dict(base)
    for name in chosen:
        value = read_document(CHANGES[name], "x").value
        section, _, inner = name.partition(".")
        if inner:
            holder = edited.setdefault(section, {})
            assert isinstance(holder, dict)
            holder[inner] = value
        else:
            edited[section] = value
    overrides = [f"{name}={CHANGES[name]}" for name in chosen]
    assert loaded(write_document(base), *overrides) == loaded(write_document(edited))
