"""Going on with a run through the command line: what is refused, said, and left as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from luthier.model.locate import locate_model
from tests.cli.command import Command
from tests.cli.test_run import document
from tests.cli.test_verify import flip, same_adapter, tree, unfinished

RECIPE = """\
model: sprig
data: pirate
adapter: {rank: 4, alpha: 8}
train: {steps: 4, batch_size: 4, learning_rate: 2.0e-3, eval_every: 4, save_every: 2}
evaluate: {limit: 20, samples: 1, max_new_tokens: 4}
"""
TRAIN = ("train", "recipe.yaml", "--out", "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, measured."""
    folder = tmp_path_factory.mktemp("resuming")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "luthier", "run", "recipe.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it, beside its recipe."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_without_checkpoints_is_left_as_it_is(luthier: Command, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = tree(run)
    for command in ("train", "run"):
        ended = luthier(command, *TRAIN[1:], "--resume")
        assert (ended.code, "holds a trained run without a checkpoint" in ended.message) == (2, True)
    assert tree(run) == before


def test_a_damaged_run_is_left_as_it_is(luthier: Command, run: Path) -> None:
    """None of its checkpoints is whole: recipe, plan and data stay those that it was made with."""
    for folder in (run / "checkpoints").glob("step-*"):
        flip(folder / "optimizer.safetensors")
    before = tree(run)
    ended = luthier(*TRAIN, "--resume", "--set", "train.steps=6")
    assert (ended.code, "can be gone on from" in ended.message) == (5, True)
    assert tree(run) == before


def test_nothing_to_go_on_from_is_said(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = luthier(*TRAIN, "--resume")
    assert ended.code == 0, ended.err
    assert "nothing to go on from: begins at step 0" in ended.message


def test_other_weights_of_that_name_are_refused(luthier: Command, tmp_path: Path) -> None:
    shutil.copytree(locate_model("sprig"), tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("sprig", "./base"))
    trained = luthier(*TRAIN, "--json")
    assert document(trained)["steps"] == 4
    (file,) = (tmp_path / "base").glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    before = tree(tmp_path / "run")
    ended = luthier(*TRAIN, "--resume", "--set", "train.steps=6")
    assert (ended.code, "are not those that the run was begun with" in ended.message) == (2, True)
    assert tree(tmp_path / "run") == before


def test_what_has_changed_in_the_recipe_is_shown(luthier: Command, run: Path) -> None:
    shutil.rmtree(run / "adapter")
    ended = luthier(*TRAIN, "--set", "train.learning_rate=1e-3")
    assert ended.code == 2
    assert "then train: learning_rate: 0.002 now train: learning_rate: 0.001" in ended.message
    assert "--resume shows the difference" in ended.message


@pytest.mark.parametrize("name", ["data/data.json", "plan.json", "eval.json"])
@pytest.mark.parametrize("content", [{}, {"sources": 3, "decisions": [1], "base": {"loss": "low"}}])
def test_a_document_that_is_another_is_an_error_in_words(
    luthier: Command, run: Path, name: str, content: dict[str, object]
) -> None:
    (run / name).write_text(json.dumps(content))
    ended = luthier("merge", "run")
    assert ended.code == 2, ended.err
    assert f"{name} is not" in ended.message
    assert "defect" not in ended.message


def test_an_adapter_that_a_kill_left_beside_is_put_back(luthier: Command, run: Path, made: Path) -> None:
    """Between the two renames of a run that was given more steps; 999999999 is the number of no process."""
    (run / "adapter").rename(run / ".adapter.999999999.old")
    ended = luthier("eval", "run")
    assert ended.code == 0, ended.err
    assert tree(run / "adapter") == tree(made / "adapter")
    assert not (run / ".adapter.999999999.old").exists()


def test_a_stop_file_of_before_is_refused_before_the_data_is_read(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "going").touch()
    ended = luthier(*TRAIN, "--set", "train.stop_file=going")
    assert (ended.code, "going is there already" in ended.message) == (2, True)
    assert "reading the data" not in ended.err


def test_a_stop_file_that_comes_while_the_model_is_loaded_stops(
    luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.cli import stages

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    loads = stages._load

    def load(*arguments: object) -> object:
        (tmp_path / "going").touch()
        return loads(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "_load", load)
    ended = luthier(*TRAIN, "--set", "train.stop_file=going")
    assert ended.code == 75, ended.err
    assert "the stop file going: stopped after step 0 of 4" in ended.message
    assert "remove going, then run the same command again with --resume" in ended.message


def test_the_only_checkpoint_is_found_where_a_kill_had_it_set_aside(luthier: Command, run: Path, made: Path) -> None:
    """Between the two renames of one that is written again; 999999999 is the number of no process."""
    unfinished(run, 2)
    (run / "checkpoints" / "step-000002").rename(run / "checkpoints" / ".step-000002.999999999.old")
    ended = luthier(*TRAIN)
    assert ended.code == 0, ended.err
    assert "unfinished: going on from step 2" in ended.message
    assert same_adapter(run, made)
