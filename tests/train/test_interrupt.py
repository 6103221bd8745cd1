"""What ends a sitting before its run is done: the stop file and the clock; and when that is, told from real steps."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest

from luthier.errors import Interrupted
from luthier.plan.settings import Settings
from luthier.plan.stopping import save_seconds
from luthier.runs import RunDirectory
from luthier.train.events import InterruptEvent, ProgressEvent, ProofEvent, SaveEvent, StepEvent
from luthier.train.limits import Stops
from luthier.train.loop import Hooks, train
from luthier.train.signals import StopSignals
from tests.train.test_events import step_event
from tests.train.test_loop import Signals, assert_same_run, run_it
from tests.train.world import Recorder, events_of, make_rows, make_settings, tiny_decoder

SETTINGS = make_settings(dropout=0.1)


@dataclass
class Clock:
    """Seconds that pass as the test says."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def stops(clock: Clock, began: float | None = None, **changes: object) -> Stops:
    return Stops(StopSignals(), make_settings(**changes), trained=1000, began=began, clock=clock)


def step(seconds: float) -> StepEvent:
    return StepEvent(**{**vars(step_event(1)), "seconds": seconds})


def test_the_clock_leaves_time_for_a_step_and_a_save() -> None:
    clock = Clock()
    limits = stops(clock, max_time=60.0)
    limits.learn(step(8.0))
    limits.learn(SaveEvent(step=1, checkpoint="step-000001", best=False, seconds=2.0))
    assert limits.seconds == 1.25 * (8.0 + 2.0)
    clock.now = 100.0 + 60.0 - 12.5
    assert limits.reason is None
    clock.now += 0.01
    assert limits.reason == "train.max_time of 1 min"
    assert limits.asked is None  # nobody asks: a run that is done may still write its last files


def test_the_longest_of_the_newest_steps_and_the_longest_save_count() -> None:
    limits = stops(Clock(), max_time=1e6)
    for seconds in (50.0, *[1.0] * 19):
        limits.learn(step(seconds))
    for seconds in (3.0, 1.0):
        limits.learn(SaveEvent(step=1, checkpoint="step-000001", best=False, seconds=seconds))
    assert limits.seconds == 1.25 * (50.0 + 3.0)
    limits.learn(step(1.0))  # the first, with its warm-up, is long ago
    assert limits.seconds == 1.25 * (1.0 + 3.0)


def test_before_the_first_step_the_proof_says_how_long_one_takes() -> None:
    limits = stops(Clock(), max_time=1e6, batch_size=8, micro_batch=8)
    none = 1.25 * save_seconds(1000, "adamw")
    assert limits.seconds == none
    figures = dict.fromkeys(("predicted_gib", "error", "predicted_seconds", "error_seconds"))
    proof = ProofEvent(
        step=0,
        tokens=9,
        longest=9,
        documents=1,
        micro_batch=2,  # less at once than planned: four passes a step
        checkpointing=0,
        measured_gib=1.0,
        reserved_gib=1.0,
        measured_seconds=0.5,
        **figures,
    )
    limits.learn(proof)
    assert limits.seconds == pytest.approx(1.25 * 4 * 0.5 + none)


def test_a_save_on_its_way_counts_too() -> None:
    limits = stops(Clock(), max_time=1e6)
    limits.learn(step(8.0))
    limits.learn(SaveEvent(step=1, checkpoint="step-000001", best=False, seconds=2.0))
    limits.is_writing = lambda: True
    assert limits.seconds == 1.25 * (8.0 + 2 * 2.0)


def test_a_resumed_sitting_knows_how_long_a_step_was(tiny_llama: Path, tmp_path: Path) -> None:
    """And one that tries no micro-batch, and has taken no step, what the plan predicts: none is begun without room."""
    said = interrupted(
        tiny_llama,
        tmp_path / "new",
        make_settings(max_time=3600.0),
        Recorder(),
        Hooks(prove=False, step_seconds=3600.0),
    )
    assert "stopped after step 0 of 8" in said
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path / "run", listener=Signals(at=3))
    log = tmp_path / "run" / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line["seconds"] = 3600.0 if (line["event"], line["step"]) == ("step", 3) else line.get("seconds")
    log.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    with pytest.raises(Interrupted, match=r"train.max_time of 1 h.*stopped after step 3 of 8"):
        run_it(tiny_llama, tmp_path / "run", make_settings(dropout=0.1, max_time=3600.0), resume=True)


def test_a_sitting_counts_from_where_its_caller_says() -> None:
    assert stops(Clock(), began=0.0, max_time=60.0).reason == "train.max_time of 1 min"
    assert stops(Clock(), max_time=60.0).reason is None


