"""A whole run: what it writes, what it learns, and that an interruption leaves no trace in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier.data.conversation import Source
from luthier.errors import Interrupted, TrainingError, UsageError
from luthier.evaluate.loss import held_out_loss
from luthier.kernels.choose import kernels_for
from luthier.model.adapter import load_adapter
from luthier.model.decoder import Decoder
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.events import EvalEvent, SaveEvent, StepEvent, WarningEvent
from luthier.train.loop import TrainResult, check_resumable, train
from luthier.train.manifest import seal
from tests import tiny
from tests.train.world import (
    Recorder,
    Rows,
    checkpoint,
    events_of,
    make_examples,
    make_rows,
    make_settings,
    tiny_decoder,
    without_clocks,
)

SETTINGS = make_settings(dropout=0.1)


def run_it(
    folder: Path,
    out: Path,
    settings: Settings = SETTINGS,
    *,
    listener: Recorder | None = None,
    rows: Rows | None = None,
    resume: bool = False,
) -> TrainResult:
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.precision]
    return train(
        tiny_decoder(folder, dtype),
        rows or make_rows(),
        settings,
        RunDirectory(out),
        base="a/model",
        listener=listener or Recorder(),
        resume=resume,
    )


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def figures(out: Path) -> list[dict[str, object]]:
    return without_clocks(events_of(out / "events.jsonl", "step", "eval"))


class CrashError(Exception):
    """A process that dies, as far as a test can have it within itself."""


@dataclass
class Dies(Recorder):
    """Ends the run after `at` updates, before anything of that step is written."""

    at: int = 0

    def on_step(self, event: StepEvent) -> None:
        if event.step == self.at:
            raise CrashError


@dataclass
class Signals(Recorder):
    """Sends the process a signal after `at` updates."""

    at: int = 0
    number: signal.Signals = signal.SIGTERM

    def on_step(self, event: StepEvent) -> None:
        super().on_step(event)
        if event.step == self.at:
            signal.raise_signal(self.number)


def test_a_run_writes_what_it_did_and_says_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    listener = Recorder()
    result = run_it(tiny_llama, tmp_path, listener=listener)
    lines = events_of(tmp_path / "events.jsonl")
    assert [(line["event"], line["step"]) for line in lines if line["event"] != "save"] == [
        ("start", 0), ("proof", 0), ("eval", 0), ("step", 1), ("step", 2), ("step", 3), ("eval", 3), ("step", 4),
        ("step", 5), ("step", 6), ("eval", 6), ("step", 7), ("step", 8), ("eval", 8), ("end", 8),
    ]  # fmt: skip
    saves = [line for line in lines if line["event"] == "save"]
    best = {line["step"] for line in lines if line["event"] == "eval" and line["best"]}
    assert [line["step"] for line in saves] == sorted({2, 4, 6, 8} | best)
    assert [line["step"] for line in saves if line["best"]] == sorted(best)
    assert all(line["checkpoint"] == f"step-{line['step']:06d}" for line in saves)
    assert [event.event for event in listener.events] == [line["event"] for line in lines]
    assert listener.closed == 1
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "eval"}
    assert (result.first_eval, result.last_eval) == (losses[0], losses[8])
    assert result.best_eval == min(losses[3], losses[6], losses[8])
    assert result.best_eval == losses[result.best_step]
    steps = [line for line in lines if line["event"] == "step"]
    assert result.tokens == sum(line["tokens"] for line in steps)
    assert [line["epoch"] for line in steps] == [pytest.approx(step * 4 / 11) for step in range(1, 9)]
    assert all(line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"]) for line in steps)
    assert all(0 < line["memory_active_gib"] == line["memory_reserved_gib"] < 64 for line in steps)
    assert steps[0]["learning_rate"] == 0.0
    assert steps[2]["learning_rate"] == SETTINGS.learning_rate
    assert (result.steps, result.adapter, result.adapter_from) == (8, tmp_path / "adapter", "best")


def test_training_lowers_the_loss_and_the_decoder_holds_the_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    decoder, rows = tiny_decoder(tiny_llama), make_rows(train=24)
    decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)  # as the run will, to the last bit
    base = held_out_loss(decoder, rows.eval)
    settings = make_settings(steps=30, eval_every=10, learning_rate=1e-2)
    result = train(decoder, rows, settings, RunDirectory(tmp_path), base="a/model", listener=Recorder())
    assert result.first_eval == base.loss, "B is zero at first: the tuned model is the base"
    assert result.best_eval is not None
    assert result.best_eval < base.loss - 0.5
    assert held_out_loss(decoder, rows.eval).loss == result.best_eval
    assert not decoder.training
    again = tiny_decoder(tiny_llama)
    again.use(decoder.kernels)
    load_adapter(again, result.adapter)
    assert held_out_loss(again, rows.eval).loss == result.best_eval


def test_peft_gives_the_loss_of_our_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    rows = make_rows()
    result = run_it(tiny_llama, tmp_path, rows=rows)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    total, tokens = 0.0, 0
    for row in rows.eval:
        ids, labels = torch.tensor(row.ids[None]).long(), torch.tensor(row.labels[None]).long()
        with torch.no_grad():
            total += float(model.eval()(input_ids=ids, labels=labels).loss) * row.labelled
        tokens += row.labelled
    assert result.best_eval == pytest.approx(total / tokens, rel=1e-5)  # fp32: a hundred roundings of 2^-24


def overfitted(tiny_llama: Path, out: Path) -> TrainResult:
    settings = make_settings(steps=40, learning_rate=2e-2, schedule="constant", eval_every=5, save_every=0)
    return run_it(tiny_llama, out, settings, rows=make_rows(train=3, held_out=4))


def test_the_best_step_is_kept_not_the_last(tiny_llama: Path, tmp_path: Path) -> None:
    result = overfitted(tiny_llama, tmp_path)
    losses = {line["step"]: line["loss"] for line in events_of(tmp_path / "events.jsonl", "eval") if line["step"]}
    assert result.best_step == min(losses, key=losses.__getitem__)
    assert result.best_step < 40, "a run that overfits"
    assert (result.adapter_from, result.adapter_step) == ("best", result.best_step)
    best, last = (checkpoint(tmp_path, name) / "adapter" / "adapter_model.safetensors" for name in ("BEST", "LATEST"))
    assert checkpoint(tmp_path, "BEST").name == f"step-{result.best_step:06d}"
    assert adapter_bytes(tmp_path) == best.read_bytes() != last.read_bytes()
    end = events_of(tmp_path / "events.jsonl", "end")[0]
    assert (end["adapter_from"], end["adapter_step"], end["best_eval"]) == ("best", result.best_step, result.best_eval)


def test_with_nothing_held_out_the_last_step_is_the_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    result = run_it(tiny_llama, tmp_path, rows=make_rows(held_out=0))
    assert (result.first_eval, result.best_eval, result.best_step, result.last_eval) == (None, None, None, None)
    assert (result.adapter_from, result.adapter_step) == ("last", 8)
    assert not (tmp_path / "checkpoints" / "BEST").exists()
    last = checkpoint(tmp_path) / "adapter" / "adapter_model.safetensors"
    assert adapter_bytes(tmp_path) == last.read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run_it(tiny_llama, out)


def assert_same_run(out: Path, result: TrainResult, whole: tuple[Path, TrainResult]) -> None:
    expected_out, expected = whole
    assert adapter_bytes(out) == adapter_bytes(expected_out)
    assert figures(out) == figures(expected_out)
    clockless = {"seconds": 0, "adapter": Path(), "measured": None}
    assert replace(result, **clockless) == replace(expected, **clockless)  # type: ignore[arg-type]
    for name in ("optimizer.safetensors", "rng.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (checkpoint(folder) / name for folder in (out, expected_out))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("at", range(1, 9))
def test_a_run_stopped_by_a_signal_and_resumed_is_the_same_run(
    tiny_llama: Path, tmp_path: Path, whole: tuple[Path, TrainResult], at: int
) -> None:
    listener = Signals(at=at, number=signal.SIGINT if at % 2 else signal.SIGTERM)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"stopped after step {at} of 8") as caught:
        run_it(tiny_llama, tmp_path, listener=listener)
    assert caught.value.exit_code == 75
    assert "--resume" in str(caught.value.remedy)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [event.event for event in listener.events][-2:] == ["save", "interrupt"]
    assert listener.closed == 1
    assert not (tmp_path / "adapter").exists()
    again = Recorder()
    assert_same_run(tmp_path, run_it(tiny_llama, tmp_path, listener=again, resume=True), whole)
    assert again.events[0].step == at, "from the checkpoint, not from the start"


@pytest.mark.parametrize("at", [1, 2, 3, 6, 7, 8])
def test_a_run_that_died_and_is_resumed_is_the_same_run(
    tiny_llama: Path, tmp_path: Path, whole: tuple[Path, TrainResult], at: int
) -> None:
    listener = Dies(at=at)
    with pytest.raises(CrashError):
        run_it(tiny_llama, tmp_path, listener=listener)
    assert listener.closed == 1
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event":"ste')
    assert_same_run(tmp_path, run_it(tiny_llama, tmp_path, resume=True), whole)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw-8bit", "rank": 64, "targets": ("down_proj", "up_proj")},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"checkpointing": 2, "schedule": "linear", "scale": "rslora"},
    ],
    ids=lambda change: "-".join(map(str, change.values()))[:30],
)
def test_every_kind_of_run_resumes_bit_for_bit(tiny_llama: Path, tmp_path: Path, change: dict[str, object]) -> None:
    settings = make_settings(dropout=0.1, **change)
    expected = run_it(tiny_llama, tmp_path / "whole", settings)
    for at in (5, 3):
        out = tmp_path / f"stopped-{at}"
        with pytest.raises(Interrupted):
            run_it(tiny_llama, out, settings, listener=Signals(at=at))
        assert_same_run(out, run_it(tiny_llama, out, settings, resume=True), (tmp_path / "whole", expected))


def test_a_run_may_be_interrupted_many_times(tiny_llama: Path, tmp_path: Path, whole: tuple[Path, TrainResult]) -> None:
    for at in range(1, 9):
        with pytest.raises(Interrupted):
            run_it(tiny_llama, tmp_path, listener=Signals(at=at), resume=at > 1)
    assert_same_run(tmp_path, run_it(tiny_llama, tmp_path, resume=True), whole)


def test_a_kill_between_the_two_renames_loses_nothing(
    tiny_llama: Path, tmp_path: Path, whole: tuple[Path, TrainResult]
) -> None:
    """The checkpoint has its name, and LATEST does not say so yet; an older one is half removed."""
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=4))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "LATEST").write_text("step-000002\n")
    (checkpoints / "step-000002").rename(checkpoints / f".step-000002.{os.getpid()}.gone")
    listener = Recorder()
    assert_same_run(tmp_path, run_it(tiny_llama, tmp_path, listener=listener, resume=True), whole)
    assert listener.events[0].step == 4, "from the checkpoint, not from the start"
    assert not [entry.name for entry in checkpoints.iterdir() if entry.name.startswith(".")]


def test_resuming_a_run_that_has_ended_gives_its_result(
    tiny_llama: Path, tmp_path: Path, whole: tuple[Path, TrainResult]
) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    result = run_it(tiny_llama, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", result, whole)
    assert len(events_of(tmp_path / "run" / "events.jsonl", "end")) == 1


def test_resuming_where_nothing_was_saved_begins(
    tiny_llama: Path, tmp_path: Path, whole: tuple[Path, TrainResult]
) -> None:
    assert_same_run(tmp_path / "new", run_it(tiny_llama, tmp_path / "new", resume=True), whole)


def test_a_used_directory_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        run_it(tiny_llama, tmp_path, listener=Dies(at=1))
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=2))
    with pytest.raises(UsageError, match="the run that was begun is not the one asked for now") as unfinished:
        run_it(tiny_llama, tmp_path, replace(SETTINGS, keep=7))
    assert "--resume" in str(unfinished.value.remedy)
    listener = Recorder()
    run_it(tiny_llama, tmp_path, listener=listener)
    assert listener.events[0].step == 2, "the same run goes on without being told to"
    kept = adapter_bytes(tmp_path)
    with pytest.raises(UsageError, match="already holds a trained run") as finished:
        run_it(tiny_llama, tmp_path)
    assert finished.value.exit_code == 2
    assert adapter_bytes(tmp_path) == kept


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_another_run_is_not_resumed_and_the_differences_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=3))
    before = tree(tmp_path)
    changed = replace(SETTINGS, learning_rate=1e-3, targets=("q_proj",))
    with pytest.raises(UsageError) as settings_changed:
        run_it(tiny_llama, tmp_path, changed, resume=True)
    assert "learning_rate: 0.005 then, 0.001 now" in settings_changed.value.message
    assert "targets: ['q_proj', 'k_proj'" in settings_changed.value.message
    assert "data:" not in settings_changed.value.message
    rows = make_rows()
    rows.eval[0].labels[-1] = -100
    with pytest.raises(UsageError, match="data: the tokens or labels") as data_changed:
        run_it(tiny_llama, tmp_path, rows=rows, resume=True)
    assert "rate" not in data_changed.value.message
    with pytest.raises(UsageError, match="model: a/model then, b/model now"):
        check_resumable(RunDirectory(tmp_path), make_rows(), SETTINGS, "b/model")
    check_resumable(RunDirectory(tmp_path), make_rows(), SETTINGS, "a/model")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"{"),
        ("state.json", b'{"schema": 1}'),
        ("state.json", None),
        ("optimizer.safetensors", b"\x10\x00"),
        ("optimizer.safetensors", None),
        ("rng.safetensors", b""),
        ("adapter/adapter_model.safetensors", b"\xff" * 64),
    ],
)
def test_a_damaged_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=3))
    for step in (2, 3):
        harmed = tmp_path / "checkpoints" / f"step-00000{step}" / name
        harmed.unlink() if content is None else harmed.write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(
        TrainingError, match=f"step-000003 is not whole .{name}: .*\n.*step-000002 is not whole"
    ) as caught:
        run_it(tiny_llama, tmp_path, resume=True)
    assert caught.value.exit_code == 5
    assert caught.value.remedy
    assert tree(tmp_path) == before


def test_a_checkpoint_of_another_schema_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=3))
    folder = checkpoint(tmp_path)
    document = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**document, "schema": 99}))
    seal(folder, "checkpoint", 3)
    with pytest.raises(TrainingError, match="its schema is 99"):
        run_it(tiny_llama, tmp_path, resume=True)


@dataclass
class Poisons(Recorder):
    """Breaks the model's final norm after `at` updates."""

    at: int = 0
    decoder: Decoder | None = None

    def on_step(self, event: StepEvent) -> None:
        super().on_step(event)
        if event.step == self.at and self.decoder is not None:
            with torch.no_grad():
                self.decoder.model.norm.weight[3] = float("nan")


