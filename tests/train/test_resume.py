"""What a resumed run may change and what it says; and writing in the background, when it is slow and when it fails."""

from __future__ import annotations

import errno
import random
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.errors import Interrupted, TrainingError, UsageError
from luthier.runs import RunDirectory
from luthier.train import keeper, resume
from luthier.train.checkpoint import MadeWith, Snapshot, made_with, read_state, write_checkpoint
from luthier.train.checkpoints import name_of
from luthier.train.events import SaveEvent, StepEvent, WarningEvent
from luthier.train.identity import changes, identify
from luthier.train.loop import check_resumable
from luthier.train.making import make_trainee
from luthier.train.schedule import learning_rate
from tests.train.snapshots import snapshot
from tests.train.test_loop import SETTINGS, CrashError, Dies, Signals, adapter_bytes, assert_same_run, figures, run_it
from tests.train.world import Recorder, checkpoint, events_of, make_rows, make_settings, tiny_decoder

NOTHING_HELD_OUT = make_rows(held_out=0)
HERE = made_with(torch.device("cpu"))


def warnings(listener: Recorder) -> list[str]:
    return [event.message for event in listener.events if isinstance(event, WarningEvent)]


def tensors(folder: Path) -> dict[str, bytes]:
    """What a checkpoint holds, without its figures and its clocks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_how_a_run_is_kept_and_watched_may_change(tiny_llama: Path, tmp_path: Path) -> None:
    run_it(tiny_llama, tmp_path / "whole", rows=NOTHING_HELD_OUT)
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path / "run", rows=NOTHING_HELD_OUT, listener=Signals(at=3))
    listener = Recorder()
    changed = replace(SETTINGS, keep=1, save_every=1, eval_every=4, max_time=3600.0)
    run_it(tiny_llama, tmp_path / "run", changed, rows=NOTHING_HELD_OUT, listener=listener, resume=True)
    assert listener.events[0].step == 3
    assert warnings(listener) == [
        "this run goes on with other settings than before: eval_every: 3 then, 4 now; keep: 3 then, 1 now; "
        "max_time: not set then, 3600.0 now; save_every: 2 then, 1 now"
    ]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000008"]


@pytest.mark.parametrize("finished", [False, True])
def test_more_steps_at_a_constant_rate_are_the_longer_run(tiny_llama: Path, tmp_path: Path, finished: bool) -> None:
    short = replace(SETTINGS, schedule="constant")
    longer = replace(short, steps=12)
    run_it(tiny_llama, tmp_path / "longer", longer, rows=NOTHING_HELD_OUT)
    if finished:
        run_it(tiny_llama, tmp_path / "run", short, rows=NOTHING_HELD_OUT)
    else:
        with pytest.raises(Interrupted):
            run_it(tiny_llama, tmp_path / "run", short, rows=NOTHING_HELD_OUT, listener=Signals(at=5))
    listener = Recorder()
    run_it(tiny_llama, tmp_path / "run", longer, rows=NOTHING_HELD_OUT, listener=listener, resume=True)
    assert warnings(listener) == ["this run goes on with other settings than before: steps: 8 then, 12 now"]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "longer")
    assert figures(tmp_path / "run") == figures(tmp_path / "longer")
    assert len(events_of(tmp_path / "run" / "events.jsonl", "end")) == 1


def test_more_steps_on_a_falling_rate_are_said_to_follow_the_new_length(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=6))
    listener = Recorder()
    run_it(tiny_llama, tmp_path, replace(SETTINGS, steps=12), listener=listener, resume=True)
    assert "steps: 8 then, 12 now (the learning rate follows the new length from here on)" in warnings(listener)[0]
    rates = [event.learning_rate for event in listener.events if isinstance(event, StepEvent)]
    assert rates == [
        learning_rate("cosine", done=done, peak=SETTINGS.learning_rate, warmup_steps=2, steps=12)
        for done in range(6, 12)
    ]


def test_fewer_steps_are_another_run(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=3))
    changed = replace(SETTINGS, steps=6, keep=9, learning_rate=1e-4)
    with pytest.raises(UsageError) as caught:
        run_it(tiny_llama, tmp_path, changed, resume=True)
    said = caught.value.message.splitlines()[1:]
    expected = ["learning_rate: 0.005 then, 0.0001 now", "steps: 8 then, 6 now", "keep: 3 then, 9 now"]
    assert said == [f"  {line}" for line in expected]
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError):
        check_resumable(RunDirectory(tmp_path), make_rows(), changed, "a/model")


def test_what_the_proof_may_choose_may_change_before_the_first_step(tiny_llama: Path, tmp_path: Path) -> None:
    """A checkpoint of step 0 says how a batch was to be cut; the proof of the next sitting may find that too much."""
    fewer = make_settings(micro_batch=1)
    run_it(tiny_llama, tmp_path / "whole", fewer)
    with pytest.raises(Interrupted, match="stopped after step 0"):
        run_it(tiny_llama, tmp_path / "run", make_settings(max_time=1e-3))
    run_it(tiny_llama, tmp_path / "run", fewer, resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path / "other", listener=Signals(at=1))
    with pytest.raises(UsageError, match="micro_batch: 2 then, 1 now"):
        run_it(tiny_llama, tmp_path / "other", make_settings(dropout=0.1, micro_batch=1), resume=True)


def test_another_machine_is_told(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=3))
    monkeypatch.setattr(resume, "made_with", lambda _: MadeWith("9.9", HERE.threads, "abacus"))
    listener = Recorder()
    run_it(tiny_llama, tmp_path, listener=listener, resume=True)
    assert warnings(listener) == [
        "sums may differ in their last bits from those of a run that was not interrupted: "
        f"torch {HERE.torch} then, 9.9 now; processor {HERE.processor} then, abacus now"
    ]


def test_a_gpu_is_said_to_be_no_cpu_and_another_gpu_to_be_another(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = make_trainee(tiny_decoder(tiny_llama), SETTINGS)
    monkeypatch.setattr(type(trainee.decoder), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "new card")
    state = snapshot(3).state
    (said,) = resume._other_machine(replace(state, made_with=made_with(torch.device("cuda"))), trainee)
    assert said.endswith("not interrupted: this is cuda, and only a CPU repeats them to the bit")
    then = MadeWith("1.0", HERE.threads + 1, "abacus", "old card")
    (said,) = resume._other_machine(replace(state, made_with=then), trainee)
    assert said.endswith(f"; torch 1.0 then, {HERE.torch} now; GPU old card then, new card now")


def test_other_weights_under_the_same_name_are_refused() -> None:
    then = identify(SETTINGS, NOTHING_HELD_OUT, "a/model", "1" * 64)
    assert changes(then, replace(then, weights="2" * 64)).refused == (
        "model: the files of a/model are not those that the run was begun with",
    )
    assert changes(then, then) == changes(then, replace(then, weights=None))


def test_a_finished_run_without_checkpoints_is_not_trained_anew(tiny_llama: Path, tmp_path: Path) -> None:
    run_it(tiny_llama, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="holds a trained run without a checkpoint") as caught:
        run_it(tiny_llama, tmp_path, resume=True)
    assert "luthier eval, merge and export" in str(caught.value.remedy)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_state_says_what_follows_from_the_step(tiny_llama: Path, tmp_path: Path) -> None:
    """Eleven rows, four a step: after seven steps 28 rows were seen, 6 of them in the third epoch."""
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=7))
    state = read_state(checkpoint(tmp_path))
    assert (state.follows.epoch, state.follows.unit, state.follows.units_per_epoch) == (2, 6, 11)
    rate = learning_rate("cosine", done=7, peak=SETTINGS.learning_rate, warmup_steps=2, steps=8)
    assert state.follows.learning_rate == rate
    evaluations = [(line["step"], line["loss"]) for line in events_of(tmp_path / "events.jsonl", "eval")]
    assert list(state.progress.history) == evaluations
    assert [step for step, _ in evaluations] == [0, 3, 6]
    assert state.recipe_sha256 is None
    assert state.made_with == HERE


def test_the_loss_scale_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    settings = make_settings(precision="fp16", dropout=0.1)
    expected = run_it(tiny_llama, tmp_path / "whole", settings)
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path / "run", settings, listener=Signals(at=3))
    assert_same_run(
        tmp_path / "run", run_it(tiny_llama, tmp_path / "run", settings, resume=True), (tmp_path / "whole", expected)
    )
    scales = [read_state(checkpoint(tmp_path / name)).loss_scale for name in ("whole", "run")]
    assert scales[0] == scales[1]
    assert scales[0] is not None
    assert scales[0]["_growth_tracker"] == 8


def test_no_generator_is_drawn_from_but_torchs(tiny_llama: Path, tmp_path: Path) -> None:
    def states() -> tuple[object, ...]:
        name, keys, *rest = np.random.get_state()
        return random.getstate(), name, keys.tobytes(), *rest

    before = states()
    run_it(tiny_llama, tmp_path)
    assert states() == before


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_the_next_best_is_the_adapter_where_the_best_is_lost(tiny_llama: Path, tmp_path: Path, harm: str) -> None:
    """Somebody removed or broke the best checkpoint before the run came to its end."""
    settings = make_settings(steps=40, learning_rate=2e-2, schedule="constant", eval_every=5, save_every=5, keep=9)
    rows = make_rows(train=3, held_out=4)

    @dataclass
    class Loses(Recorder):
        lost: list[int] = field(default_factory=list)

        def on_step(self, event: StepEvent) -> None:
            super().on_step(event)
            if event.step == 39:
                folder = checkpoint(tmp_path, "BEST")
                self.lost.append(int(folder.name.removeprefix("step-")))
                if harm == "missing":
                    shutil.rmtree(folder)
                else:
                    (folder / "rng.safetensors").write_bytes(b"")

    listener = Loses()
    result = run_it(tiny_llama, tmp_path, settings, rows=rows, listener=listener)
    losses = {line["step"]: line["loss"] for line in events_of(tmp_path / "events.jsonl", "eval") if line["step"]}
    assert min(losses, key=losses.__getitem__) == listener.lost[0], "a run that overfits"
    del losses[listener.lost[0]]
    assert result.adapter_step == result.best_step == min(losses, key=losses.__getitem__)
    assert result.best_eval == losses[result.best_step]
    (told,) = warnings(listener)
    assert told.startswith(f"{name_of(listener.lost[0])} is {'missing' if harm == 'missing' else 'not whole'}")
    assert told.endswith(f": the adapter is that of step {result.best_step}")


def test_a_slow_disk_changes_no_number_and_holds_no_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 2 is written only when step 3 is done: it is still that of step 2."""
    expected = run_it(tiny_llama, tmp_path / "whole", replace(SETTINGS, keep=9))
    gate = threading.Event()

    def slow(folder: Path, snap: Snapshot) -> None:
        assert gate.wait(60) or snap.step != 2, "training waits for the disk"
        write_checkpoint(folder, snap)

    @dataclass
    class Opens(Recorder):
        def on_step(self, event: StepEvent) -> None:
            super().on_step(event)
            if event.step == 3:
                gate.set()

    monkeypatch.setattr(keeper, "write_checkpoint", slow)
    listener = Opens()
    result = run_it(tiny_llama, tmp_path / "slow", replace(SETTINGS, keep=9), listener=listener)
    assert_same_run(tmp_path / "slow", result, (tmp_path / "whole", expected))
    for step in (2, 4, 6, 8):
        ours, theirs = (tmp_path / name / "checkpoints" / name_of(step) for name in ("slow", "whole"))
        assert tensors(ours) == tensors(theirs)
    kinds = [(event.event, event.step) for event in listener.events]
    assert kinds.index(("save", 2)) > kinds.index(("step", 3)), "told when it is on disk, not before"


