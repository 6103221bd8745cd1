"""Real commands stopped by real signals, in every stage: exit code 75, nothing half-written, a second run is right.

Each process is stopped at a moment drawn within the stage, by the seed below; a stage that was through by then counts
too, for what holds afterwards is the same.
"""

from __future__ import annotations

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.train.checkpoints import Checkpoints
from tests.train.world import events_of

SEED = 20261121
RECIPE = """\
model: sprig
data: pirate
adapter: {rank: 4, alpha: 8}
train: {steps: 6, batch_size: 4, learning_rate: 2.0e-3, eval_every: 3, save_every: 2}
evaluate: {limit: 40, samples: 2, max_new_tokens: 16}
export: [hf, gguf]
"""
WRITTEN = (
    *("adapter/adapter_model.safetensors", "adapter/tokenizer.json", "eval.json", "exports/hf/model.safetensors"),
    *("exports/hf/config.json", "exports/gguf/model-f16.gguf"),
)
OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A command whose controlling terminal is its standard input, as in a window."""
LUTHIER = (sys.executable, "-m", "luthier")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def folder_with_recipe(folder: Path, text: str = RECIPE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return folder


def done(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        [*LUTHIER, *words], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LUTHIER, *words],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen[str], begins: str) -> None:
    """Read what the process says up to a line that begins like this."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(begins):
            return
    pytest.fail(f"it never said {begins!r}:\n{''.join(said)}")


def stop(process: subprocess.Popen[str], number: signal.Signals, within: float) -> str:
    """Stop it at a drawn moment of the next `within` seconds; what it said until its end."""
    moment = random.Random(f"{SEED} {number} {within}").uniform(0.0, within)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return errors


def stopped_well(process: subprocess.Popen[str], errors: str, number: signal.Signals) -> None:
    assert process.returncode in (0, 75), errors
    assert "Traceback" not in errors
    assert "error:" not in errors
    if process.returncode == 75:
        assert re.search(rf"{number.name}: stopped|stopped while the data was prepared", errors), errors
        assert "run the same command again" in " ".join(errors.split())


def litter(run: Path) -> list[Path]:
    return [path for path in run.rglob(".*") if path.name != ".lock"] + list(run.rglob(".lock"))


def assert_same(run: Path, whole: Path, names: tuple[str, ...] = WRITTEN) -> None:
    for name in names:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = folder_with_recipe(tmp_path_factory.mktemp("whole"))
    ended = done(folder, "run", "recipe.yaml", "--out", "run")
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


@pytest.mark.parametrize(
    ("begins", "number", "within"),
    [
        ("loading sprig", signal.SIGHUP, 0.6),
        ("holding base against tuned", signal.SIGINT, 2.0),
        ("merging the adapter", signal.SIGTERM, 0.4),
        ("writing gguf", signal.SIGINT, 0.4),
    ],
)
def test_a_run_stopped_in_any_stage_comes_to_the_same_end(
    whole: Path, tmp_path: Path, begins: str, number: signal.Signals, within: float
) -> None:
    folder = folder_with_recipe(tmp_path)
    process = start(folder, "run", "recipe.yaml", "--out", "run")
    until(process, begins)
    stopped_well(process, stop(process, number, within), number)
    assert litter(folder / "run") == []
    ended = done(folder, "run", "recipe.yaml", "--out", "run", "--resume")
    assert ended.returncode == 0, ended.stderr
    assert_same(folder / "run", whole)


def test_stopped_while_the_data_is_read(whole: Path, tmp_path: Path) -> None:
    """Nothing has been written for the run yet, so nothing is there; what was prepared is gone on with."""
    folder, cache = folder_with_recipe(tmp_path), str(tmp_path / "cache")
    process = start(folder, "train", "recipe.yaml", "--out", "run", LUTHIER_CACHE=cache)
    until(process, "reading the data")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    stopped_well(process, errors, signal.SIGTERM)
    assert not (folder / "run").exists()
    again = start(folder, "train", "recipe.yaml", "--out", "run", LUTHIER_CACHE=cache)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert_same(folder / "run", whole, WRITTEN[:2])


