"""What a plan says of kernels, attention, the allocator and compilation: what is, and what is without it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.cli.allocator import TUNABLES as SET
from luthier.hardware.catalogue import known
from luthier.hardware.device import Device, Installed, KernelSet
from luthier.plan.computing import TUNABLES
from luthier.plan.plan import Plan
from tests.plan.test_choose import FACTS, LLAMA_8B, SPRIG, choose, recipe

CPU = Device("cpu", "a CPU", 16.0, 2, fast=("bf16", "fp32"), installed=Installed(compiled="avx2"))


def planned(device: Device, **train: object) -> Plan:
    return choose(recipe(train=train), device, SPRIG, FACTS)


def test_the_kernels_are_a_decision_and_no_setting() -> None:
    plan = planned(CPU)
    decision = plan.decision("train.kernels")
    assert decision.value == "native, avx2"
    assert "C kernels compiled for avx2" in decision.reason
    assert [line.split(":")[0] for line in decision.rejected] == ["torch", "reference"]
    assert plan.work.kernels == "native"
    assert not hasattr(plan.settings, "kernels")


def test_without_a_compiler_the_plan_says_so() -> None:
    plan = planned(replace(CPU, installed=Installed(compiled=None, reason="the C kernels were not compiled")))
    decision = plan.decision("train.kernels")
    assert decision.value == "torch"
    assert "The C kernels were not compiled: torch's kernels are used" in decision.reason


@pytest.mark.parametrize("wanted", ["torch", "reference"])
def test_what_the_environment_asks_for(wanted: KernelSet) -> None:
    plan = planned(replace(CPU, installed=replace(CPU.installed, wish=wanted)))
    decision = plan.decision("train.kernels")
    assert (decision.value, decision.source, plan.work.kernels) == (wanted, "your environment", wanted)
    assert decision.reason.startswith("As LUTHIER_KERNELS says.")


def test_on_a_card_they_are_of_the_card() -> None:
    plan = choose(recipe(), known("h100"), LLAMA_8B, FACTS)
    assert plan.decision("train.kernels").value == "cuda"
    assert "Triton compiles" in plan.decision("train.compile").reason
    with pytest.raises(KeyError):
        plan.decision("train.allocator")


def test_attention_and_compilation_are_told_as_they_are() -> None:
    assert "C kernel of train.kernels" in planned(CPU).decision("train.attention").reason
    assert "when luthier was installed" in planned(CPU).decision("train.compile").reason
    torch = replace(CPU, installed=replace(CPU.installed, wish="torch"))
    assert "Batched matrix products" in planned(torch).decision("train.attention").reason
    reference = replace(CPU, installed=replace(CPU.installed, wish="reference"))
    assert "torch's flash attention" in planned(reference).decision("train.attention").reason
    assert planned(CPU, attention="math").decision("train.kernels").value == "reference"


def test_the_allocator_s_settings_are_those_that_the_command_makes() -> None:
    assert {f"glibc.malloc.{one}" for one in TUNABLES.split(":")} == set(SET.split(":"))
    assert planned(CPU).decision("train.allocator").value == TUNABLES


def test_your_own_tunables_are_left_and_no_other_libc_is_set() -> None:
    yours = replace(CPU, installed=replace(CPU.installed, tunables="glibc.malloc.arena_max=1"))
    decision = planned(yours).decision("train.allocator")
    assert (decision.value, decision.source) == ("glibc.malloc.arena_max=1", "your environment")
    settled = replace(CPU, installed=replace(CPU.installed, tunables=SET))  # the command, started once more
    assert planned(settled).decision("train.allocator").value == TUNABLES
    with pytest.raises(KeyError):
        planned(replace(CPU, installed=replace(CPU.installed, glibc=False))).decision("train.allocator")
