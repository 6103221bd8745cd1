"""A run that has begun keeps the settings that it began with, whatever the machine is like today."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from luthier.cli.pins import SOURCE, pins_of
from luthier.cli.preparing import Prepared, prepare
from luthier.errors import FitError, UsageError
from luthier.hardware.calibrate import estimate_rates
from luthier.hardware.device import Device, Rates
from luthier.plan.plan import as_document
from luthier.plan.proof import Adopted, Load, adopt
from luthier.recipe.load import recipe_from_mapping
from luthier.recipe.schema import Recipe
from luthier.runs import RunDirectory, read_json, write_json
from tests.cli.command import Command

RATES = estimate_rates(Device("cuda", "any", 1.0, 8, (8, 0), ("bf16", "fp16", "fp32")))
"""So that nothing is measured here."""

ROOMY = Device("cpu", "a CPU", 64.0, 8, None, ("bf16", "fp32"), rates=RATES)
CARD = Device("cuda", "a card", 24.0, 8, (8, 6), ("bf16", "fp16", "fp32"), rates=RATES)
OLD_CARD = Device("cuda", "an old card", 15.0, 8, (7, 5), ("fp16", "fp32"), rates=RATES)
MAC = Device("mps", "a Mac", 48.0, 8, None, ("bf16", "fp16", "fp32"), rates=RATES)
TINY = Device("cpu", "a very small CPU", 0.001, 2, None, ("fp32",), rates=RATES)


def recipe(**changes: object) -> Recipe:
    return recipe_from_mapping({"model": "sprig", "data": "pirate", **changes})


def on(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr("luthier.hardware.probe.this_device", lambda folder: device)  # noqa: ARG005


def begun(folder: Path, prepared: Prepared) -> RunDirectory:
    """A run directory as training leaves it."""
    run = RunDirectory(folder)
    write_json(run.plan, as_document(prepared.plan))
    run.adapter.mkdir(parents=True)
    return run


@pytest.mark.parametrize("resume", [True, False])
def test_the_settings_are_those_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    """The recipe leaves everything open, and today's machine would choose another number format."""
    on(monkeypatch, ROOMY)
    first = prepare(recipe())
    run = begun(tmp_path / "run", first)
    on(monkeypatch, replace(ROOMY, fast=("fp32",), free_gib=3.0))
    assert prepare(recipe()).plan.settings.precision == "fp32", "or this test shows nothing"
    again = prepare(recipe(), pins=pins_of(run, resume=resume))
    assert again.plan.settings == first.plan.settings
    assert again.recipe == recipe(), "the run's recipe.yaml goes on to say what the user said"
    assert again.digest == first.digest


def test_the_plan_says_whose_choice_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, ROOMY)
    first = prepare(recipe(seed=3, train={"learning_rate": 1e-3}))
    run = begun(tmp_path / "run", first)
    once = prepare(first.recipe, pins=pins_of(run, resume=True))
    write_json(run.plan, as_document(once.plan))
    twice = prepare(first.recipe, pins=pins_of(run, resume=True))
    assert twice.plan == once.plan, "resuming again says it once"
    for name in ("train.precision", "quantize", "train.micro_batch", "train.steps", "adapter.rank"):
        now, then = once.plan.decision(name), first.plan.decision(name)
        assert (now.value, now.source.split(";")[0]) == (then.value, SOURCE)
        assert now.reason == f"As this run began. {then.reason}"
    for name in ("train.learning_rate", "seed"):
        assert once.plan.decision(name) == first.plan.decision(name), "this one the user has set"


def test_what_is_set_now_is_not_overruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that training can refuse to go on with another run than this was."""
    on(monkeypatch, ROOMY)
    run = begun(tmp_path / "run", prepare(recipe()))
    changed = prepare(recipe(adapter={"rank": 3}, train={"steps": 9}), pins=pins_of(run, resume=True))
    assert (changed.plan.settings.rank, changed.plan.settings.steps) == (3, 9)


def test_what_the_proof_took_back_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe asks for what was out of memory: the run went on with less, of the same mathematics."""
    on(monkeypatch, ROOMY)
    asked = recipe(train={"batch_size": 8, "micro_batch": 8})
    plan = prepare(asked).plan
    less = replace(plan.settings, micro_batch=2, checkpointing=5)
    plan = adopt(plan, Adopted(less, Load(100, 50, 2), "Out of memory with 8."))
    run = RunDirectory(tmp_path / "run")
    write_json(run.plan, as_document(plan))
    run.adapter.mkdir()
    for _ in range(2):
        again = prepare(asked, pins=pins_of(run, resume=True)).plan
        assert again.settings == less
        told = again.decision("train.micro_batch")
        assert (told.value, told.reason) == (2, "As this run began. Out of memory with 8.")
        write_json(run.plan, as_document(again))


