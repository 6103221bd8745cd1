"""What goes wrong in a run and does not end it: steps that are left out, a loss that leaps, a disk without room."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.data.conversation import Example
from luthier.errors import Interrupted, TrainingError, is_disk_full
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.checkpoints import Checkpoints
from luthier.train.events import EventLog, StepEvent, WarningEvent
from luthier.train.loop import Hooks, TrainResult, train
from luthier.train.making import make_batches
from luthier.train.spikes import LEAST, WINDOW, Spikes
from luthier.train.step import NotFiniteError, take_step
from tests.train.test_events import step_event, written
from tests.train.test_loop import CrashError, Dies, adapter_bytes, figures, run_it
from tests.train.world import Recorder, Rows, events_of, make_rows, make_settings, tiny_decoder

ROOT = Path(__file__).resolve().parents[2]
POISON = 60
"""A token that stands in one row, and whose embedding is not a number."""
BAD = 7
SETTINGS = make_settings(dropout=0.1)


def poisoned_rows(number: int = BAD) -> Rows:
    rows = make_rows()
    bad = rows.train[number]
    ids = bad.ids.copy()
    ids[0] = POISON
    train = tuple(Example(ids, row.labels, row.row) if row is bad else row for row in rows.train)
    return replace(rows, train=train)


def run_poisoned(
    model: Path,
    out: Path,
    settings: Settings,
    *,
    listener: Recorder | None = None,
    resume: bool = False,
    rows: Rows | None = None,
    hooks: Hooks | None = None,
) -> TrainResult:
    decoder = tiny_decoder(model)
    with torch.no_grad():
        decoder.model.embed_tokens.weight[POISON] = float("nan")
    run, told = RunDirectory(out), listener or Recorder()
    rows = rows or poisoned_rows()
    return train(decoder, rows, settings, run, base="a/model", listener=told, resume=resume, hooks=hooks)


def bad_steps() -> list[int]:
    """The steps, from 1, whose batch holds the row; counted from the batches themselves."""
    batches = make_batches(poisoned_rows(), SETTINGS)
    return [k + 1 for k in range(SETTINGS.steps) if any(BAD in micro.rows for micro in batches.step(k))]


def test_a_step_that_is_not_finite_is_left_out_and_told_with_its_rows(tiny_llama: Path, tmp_path: Path) -> None:
    bad, listener = bad_steps(), Recorder()
    assert 2 <= len(bad) <= 4
    result = run_poisoned(tiny_llama, tmp_path, make_settings(dropout=0.1, on_nonfinite=4), listener=listener)
    assert result.steps == 8
    assert np.isfinite(result.best_eval)
    steps = [int(str(line["step"])) for line in events_of(tmp_path / "events.jsonl", "step")]
    assert steps == [step for step in range(1, 9) if step not in bad]
    skips = [line for line in events_of(tmp_path / "events.jsonl", "warning") if line["kind"] == "skip"]
    assert [line["step"] for line in skips] == bad
    for number, line in enumerate(skips, start=1):
        assert f"the loss is not finite: the step is left out ({number} of at most 4)" in str(line["message"])
        assert f"rows.jsonl:{1 + BAD}" in str(line["message"])
        rows = line["rows"]
        assert isinstance(rows, list)
        assert BAD in rows
        assert len(rows) <= SETTINGS.micro_batch  # those of the micro-batch at fault, not of the whole step
    rates = {line["step"]: line["learning_rate"] for line in events_of(tmp_path / "events.jsonl", "step")}
    assert all(rates[step] == rate for step, rate in whole_rates().items() if step in rates), "the step counts"


def whole_rates() -> dict[object, object]:
    from luthier.train.schedule import learning_rate

    how = {"peak": SETTINGS.learning_rate, "warmup_steps": SETTINGS.warmup_steps, "steps": SETTINGS.steps}
    return {1 + k: learning_rate(SETTINGS.schedule, done=k, **how) for k in range(8)}  # type: ignore[arg-type]


@pytest.mark.parametrize("allowed", [0, 1])
def test_one_more_than_allowed_stops_before_anything_is_updated(tiny_llama: Path, tmp_path: Path, allowed: int) -> None:
    bad = bad_steps()
    with pytest.raises(TrainingError) as caught:
        run_poisoned(tiny_llama, tmp_path, make_settings(dropout=0.1, on_nonfinite=allowed))
    message = caught.value.message
    assert message.startswith(f"step {bad[allowed]}: the loss is not finite")
    assert ("(1 left out before, as train.on_nonfinite allows)" in message) == (allowed == 1)
    assert f"rows.jsonl:{1 + BAD}" in message
    newest = Checkpoints(tmp_path / "checkpoints").newest_whole().step
    assert (f"the last checkpoint, of step {newest}, is whole" in message) == (newest is not None)
    assert caught.value.exit_code == 5


def test_leaving_out_is_the_same_in_a_run_that_is_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    """What was left out is counted in the checkpoint: as many are allowed as without the interruption."""
    bad = bad_steps()
    exact = make_settings(dropout=0.1, on_nonfinite=len(bad), save_every=1)
    run_poisoned(tiny_llama, tmp_path / "whole", exact)
    for at in (bad[0] + 1, 8):
        out = tmp_path / f"dies at {at}"
        with pytest.raises(CrashError):
            run_poisoned(tiny_llama, out, exact, listener=Dies(at=at))
        run_poisoned(tiny_llama, out, exact, resume=True)
        assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
        assert figures(out) == figures(tmp_path / "whole")
        kinds = [[line["step"] for line in warnings(run, "skip")] for run in (out, tmp_path / "whole")]
        assert kinds == [bad, bad]
    few = make_settings(dropout=0.1, on_nonfinite=len(bad) - 1, save_every=1)
    with pytest.raises(CrashError):
        run_poisoned(tiny_llama, tmp_path / "few", few, listener=Dies(at=bad[0] + 1))
    with pytest.raises(TrainingError, match=f"step {bad[-1]}: the loss is not finite"):
        run_poisoned(tiny_llama, tmp_path / "few", few, resume=True)


@dataclass
class SignalsAtSkip(Recorder):
    """Sends the process a signal when a step is left out."""

    def on_warning(self, event: WarningEvent) -> None:
        super().on_warning(event)
        if event.kind == "skip":
            signal.raise_signal(signal.SIGTERM)


def test_a_checkpoint_before_the_first_update_is_gone_on_from(tiny_llama: Path, tmp_path: Path) -> None:
    """The optimizer has no moments yet where nothing was tried before the first step, and that is left out."""
    (first, *_), *_ = (batch.rows for batch in make_batches(make_rows(), SETTINGS).step(0))
    rows, hooks = poisoned_rows(first), Hooks(prove=False)
    exact = make_settings(dropout=0.1, on_nonfinite=8, save_every=1)
    run_poisoned(tiny_llama, tmp_path / "whole", exact, rows=rows, hooks=hooks)
    with pytest.raises(Interrupted, match="stopped after step 1 of 8"):
        run_poisoned(tiny_llama, tmp_path / "run", exact, rows=rows, hooks=hooks, listener=SignalsAtSkip())
    run_poisoned(tiny_llama, tmp_path / "run", exact, rows=rows, hooks=hooks, resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_log_that_cannot_be_written_ends_the_run_with_what_is_good(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appends = EventLog._append

    def fails(log: EventLog) -> None:
        if b'"event":"step","step":5' in log._waiting:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        appends(log)

    monkeypatch.setattr(EventLog, "_append", fails)
    with pytest.raises(
        TrainingError, match=r"events.jsonl cannot be written: .*the last checkpoint, of step 4"
    ) as caught:
        run_it(tiny_llama, tmp_path / "run")
    assert "--resume" in str(caught.value.remedy)
    monkeypatch.undo()
    run_it(tiny_llama, tmp_path / "whole")
    run_it(tiny_llama, tmp_path / "run", resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def warnings(run: Path, kind: str) -> list[dict[str, object]]:
    return [line for line in events_of(run / "events.jsonl", "warning") if line["kind"] == kind]


def test_what_a_bad_batch_did_to_the_loss_scale_is_taken_back(tiny_llama: Path) -> None:
    """In fp16 a gradient that overflows at every factor is halved down to 1; the next batch begins where it was."""
    from luthier.train.making import make_trainee

    settings = make_settings(precision="fp16")
    trainee = make_trainee(tiny_decoder(tiny_llama, torch.float16), settings)
    assert trainee.scaler is not None
    batches = make_batches(make_rows(), settings)
    for name, leaf in trainee.parameters.items():
        if "lora_A" in name:
            leaf.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: leaf.detach().clone() for name, leaf in trainee.parameters.items()}
    factor = trainee.scaler.get_scale()
    for _ in range(2):  # the second finds the scaler ready for it
        with pytest.raises(NotFiniteError, match="gradient is not finite"):
            take_step(trainee, batches.step(0), 1.0)
        assert trainee.scaler.get_scale() == factor
    assert all(bool((leaf == before[name]).all()) for name, leaf in trainee.parameters.items())


def test_a_loss_far_above_the_others_is_flagged_and_noise_is_not() -> None:
    random, spikes = np.random.default_rng(3), Spikes()
    flagged = [k for k, loss in enumerate(random.normal(2.0, 0.1, 5000)) if spikes.add(float(loss)) is not None]
    assert flagged == [], "six standard deviations of normal noise"
    assert spikes.add(2.0 + 6 * 0.1 * 2) is not None
    assert spikes.add(1.2) is None, "a loss that falls is none"


def test_a_spike_neither_hides_the_next_nor_counts_before_there_are_enough() -> None:
    spikes = Spikes()
    assert [spikes.add(loss) for loss in (9.0, *[1.0] * 18, 9.0)] == [None] * 20
    assert spikes.add(9.0) == pytest.approx(1.0 + LEAST)
    assert spikes.add(9.0) == pytest.approx(1.0 + LEAST)
    assert spikes.add(1.0 + 0.9 * LEAST) is None


def test_a_falling_loss_is_no_spike() -> None:
    spikes, random = Spikes(), np.random.default_rng(4)
    losses = [4.0 * 0.97**k + random.normal(0, 0.05) for k in range(200)]
    assert not any(spikes.add(float(loss)) for loss in losses)


def test_the_window_is_read_back_from_the_log(tmp_path: Path) -> None:
    losses = [float(x) for x in np.random.default_rng(5).normal(1.5, 0.2, 3 * WINDOW)]
    path, told = tmp_path / "events.jsonl", Spikes()
    written(path, [step_event(k, loss) for k, loss in enumerate(losses, start=1)])
    for loss in losses:
        told.add(loss)
    again = Spikes.read(path)
    for loss in (2.0, 3.0, 9.0):
        assert again.add(loss) == told.add(loss)
    assert Spikes.read(tmp_path / "none").add(9.0) is None


@dataclass
class Leaps(Recorder):
    """Makes one step's rows wholly unlikely: the final norm's weights change their sign for it."""

    decoder: object = None
    at: int = 0

    def on_step(self, event: StepEvent) -> None:
        super().on_step(event)
        if event.step in (self.at, self.at + 1):
            with torch.no_grad():
                self.decoder.model.norm.weight.mul_(-30.0 if event.step == self.at else -1 / 30.0)  # type: ignore[attr-defined]


def test_a_run_tells_a_spike_with_its_rows_and_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    decoder, rows = tiny_decoder(tiny_llama), make_rows(held_out=0)
    listener = Leaps(decoder=decoder, at=30)
    settings = make_settings(steps=34, save_every=0)
    train(decoder, rows, settings, RunDirectory(tmp_path), base="a/model", listener=listener)
    (line,) = warnings(tmp_path, "spike")
    assert line["step"] == 31
    assert "far above that of the steps before" in str(line["message"])
    expected = [row for micro in make_batches(rows, settings).step(30) for row in micro.rows]
    assert line["rows"] == expected
    assert f"rows.jsonl:{1 + expected[0]}" in str(line["message"])


FULL = """
import resource, signal, sys
from pathlib import Path
from luthier.train.events import EventLog
from tests.train.test_events import step_event
path, limit = Path(sys.argv[1]), int(sys.argv[2])
said = []
with EventLog.opened(path) as log:
    for step in range(1, 4):
        said.append(log.write(step_event(step)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for step in range(4, 9):
        said.append(log.write(step_event(step)))
    try:
        log.settle()
    except OSError as error:
        said.append(error.errno)
    print(path.read_bytes().count(b"\\n"), path.read_bytes().endswith(b"\\n"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said.append(log.write(step_event(9)))
    log.settle()
print(said)
"""


def test_lines_without_room_wait_and_half_a_line_is_never_there(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    written(tmp_path / "one", [step_event(1)])
    limit = 5 * (tmp_path / "one").stat().st_size + 100  # within the sixth line
    command = [sys.executable, "-c", FULL, str(path), str(limit)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there, said = done.stdout.splitlines()
    assert there == "5 True"
    assert json.loads(said.lower()) == [*[True] * 5, False, False, False, errno.EFBIG, True]
    assert [line["step"] for line in events_of(path)] == list(range(1, 10))


def test_what_says_that_a_disk_is_full() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert is_disk_full(OSError(number, os.strerror(number)))
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(ValueError("12 requested"))


def test_numpy_and_safetensors_say_it_in_words_of_their_own(tmp_path: Path) -> None:
    code = """
import resource, sys
import numpy as np, torch
from safetensors.torch import save_file
from luthier.errors import is_disk_full
resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
count = 100_000
for write in (lambda: np.zeros(count).tofile(sys.argv[1] + "/n"),
              lambda: save_file({"a": torch.zeros(count)}, sys.argv[1] + "/s")):
    try:
        write()
    except Exception as error:
        print(is_disk_full(error), repr(error))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["True", "True"], done.stdout


def test_a_full_disk_costs_a_checkpoint_and_no_event(tiny_llama: Path, tmp_path: Path) -> None:
    """In a process of its own, for the limit is the process's: full from step 3 to 5, so that of step 4 is not made."""
    command = [sys.executable, "-m", "tests.train.full", str(tiny_llama), str(tmp_path / "run"), "3", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = events_of(tmp_path / "run" / "events.jsonl")
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 9))
    saves = [line["step"] for line in lines if line["event"] == "save"]
    assert 4 not in saves
    assert saves[-1] == 8
    said = [str(line["message"]) for line in lines if line["event"] == "warning"]
    assert any("the checkpoint of step 4 could not be written" in message for message in said), said
    assert "events wait in memory" in done.stderr
    run_full = [sys.executable, "-m", "tests.train.full", str(tiny_llama), str(tmp_path / "whole"), "99", "99"]
    assert subprocess.run(run_full, cwd=ROOT, capture_output=True, text=True, check=False).returncode == 0
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_disk_that_stays_full_ends_the_run_with_its_last_checkpoint_and_it_goes_on_later(
    tiny_llama: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.train.full", str(tiny_llama), str(tmp_path / "run")]
    done = subprocess.run([*command, "5", "99"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    named = re.search(r"the last checkpoint, of step (\d), is whole", done.stderr)
    assert named is not None, done.stderr
    assert int(named[1]) in (3, 4)  # that of step 4 may have been on its way when the disk became full
    assert Checkpoints(tmp_path / "run" / "checkpoints").faults(int(named[1])) == []
    assert "make room" in done.stderr
    again = subprocess.run([*command, "99", "99"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    whole = [*command[:-1], str(tmp_path / "whole"), "99", "99"]
    assert subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=False).returncode == 0
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
