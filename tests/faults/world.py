"""The run that everything here interrupts: a small recipe on sprig, rows of its own, and what it comes to when nothing
happens to it."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier.runs import RunDirectory
from luthier.train.checkpoints import Checkpoints
from luthier.train.verify import check_files
from tests.faults.jobs import Job, Outcome, Server
from tests.train.world import events_of, without_clocks

STEPS = 12
RECIPE = """\
model: sprig
data: rows.jsonl
seed: 7
adapter: {{rank: 4, alpha: 8, dropout: {dropout}}}
train:
  {{steps: {steps}, batch_size: 2, max_length: 48, packing: true, precision: fp32, learning_rate: 4.0e-3, eval_every: 3,
   save_every: 2, keep: 2}}
split: {{train: 0.85, eval: 0.15}}
evaluate: {{limit: 8, samples: 1, max_new_tokens: 8}}
export: [hf, gguf]
"""
RECIPES = {"plain.yaml": 0.0, "dropout.yaml": 0.1}
"""By name: the share that dropout takes."""

_WORDS = (
    "ship",
    "sails",
    "over",
    "a",
    "deep",
    "blue",
    "sea",
    "and",
    "old",
    "captain",
    "looks",
    "for",
    "gold",
    "on",
    "his",
)


def seed() -> int:
    """Of all that is drawn here; another one by LUTHIER_FAULTS_SEED."""
    return int(os.environ.get("LUTHIER_FAULTS_SEED", "20261121"))


def only() -> int | None:
    """The number of the one trial to repeat, by LUTHIER_FAULTS_ONLY; None: all."""
    number = os.environ.get("LUTHIER_FAULTS_ONLY")
    return None if number is None else int(number)


def numbers() -> Iterable[int]:
    """Of the trials, as many as are wanted."""
    one = only()
    return itertools.count() if one is None else (one,)


def replay(test: str, number: int) -> str:
    """How to do one trial again."""
    return (
        f"to repeat it: LUTHIER_FAULTS_SEED={seed()} LUTHIER_FAULTS_ONLY={number} "
        f"python -m pytest -m 'slow or not slow' {test}"
    )


def write_rows(path: Path, count: int = 48) -> None:
    """Short questions and answers, some of them longer than others."""
    draw = random.Random(3)

    def say(fewest: int, most: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(fewest, most)))

    rows = [{"messages": [_turn("user", say(2, 9)), _turn("assistant", say(2, 16))]} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@dataclass(frozen=True)
class World:
    """Where the runs of a test go, the server that makes them, and by recipe the run that nothing happened to."""

    folder: Path
    server: Server
    wholes: Mapping[str, Outcome]

    def whole(self, recipe: str) -> Path:
        return self.folder / "whole" / recipe

    def train(self, recipe: str, run: Path, *words: str, **how: object) -> Outcome:
        """`luthier train` into `run`, with what happens to it (the fields of a Job)."""
        asked = ("train", recipe, "--out", str(run), *words)
        return self.server.run(Job(words=asked, folder=str(self.folder), **how))  # type: ignore[arg-type]

    def cold_cache(self, folder: Path) -> dict[str, str]:
        """The environment of a run whose data nobody has prepared yet; the machine's speed is known."""
        shutil.copytree(Path(os.environ["LUTHIER_CACHE"]) / "rates", folder / "rates")
        return {"LUTHIER_CACHE": str(folder)}


def make_world(folder: Path, server: Server) -> World:
    """Write rows and recipes, and let each run come to its end undisturbed."""
    write_rows(folder / "rows.jsonl")
    wholes: dict[str, Outcome] = {}
    for name, dropout in RECIPES.items():
        (folder / name).write_text(RECIPE.format(dropout=dropout, steps=STEPS))
        words = ("train", name, "--out", str(folder / "whole" / name))
        wholes[name] = server.run(Job(words=words, folder=str(folder)))
        assert wholes[name].code == 0, wholes[name].said
    return World(folder, server, wholes)


def differences(run: Path, whole: Path, *, checkpoints: bool = True) -> list[str]:
    """What of `run` is not as it is in `whole`: the adapter, the figures of the log, the checkpoints (of the last
    one only the state, where not `checkpoints`), and what its manifests say; nothing where all is."""
    found = [f"{one.file}: {one.fault}" for one in check_files(RunDirectory(run)) if one.fault is not None]
    found += [f"left behind: {path.relative_to(run)}" for path in run.rglob(".*")]
    found += _files(run / "adapter", whole / "adapter")
    for kind in ("step", "eval", "end"):
        ours, theirs = (without_clocks(events_of(one / "events.jsonl", kind)) for one in (run, whole))
        if ours != theirs:
            found.append(f"events.jsonl: {kind}: {_first_difference(ours, theirs)}")
    for name in ("recipe.yaml", "data/data.json", "checkpoints/LATEST", "checkpoints/BEST"):
        if (run / name).read_bytes() != (whole / name).read_bytes():
            found.append(f"{name} differs")
    kept = [sorted(path.name for path in (one / "checkpoints").glob("step-*")) for one in (run, whole)]
    if checkpoints and kept[0] != kept[1]:
        return [*found, f"checkpoints: {kept[0]} where {kept[1]} were"]
    for name in kept[0] if checkpoints else kept[0][-1:]:
        found += _state(run / "checkpoints" / name, whole / "checkpoints" / name)
    return found


def warnings(run: Path) -> set[str]:
    """What the log warns of, but for disks without room."""
    lines = events_of(run / "events.jsonl", "warning")
    return {str(line["message"]) for line in lines if line["kind"] != "disk"}


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint, -1 where there is none yet. No newer one may be damaged."""
    found = Checkpoints(run / "checkpoints").newest_whole()
    assert found.damaged == ()
    return -1 if found.step is None else found.step


def _first_difference(ours: list[dict[str, object]], theirs: list[dict[str, object]]) -> str:
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return f"{one} where {other} was"
    return f"{len(ours)} lines where {len(theirs)} were"


def _files(ours: Path, theirs: Path, *, but: tuple[str, ...] = ()) -> list[str]:
    """The files of two folders that are not the same to the byte."""
    found = [{path.relative_to(one) for path in one.rglob("*") if path.is_file()} for one in (ours, theirs)]
    differing = found[0] ^ found[1]
    differing |= {name for name in found[0] & found[1] if (ours / name).read_bytes() != (theirs / name).read_bytes()}
    return [f"{ours.name}/{name} differs" for name in sorted(differing) if str(name) not in but]


def _state(ours: Path, theirs: Path) -> list[str]:
    """Two checkpoints; only the clock in state.json, and with it its hash, may differ."""
    found = _files(ours, theirs, but=("state.json", "manifest.json"))
    states = [json.loads((one / "state.json").read_text()) for one in (ours, theirs)]
    for state in states:
        state["progress"].pop("seconds")
    return found if states[0] == states[1] else [*found, f"{ours.name}/state.json differs"]