def test_a_run_is_not_resumed_on_another_kind_of_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, CARD)
    run = begun(tmp_path / "run", prepare(recipe()))
    on(monkeypatch, ROOMY)
    with pytest.raises(UsageError, match="began on cuda, and this machine has cpu") as caught:
        prepare(recipe(), pins=pins_of(run, resume=True))
    assert caught.value.remedy is not None
    assert "train anew in another directory (--out)" in caught.value.remedy


def test_a_run_is_evaluated_on_another_kind_of_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same rows; what belongs to the device is chosen for it."""
    on(monkeypatch, CARD)
    first = prepare(recipe(), pins=None)
    run = begun(tmp_path / "run", first)
    on(monkeypatch, replace(ROOMY, fast=("fp32",)))
    there = prepare(recipe(), pins=pins_of(run, resume=False))
    assert (there.plan.settings.device, there.plan.settings.precision) == ("cpu", "fp32")
    assert (there.plan.settings.max_length, there.digest) == (first.plan.settings.max_length, first.digest)


@pytest.mark.parametrize("device", [OLD_CARD, ROOMY])
def test_what_only_the_first_machine_had_is_not_needed_to_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    on(monkeypatch, CARD)
    asked = recipe(train={"attention": "flash", "optimizer": "paged-adamw-8bit", "precision": "bf16"})
    first = prepare(asked)
    run = begun(tmp_path / "run", first)
    on(monkeypatch, device)
    there = prepare(asked, pins=pins_of(run, resume=False)).plan
    assert there.settings.attention == ("efficient" if device is OLD_CARD else "flash")
    assert there.settings.max_length == first.plan.settings.max_length


def test_less_memory_today_is_said_and_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, ROOMY)
    first = prepare(recipe(quantize="none"))
    run = begun(tmp_path / "run", first)
    on(monkeypatch, TINY)
    with pytest.raises(FitError):
        prepare(recipe(quantize="none"))
    capfd.readouterr()
    again = prepare(recipe(quantize="none"), pins=pins_of(run, resume=True))
    assert again.plan.settings == first.plan.settings
    assert again.plan.device == TINY
    hardware = again.plan.decision("hardware")
    assert (hardware.value, hardware.reason) == ("a very small CPU", "0.001 GiB, 2 cores, fast in fp32.")
    assert all("e+06" not in one.reason for one in again.plan.decisions)
    assert "began with these settings, so they are kept" in " ".join(capfd.readouterr().err.split())


def test_a_full_disk_and_a_small_host_refuse_nothing_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, CARD)
    first = prepare(recipe())
    run = begun(tmp_path / "run", first)
    full = replace(CARD, disk_gib=0.0, host_gib=0.001, memory_gib=4.0)
    on(monkeypatch, full)
    with pytest.raises(FitError):
        prepare(recipe())
    capfd.readouterr()
    for resume in (True, False):
        again = prepare(recipe(), pins=pins_of(run, resume=resume))
        assert (again.plan.settings, again.plan.device) == (first.plan.settings, full)
        said = " ".join(capfd.readouterr().err.split())
        assert ("careful" in said) is resume, "evaluating writes next to nothing, and fits"


def test_evaluating_where_it_may_not_fit_is_said_and_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, CARD)
    run = begun(tmp_path / "run", prepare(recipe(quantize="none")))
    on(monkeypatch, TINY)
    prepare(recipe(quantize="none"), pins=pins_of(run, resume=False))
    said = " ".join(capfd.readouterr().err.split())
    assert "careful: evaluating needs " in said
    assert "a very small CPU has 0.001 GiB for it. It is tried." in said


def test_a_base_in_nf4_is_evaluated_where_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, CARD)
    run = begun(tmp_path / "run", prepare(recipe(quantize="nf4")))
    on(monkeypatch, MAC)
    for asked in (recipe(), recipe(quantize="nf4")):
        with pytest.raises(UsageError, match="is held in nf4, which this machine's mps cannot do") as caught:
            prepare(asked, pins=pins_of(run, resume=False))
        assert caught.value.remedy == "evaluate it on a machine with cpu or cuda"


def test_more_layers_recomputed_than_there_are_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, ROOMY)
    asked = recipe(train={"checkpointing": 99})
    first = prepare(asked)
    assert first.plan.settings.checkpointing < 99
    run = begun(tmp_path / "run", first)
    on(monkeypatch, replace(ROOMY, fast=("fp32",)))
    assert prepare(asked, pins=pins_of(run, resume=True)).plan.settings == first.plan.settings


def test_a_checkpoint_that_a_kill_left_unnamed_pins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is whole, and LATEST does not name it yet; before that it is none."""
    on(monkeypatch, ROOMY)
    run = RunDirectory(tmp_path / "run")
    write_json(run.plan, as_document(prepare(recipe()).plan))
    assert pins_of(run, resume=True) is None
    beside = run.checkpoints / ".step-000002.4711.tmp"
    beside.mkdir(parents=True)
    assert pins_of(run, resume=True) is None
    beside.rename(run.checkpoints / "step-000002")
    assert pins_of(run, resume=True) is not None


