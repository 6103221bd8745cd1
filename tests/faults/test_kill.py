"""A training process is killed (SIGKILL) at random moments, again and again, and comes to the same end as one that was
not: the same adapter, losses, gradient norms and checkpoints, to the bit.

Two of five trials die inside the writing of checkpoints: at an operation on the disk drawn from all of the run's, or up
to a few milliseconds after it. The others die at a moment drawn over the whole length of the run, its preparation
included. A trial is killed one to three times before it is let come to its end.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.jobs import Job, Outcome
from tests.faults.world import RECIPES, STEPS, World, differences, newest, numbers, only, replay, seed, warnings

TIERS = pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
LONGEST_DELAY = 0.004
"""Seconds, about the time in which a file of a small checkpoint is written and flushed."""


@dataclass
class Trial:
    """One run, killed until `times` is reached or it has come to its end, and then let come to it."""

    world: World
    number: int
    run: Path
    draw: random.Random = field(init=False)
    inside: bool = field(init=False)
    recipe: str = field(init=False)
    environment: dict[str, str] = field(default_factory=dict)
    kills: list[str] = field(default_factory=list)
    within: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{seed()} {self.number}")
        self.inside = self.number % 5 in (0, 2)
        self.recipe = list(RECIPES)[self.number % 2]
        if self.number % 4 == 3:
            self.environment = self.world.cold_cache(self.run.parent / f"{self.run.name}-cache")

    def go(self) -> None:
        """Raises AssertionError, which says how to repeat the trial."""
        at = -1
        for _ in range(self.draw.choice((1, 1, 2, 3))):
            outcome = self._sitting(**self._moment(at))
            if outcome.code != -9:
                self._check(outcome.code == 0, f"it ended with {outcome.code}:\n{outcome.said}")
                break
            self._check(outcome.sent, f"it hung:\n{outcome.said}")
            self.within += self.inside or any(self.run.glob("checkpoints/.step-*.tmp"))
            where = f"at {outcome.last}" if self.inside else f"after {outcome.seconds:.3f} s"
            before, at = at, newest(self.run)
            self.kills.append(f"killed {where}, with the checkpoint of step {at}")
            self._check(at >= before, f"the checkpoint of step {before} is gone")
        outcome = self._sitting()
        self._check(outcome.code == 0, f"resumed, it ended with {outcome.code}:\n{outcome.said}")
        whole = self.world.whole(self.recipe)
        found = differences(self.run, whole) + sorted(warnings(self.run) ^ warnings(whole))
        self._check(not found, "\n".join(found))
        self._verify()

    def _moment(self, at: int) -> dict[str, object]:
        """Where the next sitting, from the checkpoint of step `at`, is killed."""
        whole, left = self.world.wholes[self.recipe], 1 - max(0, at) / STEPS
        seconds = min(one.seconds for one in self.world.wholes.values())  # the other one may have waited for something
        if self.inside:
            delay = self.draw.choice((0.0, self.draw.uniform(0.0, LONGEST_DELAY)))
            return {"operation": int(self.draw.random() * max(1, left * whole.operations)), "delay": delay}
        return {"after": self.draw.random() * seconds * (0.4 + 0.6 * left)}

    def _sitting(self, **how: object) -> Outcome:
        """The same command, mostly as it was typed, now and then with --resume; a run that has its adapter needs it."""
        resume = (self.run / "adapter").exists() or self.draw.random() < 0.3
        words = ("--resume",) if resume else ()
        return self.world.train(self.recipe, self.run, *words, environment=self.environment, **how)

    def _verify(self) -> None:
        """`luthier verify`, which takes the last steps again; one trial in five, for its time."""
        if self.number % 5 == 1:
            words = ("verify", str(self.run), "--json")
            job = Job(words=words, folder=str(self.world.folder), environment=self.environment)
            outcome = self.world.server.run(job)
            self._check(outcome.code == 0, f"verify: {outcome.said}")

    def _check(self, holds: bool, what: str) -> None:
        told = "; ".join(self.kills) or "not killed"
        how = replay("tests/faults/test_kill.py", self.number)
        assert holds, f"trial {self.number} ({self.recipe}): {told}\n{what}\n{how}"


@TIERS
def test_a_killed_run_comes_to_the_same_end(
    world: World, tmp_path: Path, tell: Callable[[str], None], kills: int
) -> None:
    began, done, within, runs, again = time.monotonic(), 0, 0, 0, 0
    for number in numbers():
        trial = Trial(world, number, tmp_path / f"run-{number}")
        trial.go()
        shutil.rmtree(trial.run)
        done, within = done + len(trial.kills), within + trial.within
        runs, again = runs + 1, again + (len(trial.kills) > 1)
        if done >= kills:
            break
    took = time.monotonic() - began
    tell(
        f"{done} kills in {runs} runs, {within} of them inside checkpoint writing, {again} runs killed more than once:"
        f" all came to the same end (seed {seed()}, {took:.0f} s)"
    )
    assert only() is not None or 3 * within >= kills
