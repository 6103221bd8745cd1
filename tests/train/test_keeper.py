"""What the keeper leaves on the disk: after a best one that found no room, a stop at once, a late loss."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from luthier.errors import Interrupted
from luthier.runs import RunDirectory
from luthier.train import keeper
from luthier.train.checkpoint import Follows, Progress, Snapshot, read_state, take_snapshot
from luthier.train.checkpoints import Checkpoints, name_of
from luthier.train.identity import identify
from luthier.train.keeper import Failed, Keeper, Saved
from luthier.train.making import make_trainee
from tests.train.snapshots import dying_after, save, snapshot, whole
from tests.train.test_loop import run_it
from tests.train.test_proof import LONG_EVAL, Stops
from tests.train.world import make_rows, make_settings, tiny_decoder


def test_moments_in_memory_that_the_host_shares_are_copied(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paged optimizer's moments are the host's tensors though a GPU computes: the next step would change them."""
    settings = make_settings()
    decoder = tiny_decoder(tiny_llama)
    trainee = make_trainee(decoder, settings)
    for leaf in trainee.parameters.values():
        leaf.grad = torch.ones_like(leaf)
    trainee.optimizer.step()
    monkeypatch.setattr(type(decoder), "device", torch.device("meta"))  # any but a CPU
    identity = identify(settings, make_rows(), "a/model")
    taken = take_snapshot(trainee, Progress(step=1), identity, Follows(0, 1, 2, 1e-3), None)
    before = {name: moment.clone() for name, moment in taken.moments.items()}
    trainee.optimizer.step()
    assert before
    for name, moment in taken.moments.items():
        assert torch.equal(moment, before[name]), name


def test_the_best_stays_where_a_better_one_found_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = ((2, 1.5), (4, 2.0), (6, 1.0), (8, 1.8))
    for number, step in enumerate((2, 4), start=1):
        save(tmp_path, snapshot(step, 2, history[:number]), keep=1)

    def full(folder: Path, snap: Snapshot) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "write_checkpoint", full)
        assert isinstance(save(tmp_path, snapshot(6, 6, history[:3]), keep=1, saved=4), Failed)
    assert isinstance(save(tmp_path, snapshot(8, 6, history), keep=1, saved=4), Saved)
    assert whole(tmp_path) == {2, 8}
    assert Checkpoints(tmp_path).pointer("BEST") == 2


def test_the_best_of_those_that_found_room_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of all, of step 20, is not there: that of 30 is better than that of 10."""
    history = ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.8))

    def full(folder: Path, snap: Snapshot) -> None:
        raise OSError(28, "No space left on device")

    saved = None
    for number, (step, best) in enumerate(((10, 10), (20, 20), (30, 20), (40, 20)), start=1):
        with monkeypatch.context() as patch:
            if step == 20:
                patch.setattr(keeper, "write_checkpoint", full)
            if isinstance(save(tmp_path, snapshot(step, best, history[:number]), keep=1, saved=saved), Saved):
                saved = step
    assert whole(tmp_path) == {30, 40}
    assert Checkpoints(tmp_path).pointer("BEST") == 30


@pytest.mark.parametrize("written", [False, True])
def test_after_a_stop_at_once_nothing_changes_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """The thread may outlive the lock by a moment: it then takes no name, points at nothing and removes nothing."""
    save(tmp_path, snapshot(2), keep=1)
    if written:
        save(tmp_path, snapshot(4), keep=2)
        Checkpoints(tmp_path).point("LATEST", 2)
    began, gate = threading.Event(), threading.Event()

    def waits(*_: object) -> bool:
        began.set()
        assert gate.wait(60)
        return False

    if written:
        monkeypatch.setattr(Keeper, "_is_written", lambda *_: not waits())
    else:
        monkeypatch.setattr(keeper, "write_checkpoint", waits)
    writes = Keeper(Checkpoints(tmp_path), 1, 2)
    writes.begin(snapshot(4, 4))
    assert began.wait(60)
    assert writes.is_writing
    writes.leave(KeyboardInterrupt, KeyboardInterrupt(), None)
    gate.set()
    outcome = writes.collect(wait=True)
    assert isinstance(outcome, Failed)
    assert not writes.is_writing
    assert whole(tmp_path) == ({2, 4} if written else {2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", *map(name_of, sorted(whole(tmp_path)))]
    assert Checkpoints(tmp_path).pointer("LATEST") == 2


def test_a_held_out_loss_measured_after_the_save_is_written_too(tmp_path: Path) -> None:
    """Killed at any moment of it, and tidied up, the one checkpoint that there is is whole."""
    before, after = snapshot(4), snapshot(4, 4, ((4, 1.5),))
    save(tmp_path / "before", before, keep=1)
    for moment in range(500):
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "before", folder)
        with dying_after(moment) as killed:
            save(folder, after, keep=1, saved=4)
        Checkpoints(folder).tidy()
        assert whole(folder) == {4}, f"after {moment} operations"
        assert read_state(folder / name_of(4)).progress in (before.state.progress, after.state.progress)
        if not killed[0]:
            break
    assert not killed[0]
    assert moment > 20
    assert read_state(folder / name_of(4)).progress == after.state.progress
    assert sorted(path.name for path in folder.iterdir()) == ["BEST", "LATEST", name_of(4)]


def test_a_stop_in_the_last_evaluation_leaves_no_hole_in_the_history(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after step 8 of 8"):
        run_it(tiny_llama, tmp_path, listener=Stops(doing="evaluation", step=8), rows=LONG_EVAL)
    last = Checkpoints(RunDirectory(tmp_path).checkpoints).path(8)
    assert read_state(last).progress.evaluated == 6
    run_it(tiny_llama, tmp_path, rows=LONG_EVAL, resume=True)
    assert [step for step, _ in read_state(last).progress.history] == [0, 3, 6, 8]
