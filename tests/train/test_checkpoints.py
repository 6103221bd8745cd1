"""The set of checkpoints: what is kept, what goes, and no moment without a good one, wherever a process dies."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.errors import TrainingError
from luthier.train.checkpoints import Checkpoints, name_of
from luthier.train.keeper import Failed, Keeper, Saved
from tests.train.snapshots import KilledError, dying_after, save, snapshot, whole

FEWEST_MOMENTS = 40
"""A save changes the disk at least so often: fewer, and the test does not look where it should."""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_stay(tmp_path: Path, keep: int) -> None:
    for step, best in ((2, None), (4, 4), (6, 4), (8, 4), (10, 4), (12, 12)):
        assert save(tmp_path, snapshot(step, best), keep=keep) == Saved(step, step == best, pytest.approx(1, abs=60))
        newest = [one for one in (2, 4, 6, 8, 10, 12) if one <= step][-keep:]
        assert whole(tmp_path) == {*newest, *([best] if best else [])}
        assert Checkpoints(tmp_path).pointer("LATEST") == step
        assert Checkpoints(tmp_path).pointer("BEST") == best
    assert not [name for name in names(tmp_path) if name.startswith(".")]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    saves=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=7),
    keep=st.integers(1, 3),
    moments=st.lists(st.integers(0, 90), min_size=7, max_size=7),
)
def test_any_run_killed_anywhere_has_what_it_may_have(
    tmp_path: Path, saves: list[tuple[int, bool]], keep: int, moments: list[int]
) -> None:
    """Each save may be cut short; the next begins as a resumed run does. What is there is always as if each had either
    not begun, or come as far as LATEST or beyond."""
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    folder, step, best, newest = tmp_path / "c", 0, None, None
    for (further, is_best), moment in zip(saves, moments, strict=False):
        step += further
        wanted = step if is_best else best
        with dying_after(moment) as killed:
            outcome = save(folder, snapshot(step, wanted), keep=keep, saved=newest)
        assert isinstance(outcome, Failed) == bool(killed[0])
        Checkpoints(folder).tidy()
        found = Checkpoints(folder).newest_whole().step
        assert found in (newest, step)
        if found == step:
            newest, best = step, wanted
        step = newest or 0
        Keeper(Checkpoints(folder), keep, newest).mend(snapshot(step, best).state.progress)
        kept = whole(folder)
        assert newest is None or newest in kept
        assert best is None or best in kept
        assert len(kept - {best}) <= keep, "the killed save left more than a run that was not killed has"
        assert Checkpoints(folder).pointer("LATEST") == newest
        assert Checkpoints(folder).pointer("BEST") == best
        assert not [name for name in (names(folder) if folder.exists() else []) if name.startswith(".")]


def prepared(folder: Path, case: str) -> tuple[int, int | None, int]:
    """A folder before the save of a case; gives the step that is saved, the best step then, and how many are kept."""
    if case == "first":
        return 2, None, 3
    for step, best in ((2, 2), (4, 2), (6, 2)):
        save(folder, snapshot(step, best), keep=3)
    if case == "over a damaged one":
        (folder / name_of(6) / "state.json").write_bytes(b"{}")
        return 6, 2, 2
    return {"one more": (8, 2, 3), "a new best, one kept": (8, 8, 1), "many go": (8, 2, 1)}[case]


@pytest.mark.parametrize("case", ["first", "one more", "a new best, one kept", "many go", "over a damaged one"])
def test_there_is_a_good_one_at_every_moment_of_a_save(tmp_path: Path, case: str) -> None:
    """The process dies at the n-th operation that changes the disk, for every n until it lives."""
    step, best, keep = prepared(tmp_path / "before", case)
    before = whole(tmp_path / "before") if case != "first" else set[int]()
    moment = 0
    while True:
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        if case != "first":
            shutil.copytree(tmp_path / "before", folder)
        with dying_after(moment) as killed:
            outcome = save(folder, snapshot(step, best), keep=keep, saved=max(before, default=None))
        now, checkpoints = whole(folder), Checkpoints(folder)
        assert not before or now, f"no good one after {moment} operations"
        found = checkpoints.newest_whole() if now or not checkpoints.steps() else None
        assert found is not None, "a name stands for half a checkpoint"
        assert found.step in (max(before, default=None), step)
        if 2 in before:
            assert checkpoints.pointer("BEST") in now, "BEST names one that is not there"
        if not killed[0]:
            break
        assert isinstance(outcome, Failed)
        assert isinstance(outcome.error, KilledError)
        # what a resumed run does: it goes on from the newest, and comes to this save again
        checkpoints.tidy()
        here = (found.step, 2) if found.step not in (None, step) else (step, best)
        Keeper(checkpoints, keep, found.step).mend(snapshot(*here).state.progress)
        if found.step != step:
            assert isinstance(save(folder, snapshot(step, best), keep=keep, saved=found.step), Saved)
        assert whole(folder) == {*sorted({*before, step})[-keep:], *([best] if best else [])}
        moment += 1
    assert isinstance(outcome, Saved)
    assert moment >= FEWEST_MOMENTS
    assert now == {*sorted({*before, step})[-keep:], *([best] if best else [])}


def test_a_whole_one_of_the_same_step_is_not_touched(tmp_path: Path) -> None:
    save(tmp_path, snapshot(4, 4), keep=1)
    (tmp_path / "BEST").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / name_of(4)).rglob("*")}
    assert isinstance(save(tmp_path, snapshot(4, 4), keep=1), Saved)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / name_of(4)).rglob("*")} == before
    assert Checkpoints(tmp_path).pointer("BEST") == 4


def test_all_that_is_not_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, snapshot(4), keep=3)
    for name in ("step-9", "step-000009x", "step-0000099", "x", ".step-000009.1.tmp", "step-000010"):
        (tmp_path / name).mkdir() if name != "step-000010" else (tmp_path / name).write_text("a file")
    (tmp_path / "step-000011").symlink_to(tmp_path / name_of(4))
    assert Checkpoints(tmp_path).steps() == [4]
    assert Checkpoints(tmp_path).newest_whole().step == 4


@pytest.mark.parametrize(
    ("content", "damaged"),
    [
        (None, ()),
        (b"", ()),
        (b"step-000002\n", ()),
        (b"../../../etc\n", ()),
        (b"step-000004\nstep-000002\n", ()),
        (b"\xff" * 4096, ()),
        (b"step-000009\n", ("step-000009 is missing, and LATEST names it",)),
    ],
)
def test_latest_is_found_whatever_the_file_says(
    tmp_path: Path, content: bytes | None, damaged: tuple[str, ...]
) -> None:
    for step in (2, 4):
        save(tmp_path, snapshot(step), keep=3)
    latest = tmp_path / "LATEST"
    latest.unlink() if content is None else latest.write_bytes(content)
    found = Checkpoints(tmp_path).newest_whole()
    assert (found.step, found.damaged) == (4, damaged)
    Keeper(Checkpoints(tmp_path), 3, 4).mend(snapshot(4).state.progress)
    assert latest.read_bytes() == b"step-000004\n"


def test_none_that_is_whole_is_an_error_that_names_them(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest_whole().step is None
    for step in (2, 4):
        save(tmp_path, snapshot(step), keep=3)
        (tmp_path / name_of(step) / "rng.safetensors").unlink()
    with pytest.raises(TrainingError) as caught:
        Checkpoints(tmp_path).newest_whole()
    assert "step-000004 is not whole (rng.safetensors: missing" in caught.value.message
    assert "step-000002 is not whole" in caught.value.message
    assert caught.value.remedy


def test_the_layout_of_before_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    with pytest.raises(TrainingError, match="of an older version of luthier") as caught:
        Checkpoints(tmp_path).newest_whole()
    assert caught.value.remedy


def test_newer_ones_of_a_sitting_that_was_taken_the_place_of_go(tmp_path: Path) -> None:
    """Resumed from step 4, for 6 and 8 were damaged: the next save removes them, and no good one for their sake."""
    for step in (2, 4, 6, 8):
        save(tmp_path, snapshot(step), keep=4)
    for step in (6, 8):
        (tmp_path / name_of(step) / "state.json").write_bytes(b"")
    save(tmp_path, snapshot(5), keep=2, saved=4)
    assert Checkpoints(tmp_path).steps() == [5, 4]
    assert whole(tmp_path) == {4, 5}


def test_checkpoints_are_their_users_alone(tmp_path: Path) -> None:
    save(tmp_path / "c", snapshot(2, 2), keep=1)
    for path in (tmp_path / "c", *(tmp_path / "c").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_litter_goes_whoever_has_its_number_by_now(tmp_path: Path) -> None:
    """The run's lock is held: nobody else writes here, though in a container small numbers are soon given again."""
    save(tmp_path, snapshot(2), keep=1)
    other, mine = os.getppid(), os.getpid()
    for name in (f".step-000004.{other}.tmp", f".step-000004.{mine}.tmp", f".step-000001.{mine}.gone", ".BEST.1.tmp"):
        (tmp_path / name).mkdir()
    Checkpoints(tmp_path).tidy()
    assert names(tmp_path) == ["LATEST", name_of(2)]


def test_a_save_that_was_killed_before_it_removed_the_older_is_made_good(tmp_path: Path) -> None:
    """The last of a run, perhaps: no other save comes that would do it."""
    for step in (2, 4, 6, 8):
        save(tmp_path, snapshot(step, 2), keep=9)
    Checkpoints(tmp_path).point("LATEST", 6)
    Keeper(Checkpoints(tmp_path), 2, 8).mend(snapshot(8, 2).state.progress)
    assert Checkpoints(tmp_path).steps() == [8, 6, 2]
    assert Checkpoints(tmp_path).pointer("LATEST") == 8


def test_nothing_goes_while_a_newer_one_is_damaged(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, snapshot(step), keep=9)
    Keeper(Checkpoints(tmp_path), 1, 4).mend(snapshot(4).state.progress)
    assert Checkpoints(tmp_path).steps() == [6, 4, 2]
    assert Checkpoints(tmp_path).pointer("LATEST") == 4