@pytest.mark.parametrize(
    ("words", "begins", "number", "name"),
    [
        (("eval", "run"), "holding base against tuned", signal.SIGTERM, "eval.json"),
        (("merge", "run"), "merging the adapter", signal.SIGINT, "exports/hf/model.safetensors"),
        (("export", "run", "--to", "gguf"), "writing gguf", signal.SIGHUP, "exports/gguf/model-f16.gguf"),
    ],
    ids=("eval", "merge", "export"),
)
def test_a_command_stopped_leaves_what_was_there_and_can_be_run_again(
    whole: Path, tmp_path: Path, words: tuple[str, ...], begins: str, number: signal.Signals, name: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    process = start(tmp_path, *words)
    until(process, begins)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    stopped_well(process, errors, number)
    assert litter(tmp_path / "run") == []
    assert_same(tmp_path / "run", whole)  # the one before, or the new one, which is the same
    ended = done(tmp_path, *words)
    assert ended.returncode == 0, ended.stderr
    assert_same(tmp_path / "run", whole, (name,))


def test_a_second_process_is_refused_and_a_killed_ones_lock_is_taken_over(whole: Path, tmp_path: Path) -> None:
    folder = folder_with_recipe(tmp_path)
    process = start(folder, "train", "recipe.yaml", "--out", "run", "--set", "train.steps=500")
    until(process, "step 1/")
    for words in (("train", "recipe.yaml", "--out", "run", "--resume"), ("run", "recipe.yaml", "--out", "run")):
        ended = done(folder, *words, "--json")
        error = json.loads(ended.stdout)["error"]
        assert (ended.returncode, error["exit_code"], error["kind"]) == (2, 2, "UsageError"), ended.stderr
        assert f"run is in use by process {process.pid} on " in error["message"]
        assert "(luthier train), since " in error["message"]
    process.kill()
    process.communicate(timeout=60)
    ended = done(folder, "train", "recipe.yaml", "--out", "run", "--resume", "--set", "train.steps=7")
    assert f"the lock of process {process.pid} on " in " ".join(ended.stderr.split())
    assert "is taken over" in " ".join(ended.stderr.split())


def test_a_second_signal_stops_training_at_once_and_says_what_is_there(tmp_path: Path) -> None:
    """Steps of many micro-batches, so that both signals come within one."""
    folder = folder_with_recipe(tmp_path)
    slow = ("train.steps=500", "train.batch_size=128", "train.micro_batch=1", "train.save_every=1", "split.eval=0")
    sets = [word for one in (*slow, "split.train=1") for word in ("--set", one)]
    process = start(folder, "train", "recipe.yaml", "--out", "run", "--json", *sets)
    until(process, "step 1/")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    error = json.loads(out)["error"]
    newest = Checkpoints(folder / "run" / "checkpoints").newest_whole().step
    there = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
    assert (error["kind"], error["exit_code"]) == ("Interrupted", 75)
    assert f"stopped at once; {there}" in error["message"]
    assert "--resume" in error["remedy"]


def test_a_terminal_that_goes_away_costs_nothing(tmp_path: Path) -> None:
    """The window is closed: SIGHUP comes, and what would still be written to the terminal goes nowhere."""
    folder = folder_with_recipe(tmp_path)
    master, slave = pty.openpty()

    words = ["train", "recipe.yaml", "--out", "run", "--set", "train.steps=2000"]
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, *LUTHIER, *words],
        cwd=folder,
        env=environment(TERM="xterm"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    said = b""
    while b"tokens/s" not in said:  # the panel stands, and steps are taken
        said += os.read(master, 4096)
    os.close(master)
    try:
        assert process.wait(timeout=60) == 75, said.decode()
    finally:
        process.kill()
    (line,) = events_of(folder / "run" / "events.jsonl", "interrupt")
    assert (line["signal"], line["reason"]) == ("SIGHUP", "SIGHUP")
    assert Checkpoints(folder / "run" / "checkpoints").newest_whole().step == line["step"]


def test_a_stop_file_from_the_recipe(whole: Path, tmp_path: Path) -> None:
    folder = folder_with_recipe(tmp_path)
    words = ("train", "recipe.yaml", "--out", "run", "--set", "train.stop_file=going")
    process = start(folder, *words, "--set", "train.steps=500")
    until(process, "step 1/")
    (folder / "going").touch()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the stop file going: stopped after step" in errors
    refused = done(folder, *words, "--set", "train.steps=500", "--resume")
    assert (refused.returncode, "is there already" in refused.stderr) == (2, True)


def test_a_finished_run_that_is_resumed_does_not_say_that_it_trained(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    folder_with_recipe(tmp_path)
    ended = done(tmp_path, "train", "recipe.yaml", "--out", "run", "--resume")
    assert ended.returncode == 0, ended.stderr
    assert "all 6 steps were done before, nothing was left to train" in ended.stderr
    assert "trained 6 steps" not in ended.stderr
    assert_same(tmp_path / "run", whole)
