"""Every mistake a user can make: one clear message, the right exit code, no traceback, nothing half-written.

The rest of each case (all problems at once, nearest names, the hub's own errors) is tested where it is decided; here
is what a person at a terminal gets.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.model.locate import locate_model
from tests import tiny
from tests.cli.command import Command, Ended

USAGE, DATA = 2, 3
ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows.jsonl", ROWS)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(ended: Ended, code: int, *words: str) -> None:
    """One message that says these words and what to try; no traceback; no run directory."""
    assert ended.code == code, ended.err
    for word in words:
        assert word in ended.message, ended.err
    assert ended.err.count("error:") == 1
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert not Path("runs").exists()


def test_missing_recipe(luthier: Command) -> None:
    refused(luthier("run", "nowhere.yaml"), USAGE, "nowhere.yaml")


def test_missing_data_file(luthier: Command, tmp_path: Path) -> None:
    made = recipe(tmp_path, "model: sprig\ndata: gone.jsonl\n")
    refused(luthier("run", made), DATA, "gone.jsonl", "try:")


def test_unknown_key(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\ntrain:\n  learning_rat: 1e-4\n")
    refused(luthier("run", made), USAGE, "recipe.yaml:4", "learning_rat", "learning_rate")


def test_wrong_type(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\nadapter:\n  rank: many\n")
    refused(luthier("run", made), USAGE, "recipe.yaml:4", "rank", "many")


def test_all_problems_at_once(luthier: Command, tmp_path: Path, rows: Path) -> None:
    text = "model: sprig\ndata: rows.jsonl\nadapter:\n  rank: many\ntrain:\n  stesp: 5\nsplt: {}\n"
    ended = luthier("run", recipe(tmp_path, text))
    refused(ended, USAGE, "recipe.yaml:4", "recipe.yaml:6", "recipe.yaml:7", "3 problems")


def test_unknown_setting_on_the_command_line(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\n")
    refused(luthier("run", made, "--set", "train.stesp=60"), USAGE, "--set train.stesp=60", "steps")


def test_unsupported_family(luthier: Command, tmp_path: Path, rows: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    made = recipe(tmp_path, "model: ./model\ndata: rows.jsonl\n")
    refused(luthier("run", made), USAGE, "gpt2", "llama", "mistral", "qwen2", "qwen3")


def test_pickled_weights_only(luthier: Command, tmp_path: Path, rows: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    made = recipe(tmp_path, "model: ./model\ndata: rows.jsonl\n")
    refused(luthier("run", made), USAGE, "pytorch_model.bin", "safetensors", "try:")


def test_model_id_offline(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "model: nobody/never-fetched\ndata: rows.jsonl\n")
    refused(luthier("run", made), USAGE, "nobody/never-fetched", "try:")


def test_rows_without_answers(luthier: Command, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "rows.jsonl", [*ROWS, {"question": "And this?"}, {"question": "Or?", "answer": ""}])
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\n")
    refused(luthier("run", made), DATA, "rows.jsonl:13", "rows.jsonl:14", "answer")


def test_empty_data_file(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\n")
    refused(luthier("run", made), DATA, "rows.jsonl", "empty")


def test_broken_json(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a", \n')
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\n")
    refused(luthier("run", made), DATA, "rows.jsonl:2", "JSON")


def test_a_run_that_is_there_already(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\n")
    adapter = tmp_path / "mine" / "adapter"
    adapter.mkdir(parents=True)
    ended = luthier("train", made, "--out", tmp_path / "mine")
    refused(ended, USAGE, "already holds a trained run", "--out")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["adapter"]


def test_eval_of_what_is_no_run(luthier: Command, tmp_path: Path) -> None:
    refused(luthier("eval", tmp_path), USAGE, "not a run directory")


def test_chat_with_what_is_no_model(luthier: Command, tmp_path: Path) -> None:
    refused(luthier("generate", tmp_path, "-p", "Hello"), USAGE, "neither a run directory nor an adapter")


def test_a_typo_of_the_bundled_model(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "model: sprigg\ndata: rows.jsonl\n")
    refused(luthier("run", made), USAGE, "sprigg", "did you mean sprig?")


def test_unknown_preset(luthier: Command) -> None:
    refused(luthier("init", "--preset", "pirat"), USAGE, "pirat", "pirate")


def test_init_overwrites_nothing(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precious")
    refused(luthier("init", "--out", "mine.yaml"), USAGE, "mine.yaml", "there already")
    assert (tmp_path / "mine.yaml").read_text() == "precious"


def test_a_defect_of_ours_says_so(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("luthier.recipe.init.commented_recipe", broken)
    refused(luthier("init"), 1, "a defect of ours", "ZeroDivisionError", "--debug")
    with pytest.raises(ZeroDivisionError):
        luthier("init", "--debug")


def test_a_recipe_of_ones_own_is_not_overwritten(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "# mine\nmodel: sprig\ndata: rows.jsonl\n")
    refused(luthier("train", made, "--out", tmp_path), USAGE, "recipe.yaml is there already", "--out")
    assert made.read_text().startswith("# mine")


def test_a_file_where_the_run_should_go(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(tmp_path, "model: sprig\ndata: rows.jsonl\ntrain: {steps: 1}\n")
    refused(luthier("train", made, "--out", rows), USAGE, "rows.jsonl")
    assert rows.read_text().count("\n") == len(ROWS)


def test_a_task_that_no_row_fits_is_said_before_training(luthier: Command, tmp_path: Path, rows: Path) -> None:
    made = recipe(
        tmp_path, "model: sprig\ndata: rows.jsonl\nsplit: {train: 0.5, eval: 0.5}\nevaluate: {tasks: [pirate]}\n"
    )
    refused(luthier("run", made), DATA, "pirate", "fact")


def test_a_prompt_that_is_no_text(luthier: Command) -> None:
    sprig = locate_model("sprig")
    refused(luthier("generate", sprig, "-p", "\udcff"), USAGE, "not UTF-8")
    refused(luthier("generate", sprig, "-p", ""), USAGE, "the prompt is empty")


def test_an_adapter_that_names_no_base(luthier: Command, tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(luthier("generate", tmp_path, "-p", "Hello"), USAGE, "does not name a base model")
