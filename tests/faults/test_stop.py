"""SIGTERM and SIGINT at random moments of every command that writes into a run: exit code 75, nothing half-written, and
the same command again comes to what it would have come to.

A moment is drawn over the whole length of the command, so it may fall where no handler is set yet, or none any more:
then the process ends as any other (130, or by the signal), and the rest must hold all the same.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier.runs import RunDirectory
from luthier.train.verify import check_files
from tests.faults.jobs import Job, Outcome
from tests.faults.world import World, differences, newest, numbers, only, replay, seed
from tests.train.world import events_of

TIERS = pytest.mark.parametrize("signals", [6, pytest.param(40, marks=pytest.mark.slow)])
RECIPE = "plain.yaml"
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "data": ("train", RECIPE, "--out", "RUN"),
    "train": ("train", RECIPE, "--out", "RUN"),
    "eval": ("eval", "RUN"),
    "merge": ("merge", "RUN"),
    "export": ("export", "RUN", "--to", "gguf"),
    "run": ("run", RECIPE, "--out", "RUN"),
}
"""By the stage that is stopped. `data`: with nothing prepared, and in the first half of the command."""
RESUMED = ("data", "train", "run")
PATIENCE = 20.0
"""Seconds from the signal to the end; it takes a step and a save, of a model that does both in milliseconds."""


@dataclass(frozen=True)
class Stages:
    """The run that every stage was done in, and how long each command takes."""

    world: World
    whole: Path
    seconds: Mapping[str, float]

    def do(self, stage: str, run: Path, *words: str, **how: object) -> Outcome:
        asked = [str(run) if word == "RUN" else word for word in COMMANDS[stage]]
        return self.world.server.run(
            Job(words=(*asked, *words), folder=str(self.world.folder), **how)  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module")
def stages(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    folder = tmp_path_factory.mktemp("stages")
    found, seconds = Stages(world, folder / "whole", {}), dict[str, float]()
    for stage in ("run", "eval", "merge", "export"):
        outcome = found.do(stage, found.whole)
        assert outcome.code == 0, outcome.said
        seconds[stage] = outcome.seconds
    seconds["train"] = world.wholes[RECIPE].seconds
    cold = found.do("data", folder / "cold", environment=world.cold_cache(folder / "cache"))
    assert cold.code == 0, cold.said
    yield Stages(world, found.whole, {**seconds, "data": cold.seconds / 2})
    shutil.rmtree(folder)


@TIERS
def test_a_stopped_command_can_be_given_again(
    stages: Stages, tmp_path: Path, tell: Callable[[str], None], signals: int
) -> None:
    began, codes = time.monotonic(), Counter[int]()
    for number in numbers():
        run = tmp_path / str(number) / stages.whole.name  # the name stands in the model cards of what is exported
        codes[stopped(stages, number, run)] += 1
        shutil.rmtree(run.parent)
        if codes.total() == signals:
            break
    counted = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
    tell(f"{codes.total()} signals: {counted} (seed {seed()}, {time.monotonic() - began:.0f} s)")
    assert only() is not None or codes[75] * 3 >= signals


def stopped(stages: Stages, number: int, run: Path) -> int:
    """Stop a command, look at what it left, give it again; its exit code when it was stopped."""
    draw = random.Random(f"{seed()} stop {number}")
    stage = list(COMMANDS)[number % len(COMMANDS)]
    sent = draw.choice((signal.SIGTERM, signal.SIGINT))
    after = draw.random() * stages.seconds[stage]
    run.parent.mkdir()
    if stage not in RESUMED:
        shutil.copytree(stages.whole, run)
    environment = stages.world.cold_cache(run.parent / f"cache-{number}") if stage == "data" else {}
    first = stages.do(stage, run, environment=environment, after=after, signal=int(sent))
    try:
        left_well(first, run, sent)
        assert first.seconds - after < PATIENCE
        again = ("--resume",) if stage in RESUMED else ()
        second = stages.do(stage, run, *again, environment=environment)
        assert second.code == 0, second.said
        same_end(stages, stage, run)
    except AssertionError as error:
        how = replay("tests/faults/test_stop.py", number)
        what = f"{stage} stopped by {sent.name} after {after:.3f} s: {first.code}\n{first.said}"
        raise AssertionError(f"{what}\n{error}\n{how}") from error
    return first.code


def left_well(outcome: Outcome, run: Path, sent: signal.Signals) -> None:
    """Nothing half-written, and the right words."""
    assert outcome.code in (0, 75, 130, -sent), "not an exit code of a stop"
    assert "error:" not in outcome.said
    litter = [path for path in run.rglob(".*") if outcome.code in (0, 75) or path.name != ".lock"]
    assert litter == []
    assert [one for one in check_files(RunDirectory(run)) if one.fault is not None] == []
    if outcome.code != 75:
        return
    assert f"{sent.name}: stopped" in outcome.said or "stopped while the data was prepared" in outcome.said
    assert "run the same command again" in outcome.said
    if "the checkpoint is saved" in outcome.said:
        assert events_of(run / "events.jsonl")[-1]["step"] == newest(run)


def same_end(stages: Stages, stage: str, run: Path) -> None:
    """What the command was to write is what it would have written."""
    if stage in RESUMED:
        assert differences(run, stages.whole, checkpoints=False) == []
    names = {"eval": ("eval.json",), "merge": ("exports/hf",), "export": ("exports/gguf",)}
    for name in names.get(stage, ("eval.json", "exports/hf", "exports/gguf") if stage == "run" else ()):
        one, other = run / name, stages.whole / name
        files = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
        for file in files or (Path(),):
            assert (one / file).read_bytes() == (other / file).read_bytes(), f"{name}/{file}"
