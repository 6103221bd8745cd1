"""The plan after the proof, and what is predicted of a pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.cli.preparing import prepare
from luthier.hardware.device import DeviceKind
from luthier.plan.plan import Plan
from luthier.plan.proof import Adopted, Load, adopt, choose_proof, expect, is_proved
from luthier.plan.speed import predict_speed
from luthier.recipe.load import recipe_from_mapping


@pytest.fixture(scope="module")
def plan() -> Plan:
    return prepare(recipe_from_mapping({"model": "sprig", "data": "pirate", "export": ["gguf"]}), weights=False).plan


@pytest.mark.parametrize(("share", "kind", "due"), [(0.49, "cpu", False), (0.51, "cpu", True), (0.01, "cuda", True)])
def test_a_proof_is_due_unless_a_cpu_has_twice_what_is_needed(
    plan: Plan, share: float, kind: DeviceKind, due: bool
) -> None:
    device = replace(plan.device, kind=kind, memory_gib=plan.memory.peak.gib / share, free_gib=None)
    assert is_proved(device, plan.memory) == due
    assert (choose_proof(device, plan.memory).value == "none") == (not due)


def test_an_adopted_plan_keeps_its_exports_on_disk(plan: Plan) -> None:
    less = replace(plan.settings, micro_batch=1)
    assert adopt(plan, Adopted(less, Load(100, 100, 1), "Out of memory.")).memory.disk == plan.memory.disk


def test_a_pass_has_no_update(plan: Plan) -> None:
    """The proof times forward and backward."""
    load = Load(100, 100, 1)
    work = replace(
        plan.work,
        tokens=100,
        longest=100,
        documents=1,
        recomputed=plan.settings.checkpointing,
        step_tokens=100,
        micro_batches=1,
    )
    speed = predict_speed(work, plan.device)
    update = dict(speed.parts)["optimizer"]
    assert update > 0
    assert expect(plan, plan.settings, load).seconds == pytest.approx(speed.step_seconds - update)
