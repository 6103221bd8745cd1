"""events.jsonl: its fields are a public interface; a resumed run finds in it only what happened before."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from luthier.errors import TrainingError
from luthier.train.events import (
    EndEvent,
    EvalEvent,
    Event,
    EventLog,
    InterruptEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    forget_after,
)


def step_event(step: int, loss: float = 2.5) -> StepEvent:
    return StepEvent(
        step=step,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.7,
        epoch=0.25,
        tokens=321,
        tokens_per_second=1234.5,
        seconds=0.26,
        memory_active_gib=1.5,
        memory_allocated_gib=1.25,
        memory_reserved_gib=2.0,
    )


def eval_event(step: int, loss: float = 2.0) -> EvalEvent:
    return EvalEvent(step=step, loss=loss, perplexity=math.exp(loss), tokens=77, seconds=0.1, best=step > 0)


EVERY: list[Event] = [
    StartEvent(step=0, steps=3, train_rows=9, eval_rows=2, trainable_parameters=100),
    eval_event(0),
    step_event(1),
    WarningEvent(step=1, message="naïve — watch out"),
    SaveEvent(step=1, checkpoint="step-000001", best=False, seconds=0.01),
    InterruptEvent(step=1, signal="SIGTERM"),
    EndEvent(
        step=3,
        seconds=1.0,
        tokens=963,
        first_eval=2.0,
        last_eval=None,
        best_eval=None,
        adapter_from="last",
        adapter_step=3,
    ),
]


def written(path: Path, events: list[Event]) -> list[dict[str, object]]:
    with EventLog.opened(path) as log:
        for event in events:
            log.write(event)
    return read(path)


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_has_the_fields_that_tools_rely_on(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "events.jsonl", [step_event(4)])
    assert list(line) == [
        "event",
        "step",
        "time",
        "loss",
        "learning_rate",
        "grad_norm",
        "epoch",
        "tokens",
        "tokens_per_second",
        "seconds",
        "memory_active_gib",
        "memory_allocated_gib",
        "memory_reserved_gib",
    ]
    assert line["event"] == "step"
    assert line["loss"] == 2.5


def test_every_event_says_what_when_and_at_which_step(tmp_path: Path) -> None:
    lines = written(tmp_path / "events.jsonl", EVERY)
    assert [line["event"] for line in lines] == ["start", "eval", "step", "warning", "save", "interrupt", "end"]
    assert all(isinstance(line["step"], int) and isinstance(line["time"], float) for line in lines)


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with EventLog.opened(path) as log:
        for step in (1, 2, 3):
            log.write(step_event(step))
            assert [line["step"] for line in read(path)] == list(range(1, step + 1))


def test_a_number_json_lacks_is_null(tmp_path: Path) -> None:
    event = EvalEvent(step=0, loss=800.0, perplexity=math.inf, tokens=1, seconds=0.1, best=False)
    (line,) = written(tmp_path / "events.jsonl", [event])
    assert line["perplexity"] is None


def test_resuming_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    written(path, [eval_event(0), step_event(1), step_event(2), eval_event(2), step_event(3), *EVERY[-1:]])
    with path.open("ab") as file:
        file.write(b'{"event":"step","ste')  # what a killed process leaves
    forget_after(path, 2, evaluated=0)
    assert [(line["event"], line["step"]) for line in read(path)] == [("eval", 0), ("step", 1), ("step", 2)]


def test_an_evaluation_the_checkpoint_knows_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    written(path, [eval_event(0), step_event(1), eval_event(1), step_event(2)])
    forget_after(path, 1, evaluated=1)
    assert [(line["event"], line["step"]) for line in read(path)] == [("eval", 0), ("step", 1), ("eval", 1)]


@pytest.mark.parametrize("line", ["not json", '"a string"', '{"event": "step"}', '{"step": 3}'])
def test_a_foreign_line_is_named_not_swallowed(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    written(path, [step_event(1)])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TrainingError, match=r"events\.jsonl:2: not an event"):
        forget_after(path, 1, evaluated=None)


def test_no_log_is_nothing_to_forget(tmp_path: Path) -> None:
    forget_after(tmp_path / "events.jsonl", 0, evaluated=None)
    assert not (tmp_path / "events.jsonl").exists()
