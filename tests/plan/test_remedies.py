"""When nothing fits: what is needed against what there is, and the nearest changes, each of which really fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from luthier.errors import FitError
from luthier.hardware.catalogue import known
from luthier.hardware.device import GIB, Device
from luthier.model.config import ModelConfig
from luthier.plan.choose import DataFacts, choose
from luthier.plan.remedies import remedies
from luthier.plan.rows import Lengths
from luthier.plan.search import MARGIN, Pinned, leanest, search
from luthier.plan.show import amount
from luthier.recipe.schema import Recipe
from tests.plan.test_choose import A10G, FACTS, H100, LLAMA_8B, LLAMA_70B, LONG, MPS, T4, recipe
from tests.plan.test_search import PROJECTIONS, TASK


def refused(asked: Recipe, device: Device, config: ModelConfig, facts: DataFacts = LONG) -> FitError:
    with pytest.raises(FitError) as caught:
        choose(asked, device, config, facts)
    assert caught.value.exit_code == 4
    assert caught.value.remedy
    return caught.value


def test_70b_on_one_24_gb_card_is_refused_with_what_would_fit() -> None:
    error = refused(recipe(), A10G, LLAMA_70B)
    assert re.search(r"needs at least \d\d\.\d GiB, and A10G has 20\.7 GiB for it \(22\.5 GiB, of which 8% stay free\)",
                     error.message)  # fmt: skip
    assert "weights 36." in error.message
    remedy = str(error.remedy)
    names = re.findall(r"--hardware ([\w.-]+)", remedy)
    assert names
    for name in names:
        assert choose(recipe(), known(name), LLAMA_70B, LONG).memory.peak.gib < known(name).memory_gib
    assert "planned only: this version trains on one device" in remedy
    assert remedy.endswith("or a smaller model of the same family")


@pytest.mark.parametrize(
    ("asked", "change"),
    [
        ({"quantize": "none"}, "quantize: nf4"),
        ({"quantize": "nf4", "train": {"checkpointing": False}}, "train.checkpointing: auto"),
        ({"quantize": "nf4", "train": {"micro_batch": 16, "batch_size": 16}}, "train.micro_batch: "),
    ],
)
def test_what_the_user_pinned_is_named_first(asked: dict[str, object], change: str) -> None:
    error = refused(recipe(**asked), replace(T4, memory_gib=10.0), LLAMA_8B)
    first = str(error.remedy).splitlines()[1].strip()
    assert first.startswith(change)


def test_eight_bit_state_where_exact_was_asked_for() -> None:
    task = replace(TASK, rank=256, pinned=Pinned(quantize="nf4", optimizer="adamw"))
    device = replace(A10G, memory_gib=(leanest(task, A10G).memory.peak.gib - 1) / (1 - MARGIN))
    changes = [one.change for one in remedies(recipe(), task, device, MARGIN)]
    assert changes[0] == "train.optimizer: adamw-8bit"


def test_two_pins_that_only_fit_together() -> None:
    """Neither 4 bits nor recomputation is enough alone."""
    asked = recipe(quantize="none", train={"checkpointing": False, "micro_batch": 2, "batch_size": 16})
    error = refused(asked, replace(T4, memory_gib=8.5), LLAMA_8B)
    assert re.search(r"train.checkpointing: auto with .*quantize: nf4 \(needs", str(error.remedy))


def test_shorter_rows_and_a_smaller_rank_are_computed() -> None:
    task = replace(TASK, rank=64, max_length=16384, lengths=Lengths(((16384, 100),)), pinned=Pinned(micro_batch=1))
    device = replace(A10G, memory_gib=9.5)
    found = remedies(recipe(), task, device, MARGIN)
    shorter = next(one for one in found if one.change.startswith("train.max_length"))
    match = re.match(r"train.max_length: (\d+) \(100 of 100 rows are longer; needs", str(shorter))
    assert match is not None
    most = int(match[1])
    assert search(replace(task, max_length=most), device) is not None
    assert search(replace(task, max_length=most + 64), device) is None


def test_every_remedy_fits() -> None:
    for memory in (4.0, 6.0, 8.0, 12.0):
        for pinned in (Pinned(), Pinned(quantize="none"), Pinned("none", "adamw", 8, 0)):
            task, device = replace(TASK, pinned=pinned), replace(A10G, memory_gib=memory)
            if search(task, device) is not None:
                continue
            for one in remedies(recipe(), task, device, MARGIN):
                at = re.search(r"--hardware ([\w.-]+)", one.change)
                room = (known(at[1]) if at else device).usable_gib * (1 - MARGIN)
                assert one.found.memory.peak.gib <= room
                assert f"needs {amount(one.found.memory.peak.bytes)}" in str(one)


def test_memory_that_others_hold_is_to_be_freed_first() -> None:
    error = refused(recipe(quantize="none"), replace(H100, free_gib=10.0), LLAMA_8B)
    assert "Another process holds 69.6 of its 79.6 GiB" in error.message
    first = str(error.remedy).splitlines()[1].strip()
    match = re.match(r"free ([\d.]+) GiB of H100 \(other processes hold it; needs", first)
    assert match is not None
    assert choose(recipe(quantize="none"), replace(H100, free_gib=10.1 + float(match[1])), LLAMA_8B, LONG)
    assert "free " not in str(refused(recipe(quantize="none"), replace(H100, free_gib=10.0), LLAMA_70B).remedy)


def test_4_bits_are_not_advised_where_they_do_not_run() -> None:
    assert "nf4" not in str(refused(recipe(quantize="none"), replace(MPS, memory_gib=8.0), LLAMA_8B).remedy)


def test_no_space_on_the_disk() -> None:
    error = refused(recipe(), replace(H100, disk_gib=0.0), LLAMA_8B, FACTS)
    assert error.message.startswith("the disk is too small: ")
    assert error.message.endswith(" and nothing is free")
    need = choose(recipe(), H100, LLAMA_8B, FACTS).memory.disk
    assert need.bytes > 0
    assert str(error.remedy).startswith("free ")
    assert "--out" in str(error.remedy)
    enough = replace(H100, disk_gib=need.bytes / GIB)
    assert choose(recipe(), enough, LLAMA_8B, FACTS).memory.disk == need
    some = refused(recipe(), replace(H100, disk_gib=5.0), LLAMA_8B, FACTS)
    assert "export: [] (without exports " in str(some.remedy)
    assert choose(recipe(export=[]), replace(H100, disk_gib=5.0), LLAMA_8B, FACTS).memory.disk.gib < 5


def test_a_host_without_memory() -> None:
    need = choose(recipe(), H100, LLAMA_8B, FACTS).memory.host
    assert need.bytes > 0
    error = refused(recipe(), replace(H100, host_gib=0.5 * need.gib), LLAMA_8B, FACTS)
    assert error.message.startswith("it does not fit the host's memory: ")


@pytest.mark.parametrize(
    ("name", "config", "asked"),
    [
        ("t4", LLAMA_8B, {"quantize": "nf4", "train": {"batch_size": 2, "micro_batch": 2, "checkpointing": True}}),
        ("m4-max-64g", LLAMA_8B, {"train": {"batch_size": 8}}),
        ("4xa100-40g", LLAMA_8B, {"adapter": {"rank": 64}, "quantize": "none"}),
        ("4xa100-40g", LLAMA_70B, {"quantize": "nf4"}),
    ],
)
def test_settings_that_people_use_fit(name: str, config: ModelConfig, asked: dict[str, object]) -> None:
    plan = choose(recipe(**asked), known(name), config, LONG)
    if name == "t4":
        assert (plan.settings.precision, plan.settings.micro_batch, plan.work.tokens) == ("fp16", 2, 4096)
    if name == "m4-max-64g":
        assert (plan.settings.quantize, plan.settings.device) == ("none", "mps")
    if config is LLAMA_70B:
        assert plan.work.sharding == "fsdp"
    assert plan.device.known_as == name
    assert plan.settings.targets == PROJECTIONS