def test_the_disk_is_that_of_the_run_directory(
    luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []

    def device(folder: Path | None = None) -> Device:
        asked.append(folder)
        raise UsageError("that is all", "nothing")

    (tmp_path / "recipe.yaml").write_text("model: sprig\ndata: pirate\n")
    monkeypatch.setattr("luthier.hardware.probe.this_device", device)
    for words in (("train", "recipe.yaml"), ("run", "recipe.yaml"), ("demo",)):
        assert luthier(*words, "--out", tmp_path / "other" / "disk").code == 2
    assert luthier("plan", "recipe.yaml").code == 2
    assert asked == [tmp_path / "other" / "disk"] * 3 + [None]


def test_no_first_step_waits_for_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(*_: object) -> Rates:
        raise AssertionError("measured before the run")

    monkeypatch.setattr("luthier.hardware.calibrate.calibrate", calibrate)
    on(monkeypatch, replace(ROOMY, rates=None))
    assert "estimated" in prepare(recipe()).plan.time.source


@pytest.mark.parametrize(("least", "measured"), [(0.0, 1), (3600.0, 0)])
def test_a_machine_is_measured_after_its_first_long_run(
    least: float, measured: int, luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("luthier.cli.stages._WORTH_MEASURING", least)
    (tmp_path / "recipe.yaml").write_text("model: sprig\ndata: pirate\ntrain: {steps: 1, warmup_steps: 0}\n")
    ended = luthier("train", "recipe.yaml", "--out", "run")
    assert ended.code == 0, ended.err
    assert "estimated" in read_json(tmp_path / "run" / "plan.json")["time"]["source"]
    assert len(list((tmp_path / "cache").glob("rates/*"))) == measured
    assert ("measuring this machine's speed for the next plan" in ended.err) == bool(measured)


def test_a_run_is_whole_where_the_measurement_has_no_place(
    luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(*_: object, **__: object) -> Rates:
        raise UsageError("the measured rates cannot be kept", "another folder")

    monkeypatch.setattr("luthier.hardware.calibrate.calibrate", calibrate)
    monkeypatch.setattr("luthier.hardware.calibrate.stored_rates", lambda _: None)
    monkeypatch.setattr("luthier.cli.stages._WORTH_MEASURING", 0.0)
    (tmp_path / "recipe.yaml").write_text("model: sprig\ndata: pirate\ntrain: {steps: 1, warmup_steps: 0}\n")
    ended = luthier("train", "recipe.yaml", "--out", "run")
    assert ended.code == 0, ended.err
    assert "the measured rates cannot be kept" in ended.err
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_plan_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, ROOMY)
    run = begun(tmp_path / "run", prepare(recipe()))
    whole = as_document(prepare(recipe()).plan)
    for broken, said in (({**whole, "settings": {}}, "settings.rank: Field required"), (["no"], "the file: ")):
        write_json(run.plan, broken)
        with pytest.raises(UsageError, match="not a plan that this version of luthier wrote") as caught:
            pins_of(run, resume=True)
        assert said in caught.value.message
        assert caught.value.exit_code == 2


def test_nothing_is_pinned_where_nothing_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, ROOMY)
    run = RunDirectory(tmp_path / "run")
    assert pins_of(run, resume=True) is None
    write_json(run.plan, as_document(prepare(recipe()).plan))
    assert pins_of(run, resume=True) is None, "a plan alone: stopped before the first checkpoint"
    (run.checkpoints / "step-000002").mkdir(parents=True)
    assert pins_of(run, resume=True) is not None
