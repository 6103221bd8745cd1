"""When nothing fits: what is needed against what there is, and the nearest changes, each of which really fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from luthier.errors import FitError
from luthier.hardware.catalogue import known
from luthier.hardware.device import GIB, Device
from luthier.model.config import ModelConfig
from luthier.plan.choose import DataFacts, choose
from luthier.plan.remedies import remedies
from luthier.plan.rows import Lengths
from luthier.plan.search import MARGIN, Pinned, Task, leanest, search
from luthier.plan.show import amount, duration
from luthier.recipe.load import recipe_from_mapping
from luthier.recipe.schema import Recipe
from tests.plan.test_choose import A10G, CPU_BF16, FACTS, H100, LLAMA_8B, LLAMA_70B, LONG, MPS, T4, facts_of, recipe
from tests.plan.test_search import PROJECTIONS, TASK


def refused(asked: Recipe, device: Device, config: ModelConfig, facts: DataFacts = LONG) -> FitError:
    with pytest.raises(FitError) as caught:
        choose(asked, device, config, facts)
    assert caught.value.exit_code == 4
    assert caught.value.remedy
    return caught.value


def cut(task: Task) -> Callable[[int], Task]:
    return lambda tokens: replace(task, max_length=tokens)


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
    changes = [one.change for one in remedies(recipe(), task, device, MARGIN, cut(task))]
    assert changes[0] == "train.optimizer: adamw-8bit"


def test_two_pins_that_only_fit_together() -> None:
    """Neither 4 bits nor recomputation is enough alone."""
    asked = recipe(quantize="none", train={"checkpointing": False, "micro_batch": 2, "batch_size": 16})
    error = refused(asked, replace(T4, memory_gib=8.5), LLAMA_8B)
    assert re.search(r"train.checkpointing: auto with .*quantize: nf4 \(needs", str(error.remedy))


def test_a_shorter_length_is_planned_as_a_recipe_with_it_would_be() -> None:
    """Its own labelled share, tokens a step, and packs."""
    values, device = REFUSED["long rows"]
    long = facts_of(1000, 10, 16384, 2_000_000)
    remedy = str(refused(recipe(**values), device, LLAMA_8B, long).remedy)
    match = re.search(r"train.max_length: (\d+) \(.*, (\S+ \w+) a step\)", remedy)
    assert match is not None
    train = {"optimizer": "adamw-8bit", **LEAN, "max_length": int(match[1])}
    plan = choose(recipe(quantize="nf4", train=train), device, LLAMA_8B, long)
    assert duration(plan.time.step_seconds) == match[2]


def test_shorter_rows_and_a_smaller_rank_are_computed() -> None:
    task = replace(TASK, rank=64, max_length=16384, lengths=Lengths(((16384, 100),)), pinned=Pinned(micro_batch=1))
    device = replace(A10G, memory_gib=9.5)
    found = remedies(recipe(), task, device, MARGIN, cut(task))
    shorter = next(one for one in found if one.change.startswith("train.max_length"))
    match = re.match(r"train.max_length: (\d+) \(100 of 100 rows are longer; needs", str(shorter))
    assert match is not None
    most = int(match[1])
    assert search(replace(task, max_length=most), device) is not None
    assert search(replace(task, max_length=most + 64), device) is None


def changed(asked: Recipe, device: Device, change: str) -> tuple[Recipe, Device]:
    """The recipe and the machine with a change made, as it is printed."""
    if match := re.match(r"free ([\d.]+) GiB of ", change):
        return asked, replace(device, free_gib=device.usable_gib + float(match[1]))
    if match := re.search(r", such as ([\w.-]+)$", change):
        return asked, known(match[1])
    pairs = [one.split(": ") for one in change.split(" with ")]
    assert all(len(pair) == 2 for pair in pairs), change
    document = asked.model_dump(exclude_unset=True)
    for path, value in pairs:
        *folders, name = path.split(".")
        place = document
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = int(value) if value.isdecimal() else value
    return recipe_from_mapping(document), device


LEAN = {"checkpointing": True, "micro_batch": 1}
REFUSED: dict[str, tuple[dict[str, object], Device]] = {
    "nothing pinned": ({}, replace(A10G, memory_gib=6.0)),
    "16 bits": ({"quantize": "none"}, replace(A10G, memory_gib=12.0)),
    "exact state": ({"adapter": {"rank": 256}, "train": {"optimizer": "adamw"}}, replace(A10G, memory_gib=11.0)),
    "two pins": (
        {"quantize": "none", "train": {"checkpointing": False, "micro_batch": 8}},
        replace(T4, memory_gib=9.0),
    ),
    "old attention": ({"quantize": "nf4", "train": {"attention": "math", "checkpointing": False}}, A10G),
    "fp32": ({"quantize": "none", "train": {"precision": "fp32"}}, A10G),
    "held": ({"quantize": "nf4"}, replace(A10G, free_gib=5.0)),
    "held memory": ({"quantize": "none", "train": LEAN}, replace(CPU_BF16, free_gib=5.0)),
    "long rows": ({"quantize": "nf4", "train": {"optimizer": "adamw-8bit", **LEAN}}, replace(A10G, memory_gib=9.0)),
    "wide": ({"adapter": {"rank": 512}, "train": {"optimizer": "adamw-8bit"}}, replace(A10G, memory_gib=9.0)),
    "disk too": ({"quantize": "none"}, replace(A10G, memory_gib=12.0, disk_gib=0.1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_remedy_fits_when_it_is_done(case: str) -> None:
    """The change, as printed, in the recipe or on the machine: then there is a plan, of the memory that was said."""
    values, device = REFUSED[case]
    facts = facts_of(1000, 10, 16384, 2_000_000) if case == "long rows" else LONG
    asked = recipe_from_mapping({"model": "sprig", "data": "pirate", **values})
    remedy = str(refused(asked, device, LLAMA_8B, facts).remedy)
    listed = re.findall(r"^    (.+?) \((.*)needs ([\d.]+ \w+), ", remedy, re.MULTILINE)
    assert listed
    if disk := re.search(r"for the disk: free ([\d.]+) GiB", remedy):
        assert device.disk_gib is not None
        device = replace(device, disk_gib=device.disk_gib + float(disk[1]))
    for change, _, needs in listed:
        plan = choose(*changed(asked, device, change), LLAMA_8B, facts)
        if not change.startswith("free "):  # which leaves room for a little more, rounded up as it is
            assert amount(plan.memory.peak.bytes) == needs
        assert plan.memory.peak.gib <= plan.device.usable_gib * (1 - MARGIN)


def test_what_the_disk_lacks_is_said_beside_the_rest() -> None:
    error = refused(recipe(quantize="none"), REFUSED["disk too"][1], LLAMA_8B)
    assert "the disk is too small" in error.message
    assert "quantize: nf4 (" in str(error.remedy)
    assert "\n  and for the disk: free " in str(error.remedy)


def test_math_is_among_what_may_be_left_open() -> None:
    values, device = REFUSED["old attention"]
    assert "train.attention: auto" in str(refused(recipe(**values), device, LLAMA_8B).remedy)


def test_rows_are_not_cut_where_long_ones_are_errors() -> None:
    asked = {"quantize": "nf4", "train": {"optimizer": "adamw-8bit", **LEAN}}
    device, long = replace(A10G, memory_gib=9.0), facts_of(1000, 10, 16384, 2_000_000)
    assert "train.max_length: " in str(refused(recipe(**asked), device, LLAMA_8B, long).remedy)
    assert "train.max_length" not in str(refused(recipe(**asked, long_rows="error"), device, LLAMA_8B, long).remedy)


def test_memory_of_a_cpu_is_called_memory() -> None:
    values, device = REFUSED["held memory"]
    error = refused(recipe(**values), device, LLAMA_8B)
    assert "Other programs hold 59 of its 64 GiB" in error.message
    assert re.search(r"free [\d.]+ GiB of memory \(other programs hold it; ", str(error.remedy))


def test_memory_that_others_hold_is_to_be_freed_first() -> None:
    error = refused(recipe(quantize="none"), replace(H100, free_gib=10.0), LLAMA_8B)
    assert "Other programs hold 69.6 of its 79.6 GiB" in error.message
    first = str(error.remedy).splitlines()[1].strip()
    match = re.match(r"free ([\d.]+) GiB of H100 \(other programs hold it; needs", first)
    assert match is not None
    assert choose(recipe(quantize="none"), replace(H100, free_gib=10.0 + float(match[1])), LLAMA_8B, LONG)
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
    if "rank" in dict(recipe(**asked).adapter.model_dump(exclude_unset=True)):
        assert (plan.settings.rank, plan.settings.quantize, plan.devices) == (64, "none", 4)
        assert plan.work.sharding == plan.decision("sharding").value == "fsdp"
    if name == "m4-max-64g":
        assert (plan.settings.quantize, plan.settings.device) == ("none", "mps")
    if config is LLAMA_70B:
        assert plan.work.sharding == "fsdp"
    assert plan.device.known_as == name
    assert plan.settings.targets == PROJECTIONS
