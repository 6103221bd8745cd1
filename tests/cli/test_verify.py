"""`luthier verify` on a real run, whole and harmed; and a run that goes on with or without being told to."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from luthier.cli import console
from tests.cli.command import Command, Ended
from tests.cli.test_run import document, moved

RECIPE = """\
model: sprig
data: pirate
adapter: {rank: 4, alpha: 8, dropout: 0.1}
train: {steps: 8, batch_size: 4, learning_rate: 2.0e-3, warmup_steps: 2, eval_every: 8, save_every: 2}
"""


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console that was made where COLUMNS was 80 keeps to that."""
    monkeypatch.setattr(console.output, "_width", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps; checkpoints of 4, 6 and 8 are kept."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "luthier", "train", "recipe.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, offset: int = -2) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def failed(ended: Ended) -> dict[str, object]:
    assert ended.code == 5, ended.err
    found = json.loads(ended.out)
    assert isinstance(found, dict)
    assert found["passed"] is False
    return found


def wrong(found: dict[str, object]) -> list[dict[str, object]]:
    files = found["files"]
    assert isinstance(files, list)
    return [one for one in files if not one["passed"]]


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_run_that_is_whole_passes_and_is_not_touched(luthier: Command, run: Path) -> None:
    before = tree(run)
    found = document(luthier("verify", run, "--json"))
    assert found["passed"] is True
    assert wrong(found) == []
    files = {one["file"] for one in found["files"]}  # type: ignore[attr-defined]
    assert files >= {f"checkpoints/step-00000{step}/optimizer.safetensors" for step in (4, 6, 8)}
    assert files >= {"checkpoints/LATEST", "checkpoints/BEST", "adapter/tokenizer.json", "events.jsonl"}
    repeated = found["repeated"]
    assert isinstance(repeated, dict)
    assert repeated["from"] == 4, "the newest with three steps behind it"
    assert [one["step"] for one in repeated["steps"]] == [5, 6, 7]
    assert all(one["same"] and one["loss"] == one["logged"]["loss"] for one in repeated["steps"])
    assert tree(run) == before


def test_it_is_shown_in_tables(luthier: Command, run: Path) -> None:
    ended = luthier("verify", run, "--steps", 2)
    assert ended.code == 0, ended.err
    assert "checkpoints/step-000006" in ended.out
    assert "steps taken again from checkpoint step-000006" in ended.out
    assert ended.out.count("the same") == 2
    assert "all as it was" in ended.err


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/step-000004/optimizer.safetensors",
        "checkpoints/step-000008/state.json",
        "checkpoints/step-000006/manifest.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
    ],
)
def test_one_bit_is_found_and_named(luthier: Command, run: Path, name: str) -> None:
    flip(run / name)
    found, *others = wrong(failed(luthier("verify", run, "--steps", 0, "--json")))
    assert found["file"] == name
    assert found["expected"] != found["found"]
    named = ["checkpoints/LATEST", "checkpoints/BEST"] if "step-000008" in name else []
    assert [one["file"] for one in others] == named, "and what names it"
    ended = luthier("verify", run, "--steps", 0)
    assert (ended.code, name in ended.out) == (5, True), ended.out
    assert "not as it was" in ended.err


def test_files_that_are_gone_are_named(luthier: Command, run: Path) -> None:
    (run / "adapter" / "adapter_config.json").unlink()
    (run / "checkpoints" / "LATEST").unlink()
    (run / "checkpoints" / "BEST").write_text("step-000002\n")
    found = {one["file"]: one["found"] for one in wrong(failed(luthier("verify", run, "--steps", 0, "--json")))}
    assert found == {
        "adapter/adapter_config.json": "no such file",
        "checkpoints/LATEST": "no such file",
        "checkpoints/BEST": "step-000002",
    }


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("LATEST", "step-000006\n", "step-000006"),
        ("BEST", "step-000004\n", "step-000004"),
        ("BEST", None, "no such file"),
    ],
)
def test_a_name_of_another_whole_one_is_a_fault(
    luthier: Command, run: Path, name: str, content: str | None, shown: str
) -> None:
    """The newest and the best are of step 8."""
    path = run / "checkpoints" / name
    path.unlink() if content is None else path.write_text(content)
    (found,) = wrong(failed(luthier("verify", run, "--steps", 0, "--json")))
    assert (found["file"], found["found"]) == (f"checkpoints/{name}", shown)


def test_a_damaged_checkpoint_is_not_repeated_from(luthier: Command, run: Path) -> None:
    flip(run / "checkpoints" / "step-000004" / "rng.safetensors")
    found = failed(luthier("verify", run, "--json"))
    assert found["repeated"]["from"] == 0  # type: ignore[index]
    assert [one["same"] for one in found["repeated"]["steps"]] == [True] * 3  # type: ignore[index]
    assert "so the first steps were taken again" in str(found["notes"])