def test_a_loss_that_is_not_finite_ends_the_run_with_what_was_good(tiny_llama: Path, tmp_path: Path) -> None:
    decoder, rows = tiny_decoder(tiny_llama), make_rows()
    listener = Poisons(at=4, decoder=decoder)
    with pytest.raises(TrainingError) as caught:
        train(decoder, rows, SETTINGS, RunDirectory(tmp_path), base="a/model", listener=listener)
    message = caught.value.message
    assert message.startswith("step 5: the loss is not finite; the last checkpoint, of step 4, is whole")
    assert "rows.jsonl:" in message
    assert caught.value.exit_code == 5
    assert listener.closed == 1
    assert not (tmp_path / "adapter").exists()
    assert events_of(tmp_path / "events.jsonl", "step")[-1]["step"] == 4
    # what is on disk is good: with the model sound again, the run goes on to its end
    resumed = run_it(tiny_llama, tmp_path, resume=True)
    expected = run_it(tiny_llama, tmp_path / "whole")
    assert_same_run(tmp_path, resumed, (tmp_path / "whole", expected))


def test_an_evaluation_that_is_not_finite_ends_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    decoder, rows = tiny_decoder(tiny_llama), make_rows()
    listener = Poisons(at=3, decoder=decoder)  # of step 3 there is an evaluation, and no checkpoint
    with pytest.raises(TrainingError, match="step 3: the held-out loss is not finite; the last checkpoint, of step 2"):
        train(decoder, rows, SETTINGS, RunDirectory(tmp_path), base="a/model", listener=listener)
    assert not (tmp_path / "checkpoints" / "BEST").exists()