def test_the_stop_file_is_looked_for_once_a_second(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "going"
    limits = stops(clock, stop_file=str(file))
    file.touch()
    assert limits.reason is None
    clock.now += 1.0
    assert limits.reason == limits.asked == f"the stop file {file}"
    file.unlink()
    clock.now += 1.0
    assert limits.reason is not None  # what has been asked stays asked
    file.touch()
    assert stops(clock, stop_file=str(file)).asked is not None, "it came while the model was loaded"


@dataclass
class Notices(Recorder):
    """Makes the stop file after `at` updates, and lets a second pass on the clock that the run looks at."""

    file: Path = field(default_factory=Path)
    at: int = 0
    clock: Clock = field(default_factory=Clock)

    def on_step(self, event: StepEvent) -> None:
        super().on_step(event)
        if event.step == self.at:
            self.file.touch()
            self.clock.now += 1.0


def interrupted(model: Path, out: Path, settings: Settings, listener: Recorder, hooks: Hooks | None = None) -> str:
    """Run until the interruption; its message."""
    with pytest.raises(Interrupted) as caught:
        train(
            tiny_decoder(model),
            make_rows(),
            settings,
            RunDirectory(out),
            base="a/model",
            listener=listener,
            hooks=hooks,
        )
    assert caught.value.exit_code == 75
    assert "--resume" in str(caught.value.remedy)
    return f"{caught.value.message} {caught.value.remedy}"


def test_a_stop_file_ends_the_run_as_a_signal_does(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, clock = tmp_path / "going", Clock()
    monkeypatch.setattr(Stops.__init__, "__defaults__", (None, clock))
    settings = make_settings(dropout=0.1, stop_file=str(file))
    listener = Notices(file=file, at=3, clock=clock)
    said = interrupted(tiny_llama, tmp_path / "run", settings, listener)
    assert f"the stop file {file}: stopped after step 3 of 8" in said
    last = listener.events[-1]
    assert isinstance(last, InterruptEvent)
    assert (last.step, last.signal, last.reason) == (3, "", f"the stop file {file}")
    file.unlink()
    resumed = run_it(tiny_llama, tmp_path / "run", settings, resume=True)
    expected = run_it(tiny_llama, tmp_path / "whole")
    assert_same_run(tmp_path / "run", resumed, (tmp_path / "whole", expected))


TEN = 10.0


@dataclass
class Slow(Recorder):
    """Lets ten seconds go by with every step."""

    clock: Clock = field(default_factory=Clock)

    def on_step(self, event: StepEvent) -> None:
        super().on_step(event)
        self.clock.now += TEN


def test_a_run_ends_before_its_time_is_over_and_goes_on_in_the_next_sitting(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sitting has 35 seconds, a step takes ten: three are taken in each, and every sitting gets further."""
    clock, learn = Clock(), Stops.learn
    monkeypatch.setattr(Stops.__init__, "__defaults__", (None, clock))
    monkeypatch.setattr(
        Stops, "learn", lambda self, event: learn(self, step(TEN) if isinstance(event, StepEvent) else event)
    )
    settings = make_settings(dropout=0.1, max_time=35.0)
    out, steps, said = tmp_path / "run", [0], ""
    said = interrupted(tiny_llama, out, settings, Slow(clock=clock))
    steps.append(int(str(events_of(out / "events.jsonl", "interrupt")[-1]["step"])))
    assert "train.max_time of 35 s: stopped after step" in said
    while steps[-1] < 8:
        before = clock.now
        try:
            resumed = run_it(tiny_llama, out, settings, listener=Slow(clock=clock), resume=True)
            steps.append(8)
        except Interrupted:
            steps.append(int(str(events_of(out / "events.jsonl", "interrupt")[-1]["step"])))
            assert clock.now - before <= 35.0
    assert steps == [0, 3, 6, 8]
    expected = run_it(tiny_llama, tmp_path / "whole")
    assert_same_run(out, resumed, (tmp_path / "whole", expected))


def test_a_sitting_too_short_for_a_step_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    said = interrupted(tiny_llama, tmp_path / "run", make_settings(max_time=0.1), Recorder())
    assert "stopped after step 0 of 8" in said
    assert "it needs a longer train.max_time" in said


def test_a_measurement_of_held_out_rows_is_given_up_for_the_clock(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after all of it: with many rows that would be minutes beyond the limit."""
    clock = Clock()
    monkeypatch.setattr(Stops.__init__, "__defaults__", (None, clock))

    class Passes(Recorder):
        def on_progress(self, event: ProgressEvent) -> None:
            super().on_progress(event)
            if event.doing == "evaluation":
                clock.now += 100.0

    listener = Passes()
    with pytest.raises(Interrupted):
        train(
            tiny_decoder(tiny_llama),
            make_rows(held_out=900),
            make_settings(max_time=50.0),
            RunDirectory(tmp_path / "run"),
            base="a/model",
            listener=listener,
        )
    done = [event.done for event in listener.progress if event.doing == "evaluation"]
    assert len(done) == 1
    assert done[0] < 900
    assert not events_of(tmp_path / "run" / "events.jsonl", "eval")


def test_the_signal_says_what_happens_now(capfd: pytest.CaptureFixture[str]) -> None:
    signals = StopSignals()
    limits = Stops(signals, make_settings(), trained=1000, clock=Clock())
    limits.learn(step(8.0))
    limits.learn(SaveEvent(step=1, checkpoint="step-000001", best=False, seconds=2.0))
    with signals:
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert limits.asked == "SIGHUP"
    said = capfd.readouterr().err
    assert said == "SIGHUP: finishing the step, then saving, about 12 s at most; a second signal stops at once\n"


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