@dataclass
class Disk:
    """What stands in for writing a checkpoint: fails at the steps where there is no room."""

    full: set[int]
    number: int = errno.ENOSPC
    tried: list[int] = field(default_factory=list)

    def write(self, folder: Path, snap: Snapshot) -> None:
        self.tried.append(snap.step)
        write_checkpoint(folder, snap)
        if snap.step in self.full:
            raise OSError(self.number, "No space left on device" if self.number == errno.ENOSPC else "broken")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_said_and_tried_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    expected = run_it(tiny_llama, tmp_path / "whole", rows=NOTHING_HELD_OUT)
    disk, listener = Disk({4, 6}, number), Recorder()
    monkeypatch.setattr(keeper, "write_checkpoint", disk.write)
    result = run_it(tiny_llama, tmp_path / "run", rows=NOTHING_HELD_OUT, listener=listener)
    assert_same_run(tmp_path / "run", result, (tmp_path / "whole", expected))
    assert disk.tried == [2, 4, 6, 8]
    said = warnings(listener)
    assert [message.split(" could not")[0] for message in said] == [
        "the checkpoint of step 4",
        "the checkpoint of step 6",
    ]
    assert all("; the last checkpoint, of step 2, is whole; the run goes on and tries again" in one for one in said)
    assert [event.step for event in listener.events if isinstance(event, SaveEvent)] == [2, 8]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        *("LATEST", "step-000002", "step-000008")
    ]