def test_rows_are_named_by_file_and_line(tiny_llama: Path, tmp_path: Path) -> None:
    rows = make_rows()
    places = tuple(Source("mine.jsonl", 100 + row) for row in range(16))
    decoder = tiny_decoder(tiny_llama)
    with torch.no_grad():
        decoder.model.norm.weight[0] = float("inf")
    with pytest.raises(TrainingError) as caught:
        train(decoder, Rows(rows.train, (), places), SETTINGS, RunDirectory(tmp_path), base="m", listener=Recorder())
    named = caught.value.message.split("the rows of the batch: ")[1].split(", ")
    assert len(named) == 4
    assert all(name.startswith("mine.jsonl:1") for name in named)


def test_fp16_says_when_it_lowers_its_scale(tmp_path: Path) -> None:
    listener = Recorder()
    settings = make_settings(precision="fp16", batch_size=1, micro_batch=1, steps=3)
    rows, short = make_rows(), tuple(make_examples(4, seed=6, shortest=2, longest=2))
    # One label a step, so the last gradient is a row of the head times the scale of 65536; fp16 ends at 65504.
    folder = tiny.make_model(tmp_path / "model", initializer_range=0.5)
    run_it(folder, tmp_path / "run", settings, listener=listener, rows=replace(rows, train=short))
    first, *warnings = [event for event in listener.events if isinstance(event, WarningEvent)]
    assert "not float16 on cpu: torch's are used" in first.message
    steps = [event for event in listener.events if isinstance(event, StepEvent)]
    assert len(steps) == 3
    assert len(warnings) == 1, "the scale that fits is kept"
    assert "fp16 overflow: loss scale halved" in warnings[0].message


def test_saving_and_evaluating_only_at_the_ends(tiny_llama: Path, tmp_path: Path) -> None:
    listener = Recorder()
    run_it(tiny_llama, tmp_path, replace(SETTINGS, eval_every=0, save_every=0), listener=listener)
    assert [event.step for event in listener.events if isinstance(event, EvalEvent)] == [0, 8]
    saves = [(event.checkpoint, event.step, event.best) for event in listener.events if isinstance(event, SaveEvent)]
    assert saves == [("step-000008", 8, True)]
