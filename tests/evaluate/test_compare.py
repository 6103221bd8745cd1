"""Base against tuned on the bundled model: the figures are those of the parts, and off is really the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luthier.data.prepare import Dataset, prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import DataError, UsageError
from luthier.evaluate.compare import as_document, compare
from luthier.evaluate.loss import held_out_loss
from luthier.evaluate.questions import check_tasks
from luthier.generate.generate import complete
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, add_lora, lora_parameters, set_lora_enabled
from luthier.recipe.load import recipe_from_mapping
from luthier.recipe.schema import EvaluateRecipe


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    recipe = recipe_from_mapping({"model": "sprig", "data": "pirate"})
    return prepare(recipe, load_tokenizer(locate_model("sprig")))


@pytest.fixture
def decoder() -> Decoder:
    """sprig with a LoRA that is not zero, and so answers otherwise."""
    decoder = load_decoder(locate_model("sprig"), dtype=torch.float32)
    add_lora(decoder, LoRASpec(3, 5.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora_parameters(decoder).items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    return decoder


def test_figures_are_those_of_the_two_models(decoder: Decoder, dataset: Dataset) -> None:
    recipe = EvaluateRecipe(tasks=("pirate",), max_new_tokens=16, samples=3, limit=12)
    calls: list[tuple[int, int]] = []
    found = compare(decoder, dataset, recipe, lambda done, total: calls.append((done, total)))
    done = [one for one, _ in calls]  # rows whose loss is measured, and answers, of both models: 2 (12 + 12)
    assert all(total == 48 for _, total in calls)
    assert done == sorted(set(done))
    assert (len(done) >= 24, done[-1]) == (True, 48)
    assert (found.split, found.rows) == ("test", 12)
    rows = dataset.test[:12]
    assert held_out_loss(decoder, rows) == found.tuned  # and so the LoRA is on again
    base = load_decoder(locate_model("sprig"), dtype=torch.float32)
    assert held_out_loss(base, rows) == found.base
    assert found.base != found.tuned
    assert len(found.samples) == 3
    for row, sample in zip(rows, found.samples, strict=False):
        prompt = row.ids[: row.answer_start].tolist()
        stops = dataset.template.stop_ids
        tokenizer = dataset.template.tokenizer
        for model, text in ((base, sample.base), (decoder, sample.tuned)):
            assert complete(model, tokenizer, prompt, stop_ids=stops, max_new_tokens=16).text == text
        assert sample.prompt == row.fields["question"]
        assert sample.reference == row.fields["answer"]
    (pirate,) = found.tasks
    assert pirate.rows == 12
    assert pirate.base["style"] == 0.0  # sprig speaks plainly
    assert pirate.base["ended"] == 1.0


def test_the_document(decoder: Decoder, dataset: Dataset) -> None:
    found = compare(decoder, dataset, EvaluateRecipe(tasks=("pirate",), max_new_tokens=4, samples=2, limit=3))
    document = json.loads(json.dumps(as_document(found)))
    assert {"schema", "base", "tuned", "tasks", "samples"} <= document.keys()
    assert {"loss", "perplexity"} <= document["base"].keys()
    assert document["tasks"][0]["name"] == "pirate"
    assert set(document["samples"][0]) == {"prompt", "reference", "base", "tuned"}


def test_without_tasks_only_the_samples_are_answered(decoder: Decoder, dataset: Dataset) -> None:
    calls: list[int] = []
    recipe = EvaluateRecipe(max_new_tokens=2, samples=2, limit=5)
    found = compare(decoder, dataset, recipe, lambda done, _: calls.append(done))
    assert calls == [5, 6, 7, 12, 13, 14], "five rows and two answers of each model"
    assert found.tasks == ()
    assert found.rows == 5


def test_the_lora_is_on_again_after_a_failure(decoder: Decoder, dataset: Dataset) -> None:
    ids = torch.arange(6)
    with torch.no_grad():
        tuned = decoder(ids)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(decoder, dataset, EvaluateRecipe(max_new_tokens=2, limit=2), stop)
    with torch.no_grad():
        assert torch.equal(decoder(ids), tuned)
        set_lora_enabled(decoder, False)
        assert not torch.equal(decoder(ids), tuned)


def test_what_cannot_be_evaluated(decoder: Decoder, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a?", "answer": "b"}\n{"question": "c?", "answer": "d"}\n')
    source = {"path": str(rows), "split": "train"}
    recipe = recipe_from_mapping({"model": "sprig", "data": [source]})
    dataset = prepare(recipe, load_tokenizer(locate_model("sprig")))
    with pytest.raises(DataError, match="no held-out rows"):
        compare(decoder, dataset, EvaluateRecipe())
    with pytest.raises(UsageError, match="no task"):
        compare(decoder, dataset, EvaluateRecipe.model_construct(tasks=("piano",)))


def rows_for(folder: Path, rows: list[dict[str, str]], split: str = "test") -> Dataset:
    """The rows on one side, and two plain ones to train on."""
    folder.mkdir()
    plain = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}]
    for name, held in (("train", plain), ("held", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    sources = [{"path": str(folder / "train.jsonl"), "split": "train"}]
    sources += [{"path": str(folder / "held.jsonl"), "split": split}] if rows else []
    return prepare(recipe_from_mapping({"model": "sprig", "data": sources}), load_tokenizer(locate_model("sprig")))


def test_a_recipes_mistakes_are_found_before_a_model_is_loaded(dataset: Dataset, tmp_path: Path) -> None:
    check_tasks(dataset, EvaluateRecipe(tasks=("pirate", "exact")))
    with pytest.raises(UsageError, match="no task piano"):
        check_tasks(dataset, EvaluateRecipe.model_construct(tasks=("pirate", "piano"), limit=None))
    plain = {"question": "What is red?", "answer": "Blood."}
    facts = plain | {"fact": "blood"}
    without = rows_for(tmp_path / "plain", [plain, plain | {"question": "What else?"}], "eval")
    check_tasks(without, EvaluateRecipe(tasks=("exact",)))
    check_tasks(without, EvaluateRecipe())
    with pytest.raises(DataError, match="`pirate` has no held-out row") as caught:
        check_tasks(without, EvaluateRecipe(tasks=("exact", "pirate")))
    assert caught.value.remedy
    assert "fact" in caught.value.remedy
    second = rows_for(tmp_path / "second", [plain, facts | {"question": "What else?"}])
    check_tasks(second, EvaluateRecipe(tasks=("pirate",)))
    with pytest.raises(DataError, match="`pirate` has no held-out row"):  # only the first is asked
        check_tasks(second, EvaluateRecipe(tasks=("pirate",), limit=1))
    empty = rows_for(tmp_path / "wordless", [facts, facts | {"question": "What else?", "fact": "|"}])
    with pytest.raises(DataError, match="names no words"):
        check_tasks(empty, EvaluateRecipe(tasks=("pirate",)))


def test_nothing_held_out_matters_to_tasks_only(tmp_path: Path) -> None:
    nothing = rows_for(tmp_path / "nothing", [])
    check_tasks(nothing, EvaluateRecipe())
    with pytest.raises(DataError, match="no held-out rows"):
        check_tasks(nothing, EvaluateRecipe(tasks=("exact",)))
