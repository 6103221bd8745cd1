"""A model of the hub is pinned to the commit that it was at: in the plan, and in all that the run is used for later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from luthier.errors import ModelError
from luthier.model.adapter import read_adapter_config
from luthier.model.locate import locate_model, pinned_to, revision_of
from tests import tiny
from tests.cli.command import Command

FIRST, SECOND = "1" * 40, "2" * 40
NAME = "maker/good"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of a model, other weights in each; `main` is the first. There is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--maker--good"
    (repository / "blobs").mkdir(parents=True)
    for seed, commit in enumerate((FIRST, SECOND)):
        made = tiny.make_model(tmp_path / f"made-{seed}", seed=seed)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(made.iterdir())):
            blob = repository / "blobs" / f"{seed}{number:039x}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST, encoding="ascii")
    rows: list[dict[str, object]] = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(12)]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    text = (
        f"model: {NAME}\ndata: rows.jsonl\nsplit: {{train: 0.75, eval: 0.25}}\nevaluate: {{samples: 1}}\n"
        "train: {steps: 2, batch_size: 2, precision: fp32}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return repository


def move_main(repository: Path) -> None:
    (repository / "refs" / "main").write_text(SECOND, encoding="ascii")


def test_names_with_a_commit(hub: Path) -> None:
    assert revision_of(locate_model(NAME)) == FIRST
    assert revision_of(locate_model(f"{NAME}@{SECOND}")) == SECOND
    assert pinned_to(NAME, FIRST) == f"{NAME}@{FIRST}"
    assert pinned_to(f"{NAME}@main", FIRST) == f"{NAME}@{FIRST}"
    assert pinned_to("sprig", FIRST) == "sprig"
    assert pinned_to(str(hub), FIRST) == str(hub)
    move_main(hub)
    assert revision_of(locate_model(NAME)) == SECOND
    assert revision_of(locate_model(f"{NAME}@{FIRST}")) == FIRST
    with pytest.raises(ModelError, match="neither a folder nor in the hub's cache"):
        locate_model(f"{NAME}@{'3' * 40}")


def revision(document: dict[str, object]) -> object:
    decisions = document["decisions"]
    assert isinstance(decisions, list)
    return next((one["value"] for one in decisions if one["setting"] == "model.revision"), None)


def test_the_plan_says_which(luthier: Command, hub: Path) -> None:
    ended = luthier("plan", "recipe.yaml", "--json")
    assert ended.code == 0, ended.err
    assert revision(json.loads(ended.out)) == FIRST
    shown = luthier("plan", "recipe.yaml").out
    assert "model.revision" in shown
    assert FIRST[:8] in shown  # a narrow table breaks it
    ended = luthier("plan", "recipe.yaml", "--json", "--set", f"model={NAME}@{SECOND}")
    assert revision(json.loads(ended.out)) == SECOND


def test_a_model_that_is_not_of_the_hub_has_none(luthier: Command, hub: Path) -> None:
    ended = luthier("plan", "recipe.yaml", "--json", "--set", "model=sprig")
    assert ended.code == 0, ended.err
    assert revision(json.loads(ended.out)) is None


def norm_of(folder: Path) -> list[float]:
    with safe_open(folder / "model.safetensors", framework="pt") as shard:
        values: list[float] = shard.get_tensor("model.norm.weight").float().tolist()
    return values


def test_a_run_stays_at_its_commit(luthier: Command, hub: Path, tmp_path: Path) -> None:
    ended = luthier("train", "recipe.yaml", "--out", "run")
    assert ended.code == 0, ended.err
    assert revision(json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))) == FIRST
    assert read_adapter_config(tmp_path / "run" / "adapter")[1] == f"{NAME}@{FIRST}"
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["base_model_name_or_path"], written["revision"]) == (NAME, FIRST)
    move_main(hub)
    for words in (("train", "recipe.yaml", "--out", "run", "--resume"), ("eval", "run"), ("merge", "run")):
        ended = luthier(*words)
        assert ended.code == 0, ended.err
    assert revision(json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))) == FIRST
    merged = next((tmp_path / "run" / "exports").rglob("model.safetensors")).parent
    first, second = (norm_of(hub / "snapshots" / commit) for commit in (FIRST, SECOND))
    assert norm_of(merged) == pytest.approx(first, abs=0.02)  # bf16 of values around one
    assert norm_of(merged) != pytest.approx(second, abs=0.02)
