"""The proof as a user meets it: out of memory before the first step, a smaller plan in plan.json, and resuming it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from luthier.data.batches import Batch
from luthier.model.decoder import Decoder
from luthier.plan import proof as plan_proof
from luthier.train import proof
from luthier.train.step import add_gradient
from tests.cli.command import Command

RECIPE = """\
model: sprig
data: pirate
adapter: {rank: 4, alpha: 8}
train: {steps: 2, batch_size: 8, micro_batch: 8, warmup_steps: 0, checkpointing: false, eval_every: 0, save_every: 1}
"""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory for more than 150 tokens at once."""

    def fails(decoder: Decoder, batch: Batch, weight: float, scaler: GradScaler | None) -> torch.Tensor:
        if batch.tokens > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return add_gradient(decoder, batch, weight, scaler)

    monkeypatch.setattr(proof, "add_gradient", fails)
    monkeypatch.setattr(plan_proof, "is_proved", lambda *_: True)  # the machine of the tests has memory to spare


def stored(run: Path) -> dict[str, object]:
    return cast("dict[str, object]", json.loads((run / "plan.json").read_text()))


@pytest.mark.usefixtures("narrow")
def test_what_fits_stands_in_the_plan_and_is_resumed(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = luthier("train", "recipe.yaml", "--out", "run", "--json")
    assert ended.code == 0, ended.err
    assert "out of memory with micro_batch 8 and 0 of 5 layers recomputed" in ended.message
    plan = stored(tmp_path / "run")
    settings = cast("dict[str, object]", plan["settings"])
    assert (settings["micro_batch"], settings["checkpointing"], settings["batch_size"]) == (2, 5, 8)
    decisions = {one["setting"]: one for one in cast("list[dict[str, object]]", plan["decisions"])}
    for name, value in (("train.micro_batch", 2), ("train.checkpointing", 5)):
        assert decisions[name]["value"] == value
        assert decisions[name]["source"] == "measured on this machine"
        assert str(decisions[name]["reason"]).startswith("Out of memory in the proof with micro_batch 8 and 0 of 5")
    measured = cast("dict[str, object]", plan["measured"])
    assert cast("dict[str, object]", measured["proof"])["micro_batch"] == 2
    assert json.loads(ended.out)["measured"] == measured
    again = luthier("train", "recipe.yaml", "--out", "run", "--resume", "--json")  # the recipe still says 8
    assert again.code == 0, again.err
    resumed = stored(tmp_path / "run")
    assert (resumed["settings"], resumed["measured"]) == (settings, measured)


@pytest.mark.parametrize("ample", [False, True])
def test_a_run_is_held_against_its_plan(
    luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ample: bool
) -> None:
    """With the proof, and without it where memory is ample: then no step waits for it, and the plan says so."""
    monkeypatch.setattr(plan_proof, "AMPLE", 1.0 if ample else 0.0)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = luthier("train", "recipe.yaml", "--out", "run")
    assert ended.code == 0, ended.err
    assert ("the largest micro-batch, " in ended.message) == (not ample)
    assert "memory at most " in ended.message
    plan = stored(tmp_path / "run")
    decisions = {one["setting"]: one for one in cast("list[dict[str, object]]", plan["decisions"])}
    assert decisions["train.proof"]["value"] == ("none" if ample else "the largest micro-batch")
    assert (cast("dict[str, object]", plan["measured"])["proof"] is None) == ample
    measured = cast("dict[str, float]", plan["measured"])
    predicted = cast("dict[str, float]", plan["memory"])["peak_gib"]
    assert 0 < measured["predicted_peak_gib"] <= predicted + 1e-3  # on CUDA without what is not tensors
    assert measured["error_peak_gib"] == pytest.approx(measured["peak_gib"] / measured["predicted_peak_gib"] - 1)
    assert measured["error_step_seconds"] == pytest.approx(
        measured["step_seconds"] / measured["predicted_step_seconds"] - 1
    )