def test_a_loss_that_was_not_is_found(luthier: Command, run: Path) -> None:
    """The last bit of one loss in the log."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    line = next(line for line in lines if (line["event"], line["step"]) == ("step", 6))
    true = line["loss"]
    line["loss"] += 1e-15 * true
    assert line["loss"] != true
    (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    steps = failed(luthier("verify", run, "--json"))["repeated"]["steps"]  # type: ignore[index]
    assert [one["same"] for one in steps] == [True, False, True]
    assert (steps[1]["step"], steps[1]["loss"], steps[1]["logged"]["loss"]) == (6, true, line["loss"])
    ended = luthier("verify", run)
    assert "different" in ended.out
    assert repr(true) in ended.out


def test_a_log_that_is_no_log_is_named(luthier: Command, run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = b"{not json\n"
    (run / "events.jsonl").write_bytes(b"".join(lines))
    (found,) = wrong(failed(luthier("verify", run, "--steps", 0, "--json")))
    assert (found["file"], found["reason"]) == ("events.jsonl", "line 4 is not an event")


@pytest.mark.parametrize("gone", [("adapter",), ("adapter", "checkpoints")])
def test_an_adapter_that_is_gone_from_a_finished_run_is_a_fault(
    luthier: Command, run: Path, gone: tuple[str, ...]
) -> None:
    for name in gone:
        shutil.rmtree(run / name)
    found = failed(luthier("verify", run, "--json"))
    (one,) = wrong(found)
    assert (one["file"], one["reason"]) == ("adapter", "is missing")
    if "checkpoints" in gone:
        assert found["notes"] == ["no step was repeated: the run has neither an adapter nor a checkpoint"]


def began_otherwise(run: Path, **changes: object) -> None:
    """The log says that its steps were taken by another torch, on another processor, with other threads."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    lines = [{**line, **changes} if line["event"] == "start" else line for line in lines]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("changes", [{"torch": "9.9"}, {"processor": "abacus"}])
def test_another_machine_is_not_held_to_the_last_bit(luthier: Command, run: Path, changes: dict[str, object]) -> None:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "step":
            line["loss"] *= 1 + 1e-6
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    began_otherwise(run, **changes)
    found = document(luthier("verify", run, "--json"))
    assert "only the CPU and the torch of the run repeat them to the bit" in str(found["notes"])
    assert [one["exact"] for one in found["repeated"]["steps"]] == [False] * 3  # type: ignore[index]


def test_steps_are_taken_with_the_threads_that_took_them(
    luthier: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    began_otherwise(run, threads=3)
    sets, used = torch.set_num_threads, list[int]()

    def told(count: int) -> None:
        used.append(count)
        sets(count)

    monkeypatch.setattr(torch, "set_num_threads", told)
    before = torch.get_num_threads()
    luthier("verify", run, "--json")
    assert 3 in used
    assert torch.get_num_threads() == before


def test_more_steps_than_there_are_is_said(luthier: Command, run: Path) -> None:
    found = document(luthier("verify", run, "--steps", 9, "--json"))
    assert found["repeated"] == {"from": None, "steps": []}
    assert found["notes"] == ["no step was repeated: events.jsonl has 8 steps, and 9 in a row are asked for (--steps)"]


def test_other_rows_cannot_be_repeated(made: Path, luthier: Command, tmp_path: Path) -> None:
    moved(made, tmp_path / "other", "tales")
    assert luthier("verify", tmp_path / "other").code == 3
    assert luthier("verify", tmp_path / "other", "--steps", 0).code == 0
    assert luthier("verify", tmp_path).code == 2


def unfinished(run: Path, *steps: int) -> None:
    """As a kill leaves it: no adapter and no end, and checkpoints of these steps only."""
    shutil.rmtree(run / "adapter")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if json.loads(line)["event"] != "end"))
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) not in steps:
            shutil.rmtree(folder)
    (run / "checkpoints" / "LATEST").write_text(f"step-00000{max(steps)}\n")
    (run / "checkpoints" / "BEST").unlink()


def same_adapter(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    return all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_an_unfinished_run_is_gone_on_with(luthier: Command, run: Path, made: Path, tmp_path: Path) -> None:
    unfinished(run, 4)
    assert luthier("verify", run).code == 0
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = luthier("train", "recipe.yaml", "--out", "run")
    assert ended.code == 0, ended.err
    assert "run holds this run, unfinished: going on from step 4" in ended.message
    assert "steps 4 to 8" in ended.message
    assert same_adapter(run, made)
    again = luthier("train", "recipe.yaml", "--out", "run")
    assert (again.code, "already holds a trained run" in again.message) == (2, True)
    assert "add --resume to do what is left of it" in again.message


def test_a_changed_recipe_goes_on_where_that_is_safe(luthier: Command, run: Path, tmp_path: Path) -> None:
    unfinished(run, 6)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ("train", "recipe.yaml", "--out", "run")
    before = tree(run)
    silent = luthier(*words, "--set", "train.steps=10")
    assert (silent.code, "its recipe.yaml is not what is asked for now" in silent.message) == (2, True)
    assert "--resume shows the difference" in silent.message
    refused = luthier(*words, "--resume", "--set", "train.steps=10", "--set", "train.learning_rate=1e-3")
    assert refused.code == 2
    assert "learning_rate: 0.002 then, 0.001 now" in refused.message
    assert "steps: 8 then, 10 now" in refused.message
    assert tree(run) == before
    more = luthier(
        *words, "--resume", "--set", "train.steps=10", "--set", "train.keep=1", "--set", "train.eval_every=0"
    )
    assert more.code == 0, more.err
    assert (
        "this run goes on with other settings than before: eval_every: 8 then, 0 now; keep: 3 then, 1 now" in more.err
    )
    assert "steps: 8 then, 10 now (the learning rate follows the new length from here on)" in more.err
    assert json.loads((run / "plan.json").read_text())["settings"]["steps"] == 10
    assert luthier("verify", run, "--steps", 0).code == 0


def test_a_damaged_checkpoint_is_told_on_the_terminal(luthier: Command, run: Path, made: Path, tmp_path: Path) -> None:
    unfinished(run, 4, 6)
    flip(run / "checkpoints" / "step-000006" / "optimizer.safetensors")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = luthier("train", "recipe.yaml", "--out", "run", "--resume")
    assert ended.code == 0, ended.err
    assert "step-000006 is not whole (optimizer.safetensors: changed: SHA-256" in ended.message
    assert "going on from step-000004" in ended.message
    assert same_adapter(run, made)


def test_a_run_directory_is_its_users_alone(made: Path) -> None:
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for path in (*made.glob("*"), *(made / "checkpoints").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
