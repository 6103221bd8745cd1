"""The disk is full at a write, of every kind of file that training writes: a clear error or a warning, the checkpoint
before still loads, and when there is room again the run comes to the end that it would have come to.

A full disk is a limit on the size of the process's files (RLIMIT_FSIZE) from the moment such a file is opened: a write
gives what still fits and then the error, as on a disk. What there is room for is drawn below the file's own size.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.faults.jobs import Full, Outcome
from tests.faults.world import World, differences, newest, numbers, only, replay, seed
from tests.train.world import events_of

RECIPE = "dropout.yaml"
CHECKPOINT, STORE = "checkpoints/step-000012", ""
KINDS: Mapping[str, tuple[str, int]] = {
    "/events.jsonl": ("events.jsonl", 1),
    "/.adapter_model.safetensors.": (f"{CHECKPOINT}/adapter/adapter_model.safetensors", 4),
    "/.adapter_config.json.": (f"{CHECKPOINT}/adapter/adapter_config.json", 4),
    "/optimizer.safetensors": (f"{CHECKPOINT}/optimizer.safetensors", 4),
    "/rng.safetensors": (f"{CHECKPOINT}/rng.safetensors", 4),
    "/.state.json.": (f"{CHECKPOINT}/state.json", 4),
    "/.manifest.json.": (f"{CHECKPOINT}/manifest.json", 4),
    "/.LATEST.": ("checkpoints/LATEST", 4),
    "/.BEST.": ("checkpoints/BEST", 2),
    "/.adapter.": ("adapter/adapter_model.safetensors", 1),
    "/.plan.json.": ("plan.json", 2),
    "/.recipe.yaml.": ("recipe.yaml", 1),
    "/.data.json.": ("data/data.json", 1),
    "/rows.bin": (STORE, 1),
    "/ids.bin": (STORE, 1),
    "/.store.json.": (STORE, 1),
}
"""By what stands in the path that is opened: the file of a whole run whose size it is to reach, and how many of its
openings are drawn from. Those of the data's store, in the cache, have room for 100 bytes at most."""
ONCE_EACH = len(KINDS)
TIERS = pytest.mark.parametrize("times", [5, pytest.param(3 * ONCE_EACH, marks=pytest.mark.slow)])


@TIERS
def test_a_full_disk_loses_nothing(world: World, tmp_path: Path, tell: Callable[[str], None], times: int) -> None:
    """The first of each kind has no room until the process ends, so that it is met; later ones now and then do."""
    began, codes, met = time.monotonic(), Counter[int](), Counter[str]()
    order = random.Random(f"{seed()} full").sample(list(KINDS), ONCE_EACH)
    for number in numbers():
        match, run = order[number % ONCE_EACH], tmp_path / f"run-{number}"
        code = filled(world, number, match, run)
        codes[code] += 1
        met[match] += code != 0
        shutil.rmtree(run)
        if codes.total() == times:
            break
    counted = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
    took = f"seed {seed()}, {time.monotonic() - began:.0f} s"
    tell(f"{codes.total()} full disks, {len(met)} kinds of file: {counted} ({took})")
    assert only() is not None or min(met.values()) >= 1


def filled(world: World, number: int, match: str, run: Path) -> int:
    """Train on a disk that fills, look at what is left, train on with room; its first exit code."""
    draw = random.Random(f"{seed()} full {number}")
    name, openings = KINDS[match]
    size = draw.randrange((world.whole(RECIPE) / name).stat().st_size if name else 100)
    room = None if number < ONCE_EACH else draw.choice((None, draw.random() * world.wholes[RECIPE].seconds / 2))
    full = Full(match, size, draw.randrange(openings), room)
    environment = world.cold_cache(run.parent / f"cache-{number}") if name == STORE else {}
    first = world.train(RECIPE, run, environment=environment, full=full)
    try:
        said_well(first, lasting=room is None)
        at = newest(run)
        resume = ("--resume",) if first.code == 0 or (run / "adapter").exists() else ()
        second = world.train(RECIPE, run, *resume, environment=environment)
        assert second.code == 0, second.said
        assert events_of(run / "events.jsonl", "start")[-1]["step"] == max(at, 0)
        assert differences(run, world.whole(RECIPE), checkpoints=False) == []
    except AssertionError as error:
        how = replay("tests/faults/test_full.py", number)
        raise AssertionError(f"{full}: {first.code}\n{first.said}\n{error}\n{how}") from error
    return first.code


def said_well(outcome: Outcome, *, lasting: bool) -> None:
    """An error that says what to do, or where there was room again a warning at most."""
    assert outcome.code in (4, 5) or (outcome.code == 0 and not lasting)
    assert "Traceback" not in outcome.said
    assert "defect of ours" not in outcome.said
    if outcome.code:
        assert "error:" in outcome.said
        assert "make room" in outcome.said