def test_a_last_checkpoint_without_room_is_an_error_and_the_run_can_go_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_it(tiny_llama, tmp_path / "whole")
    monkeypatch.setattr(keeper, "write_checkpoint", Disk({6, 8}).write)
    listener = Recorder()
    with pytest.raises(TrainingError) as caught:
        run_it(tiny_llama, tmp_path / "run", listener=listener)
    assert caught.value.exit_code == 5
    assert "the checkpoint of step 8 could not be written: No space left on device" in caught.value.message
    assert "training is done" in caught.value.message
    assert "make room" in str(caught.value.remedy)
    assert listener.closed == 1
    assert not (tmp_path / "run" / "adapter").exists()
    monkeypatch.undo()
    assert_same_run(tmp_path / "run", run_it(tiny_llama, tmp_path / "run", resume=True), (tmp_path / "whole", expected))


def test_a_signal_without_room_says_that_nothing_was_saved(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_it(tiny_llama, tmp_path / "whole")
    monkeypatch.setattr(keeper, "write_checkpoint", Disk({5}).write)
    with pytest.raises(TrainingError, match="checkpoint of step 5 could not be written") as caught:
        run_it(tiny_llama, tmp_path / "run", listener=Signals(at=5))
    assert "SIGTERM: stopped after step 5 of 8" in caught.value.message
    assert checkpoint(tmp_path / "run").name == "step-000004"
    monkeypatch.undo()
    assert_same_run(tmp_path / "run", run_it(tiny_llama, tmp_path / "run", resume=True), (tmp_path / "whole", expected))


def test_another_fault_of_the_disk_stops_the_run_at_the_next_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "write_checkpoint", Disk({4}, errno.EIO).write)
    listener = Recorder()
    with pytest.raises(
        TrainingError, match="checkpoint of step 4 could not be written: broken; the last checkpoint"
    ) as e:
        run_it(tiny_llama, tmp_path, rows=NOTHING_HELD_OUT, listener=listener)
    assert e.value.exit_code == 5
    assert listener.events[-1].step <= 6
    assert checkpoint(tmp_path).name == "step-000002"


def test_what_is_being_written_is_not_left_behind_by_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails while its checkpoint is on the way: that comes to its end first."""
    gate = threading.Event()

    def slow(folder: Path, snap: Snapshot) -> None:
        gate.wait(0.2)
        write_checkpoint(folder, snap)

    monkeypatch.setattr(keeper, "write_checkpoint", slow)
    with pytest.raises(CrashError):
        run_it(tiny_llama, tmp_path, rows=NOTHING_HELD_OUT, listener=Dies(at=3))
    assert checkpoint(tmp_path).name == "step-000002"
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
