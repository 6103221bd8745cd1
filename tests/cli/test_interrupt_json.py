"""What fails with `--json` says so in one JSON document on stdout, as it does in words on stderr."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from luthier.data.prepare import Dataset
from luthier.errors import Interrupted
from luthier.evaluate.compare import compare
from luthier.evaluate.loss import held_out_loss
from luthier.recipe.schema import EvaluateRecipe
from tests.cli.command import Command, Ended

RECIPE = "model: sprig\ndata: rows.jsonl\n"


def error_of(ended: Ended) -> dict[str, object]:
    found = json.loads(ended.out)
    assert list(found) == ["error"]
    error: dict[str, object] = found["error"]
    assert list(error) == ["kind", "message", "remedy", "exit_code"]
    assert error["exit_code"] == ended.code
    return error


def test_a_recipe_that_is_not_there(luthier: Command) -> None:
    ended = luthier("train", "nowhere.yaml", "--json")
    error = error_of(ended)
    assert (error["kind"], ended.code) == ("RecipeError", 2)
    assert "nowhere.yaml" in str(error["message"])
    assert ended.err.count("error:") == 1
    assert not Path("runs").exists()


def test_a_signal_before_the_command_begins(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the command line is built: nobody has made an exit of it yet."""
    from luthier.cli import main

    def built(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", built)
    ended = luthier("plan", "recipe.yaml", "--json")
    assert (ended.code, error_of(ended)["kind"]) == (130, "Interrupted")
    assert "nothing was left half-written" in ended.err
    assert "Traceback" not in ended.err


def test_data_that_is_not_there(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = luthier("run", "recipe.yaml", "--json")
    error = error_of(ended)
    assert (error["kind"], ended.code) == ("DataError", 3)
    assert error["remedy"]
    assert not Path("runs").exists(), "made for the lock, and taken away again"


def test_a_command_line_that_is_not_understood(luthier: Command) -> None:
    ended = luthier("train", "--nonsense", "--json")
    assert (error_of(ended)["kind"], ended.code) == ("UsageError", 2)


def test_a_path_that_cannot_be_written(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: sprig\ndata: pirate\n")
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/run"):
        ended = luthier("train", "recipe.yaml", "--out", out, "--json")
        assert (error_of(ended)["kind"], ended.code) == ("UsageError", 2)
        assert "file" in ended.message


def test_a_full_disk_is_no_defect_of_ours(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("luthier.recipe.load.load_recipe", full)
    ended = luthier("plan", "recipe.yaml", "--json")
    error = error_of(ended)
    assert (error["kind"], ended.code) == ("FitError", 4)
    assert "no room on the disk" in str(error["message"])


def test_without_json_nothing_is_on_stdout(luthier: Command) -> None:
    assert luthier("train", "nowhere.yaml").out == ""


def test_interrupted(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Interrupted("SIGTERM: stopped", "run the same command again")

    monkeypatch.setattr("luthier.recipe.load.load_recipe", stop)
    ended = luthier("plan", "recipe.yaml", "--json")
    assert (error_of(ended)["kind"], ended.code) == ("Interrupted", 75)


def test_a_comparison_counts_rows_and_answers_and_can_be_left_at_each(
    luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss on ten thousand rows takes a minute: it is seen to go on, and Ctrl-C does not wait for it."""
    (tmp_path / "recipe.yaml").write_text(
        "model: sprig\ndata: pirate\nadapter: {rank: 2}\ntrain: {steps: 1, batch_size: 2, warmup_steps: 0}\n"
        "evaluate: {samples: 1, max_new_tokens: 2}\n"
    )
    small = partial(held_out_loss, tokens_per_batch=512)  # the hundred rows are more than one group then
    monkeypatch.setattr("luthier.evaluate.compare.held_out_loss", small)
    assert luthier("train", "recipe.yaml", "--out", "run").code == 0
    told: list[tuple[int, int]] = []

    def spy(decoder: object, dataset: Dataset, asked: EvaluateRecipe, progress: object) -> object:
        def told_and_stopped(done: int, total: int) -> None:
            told.append((done, total))
            if len(told) == 2:
                raise KeyboardInterrupt

        rows = len(dataset.eval)
        with pytest.raises(KeyboardInterrupt):
            compare(decoder, dataset, asked, told_and_stopped)  # type: ignore[arg-type]
        assert 0 < told[0][0] < told[1][0] < rows
        told.clear()
        found = compare(decoder, dataset, asked, lambda done, total: told.append((done, total)))  # type: ignore[arg-type]
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert told[-1] == (2 * (rows + 1), 2 * (rows + 1))
        raise Interrupted(f"{found.rows} rows", "again")

    monkeypatch.setattr("luthier.evaluate.compare.compare", spy)
    ended = luthier("eval", "run", "--json")
    assert ended.code == 75, ended.err
