"""The search: class before time, the fastest within a class, the least recomputation, several devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.errors import UsageError
from luthier.hardware.device import GIB, DeviceKind
from luthier.plan.choose import choose
from luthier.plan.disk import NOTHING_KEPT, Written
from luthier.plan.footprint import Memory
from luthier.plan.memory import predict_memory
from luthier.plan.plan import as_document
from luthier.plan.rows import Lengths
from luthier.plan.search import (
    MARGIN,
    Choice,
    Pinned,
    Task,
    candidate,
    classes,
    leanest,
    micro_batches,
    search,
    shortfalls,
)
from luthier.plan.timing import evaluation_count
from luthier.plan.work import Work
from tests.plan.test_choose import A10G, CPU, H100, LLAMA_8B, LLAMA_70B, LONG, MPS, SPRIG, T4, recipe

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TASK = Task(LLAMA_8B, "bf16", 16, PROJECTIONS, 0.0, 2048, 16, Lengths(((2048, 1000),)), 100, 16 * 2048.0)


def test_heaviest_rows() -> None:
    lengths = Lengths(((10, 2), (20, 1), (50, 1)))
    assert [lengths.heaviest(rows, 99) for rows in range(6)] == [
        0,
        50,
        70,
        80,
        90,
        140,
    ]  # the fifth is the longest again
    assert lengths.heaviest(3, 15) == 15 + 15 + 10
    assert lengths.total(15) == 10 + 10 + 15 + 15
    assert Lengths(()).heaviest(3, 9) == 0


def test_the_work_of_a_micro_batch() -> None:
    rows = Task(SPRIG, "fp32", 8, PROJECTIONS, 0.0, 100, 4, Lengths(((10, 5), (90, 1), (300, 1))), 2, 99.0)
    work = candidate(rows, CPU, Choice("none", "adamw", "none", 2, 0)).work
    assert (work.tokens, work.longest, work.documents, work.micro_batches) == (100, 100, 2, 2), "more is cut once more"
    heavy = replace(rows, step_tokens=4 * 45.0)  # so two may have 108, which are filled up to 128
    work = candidate(heavy, CPU, Choice("none", "adamw", "none", 2, 0)).work
    assert work.tokens == 128, "the two longest would have 190"
    light = replace(heavy, step_tokens=4 * 90.0)  # 216, filled up to 256
    work = candidate(light, CPU, Choice("none", "adamw", "none", 2, 0)).work
    assert work.tokens == 100 + 90, "the two longest are less than there may be"
    assert work.evaluation_tokens == 100 + 90  # both held-out rows go through together
    packs = replace(rows, packed=3.4)
    work = candidate(packs, CPU, Choice("none", "adamw", "none", 2, 0)).work
    assert (work.tokens, work.documents) == (200, 8)
    assert candidate(replace(rows, eval_rows=0), CPU, Choice("none", "adamw", "none", 2, 0)).work.evaluation_tokens == 0
    many = replace(rows, lengths=Lengths(((50, 1000),)), eval_rows=500)
    assert candidate(many, CPU, Choice("none", "adamw", "none", 2, 0)).work.evaluation_tokens == 4096


def test_micro_batches_are_the_divisors() -> None:
    assert micro_batches(TASK, CPU) == (1, 2, 4, 8, 16)
    assert micro_batches(replace(TASK, batch_size=7), CPU) == (1, 7)
    assert micro_batches(replace(TASK, pinned=Pinned(micro_batch=4)), CPU) == (4,)
    four = replace(A10G, count=4, known_as="4xa10g")
    assert micro_batches(TASK, four) == (1, 2, 4)  # of 16 rows, four on each


def test_classes_are_tried_in_order() -> None:
    every = [("none", "adamw"), ("none", "adamw-8bit"), ("nf4", "adamw"), ("nf4", "adamw-8bit")]
    assert list(classes(TASK, A10G)) == every
    assert list(classes(TASK, MPS)) == [("none", "adamw")]
    assert list(classes(replace(TASK, pinned=Pinned(optimizer="paged-adamw-8bit")), A10G)) == [
        ("none", "paged-adamw-8bit"),
        ("nf4", "paged-adamw-8bit"),
    ]


def test_4_bits_only_where_no_16_bit_plan_fits() -> None:
    least = leanest(replace(TASK, pinned=Pinned(quantize="none", optimizer="adamw-8bit")), A10G).memory.peak.gib
    for share, base in ((1.001, "none"), (0.999, "nf4")):
        found = search(TASK, replace(A10G, memory_gib=least * share / (1 - MARGIN)))
        assert found is not None
        assert found.choice.quantize == base


def test_the_fewest_layers_that_fit_are_recomputed() -> None:
    task = replace(TASK, pinned=Pinned(quantize="none", optimizer="adamw", micro_batch=2))
    for memory in (17.6, 17.8, 18, 18.5, 20, 22, 25, 30):
        device = replace(A10G, memory_gib=float(memory))
        found = search(task, device, 0.0)
        depths = [
            depth
            for depth in range(33)
            if candidate(task, device, Choice("none", "adamw", "none", 2, depth)).memory.peak.gib <= memory
        ]
        assert (found.choice.recomputed if found else None) == (min(depths) if depths else None)


def test_what_is_left_free_is_the_margin() -> None:
    for margin in (0.0, 0.08, 0.3):
        plan = choose(recipe(), A10G, LLAMA_8B, LONG, margin=margin)
        assert plan.memory.peak.bytes <= A10G.usable_gib * (1 - margin) * GIB
        assert plan.margin == margin
    with pytest.raises(UsageError, match="a margin of 1 of memory"):
        choose(recipe(), A10G, LLAMA_8B, LONG, margin=1.0)


def test_free_memory_counts_and_not_the_total() -> None:
    half = replace(H100, free_gib=16.0)
    assert choose(recipe(), H100, LLAMA_8B, LONG).settings.quantize == "none"
    plan = choose(recipe(), half, LLAMA_8B, LONG)
    assert plan.settings.quantize == "nf4"
    for setting in ("quantize", "hardware"):
        assert "Other programs hold 63.6 of its 79.6 GiB" in plan.decision(setting).reason


def test_paged_state_only_if_asked() -> None:
    for memory in range(8, 40):
        found = search(TASK, replace(A10G, memory_gib=float(memory)))
        assert found is None or found.choice.optimizer != "paged-adamw-8bit"


def test_several_devices_of_the_catalogue_share_the_work() -> None:
    four = replace(H100, count=4, known_as="4xh100", link=4.5e11)
    plan = choose(recipe(train={"batch_size": 16}), four, LLAMA_8B, LONG)
    assert plan.devices == 4
    assert plan.work.sharding in ("ddp", "fsdp")
    assert plan.work.micro_batches * plan.settings.micro_batch * 4 == 16
    decision = plan.decision("sharding")
    assert decision.value == plan.work.sharding
    assert "this version trains on one" in decision.reason
    assert "idle" not in decision.reason


@pytest.mark.parametrize(
    ("batch", "micro", "said"),
    [(2, 1, "2 of 4 devices stand idle all the time"), (6, 1, "2 of 4 devices stand idle in the last of a step's")],
)
def test_devices_that_stand_idle_are_said(batch: int, micro: int, said: str) -> None:
    four = replace(H100, count=4, known_as="4xh100", link=4.5e11)
    plan = choose(recipe(train={"batch_size": batch, "micro_batch": micro}), four, LLAMA_8B, LONG)
    assert said in plan.decision("sharding").reason
    assert plan.work.batch_tokens == plan.work.step_tokens / batch * micro


def test_of_this_machine_one_device_is_used() -> None:
    plan = choose(recipe(), replace(H100, count=4), LLAMA_8B, LONG)
    assert (plan.devices, plan.work.sharding, plan.decision("sharding").value) == (1, "none", "none")
    with pytest.raises(KeyError):
        choose(recipe(), H100, LLAMA_8B, LONG).decision("sharding")


def test_what_4_bits_would_save_and_cost_is_computed() -> None:
    decision = choose(recipe(), H100, LLAMA_8B, LONG).decision("quantize")
    plain, packed = (
        predict_memory(replace(choose(recipe(), H100, LLAMA_8B, LONG).work, quantize=base), "cuda").peak.bytes
        for base in ("none", "nf4")
    )
    assert f"nf4: would save {(plain - packed) / GIB:.1f} GiB and a step would take " in decision.rejected[0]
    assert "sources conflict" in decision.rejected[0]


def test_what_the_user_set_without_need_is_questioned() -> None:
    asked = recipe(quantize="nf4", train={"checkpointing": True, "optimizer": "adamw-8bit"})
    plan = choose(asked, H100, LLAMA_8B, LONG)
    assert (plan.settings.quantize, plan.settings.checkpointing) == ("nf4", 32)
    assert "bf16 would fit too" in plan.decision("quantize").reason
    assert "left to the plan, none would be, with a micro-batch of" in plan.decision("train.checkpointing").reason
    assert "Exact AdamW would fit too" in plan.decision("train.optimizer").reason
    tight = choose(recipe(quantize="nf4"), T4, LLAMA_8B, LONG)
    assert "would fit too" not in tight.decision("quantize").reason


def test_some_layers_as_the_user_says() -> None:
    plan = choose(recipe(train={"checkpointing": 7}), H100, LLAMA_8B, LONG)
    assert (plan.settings.checkpointing, plan.decision("train.checkpointing").value) == (7, 7)
    assert "7 of 32 layers" in plan.decision("train.checkpointing").reason
    assert choose(recipe(train={"checkpointing": 99}), H100, LLAMA_8B, LONG).settings.checkpointing == 32
    assert choose(recipe(train={"checkpointing": False}), H100, LLAMA_8B, LONG).settings.checkpointing == 0


@pytest.mark.parametrize(("steps", "every", "times"), [(10, 0, 2), (10, 5, 3), (10, 3, 5), (10, 20, 2), (1, 1, 2)])
def test_evaluations_are_counted_as_the_loop_makes_them(steps: int, every: int, times: int) -> None:
    due = [step for step in range(steps + 1) if step in (0, steps) or (every > 0 and step % every == 0)]
    assert evaluation_count(steps, every) == len(due) == times


def test_the_time_of_the_whole_run_and_its_cost() -> None:
    plan = choose(recipe(train={"steps": 50}), H100, LLAMA_8B, LONG)
    got = plan.time
    assert got.training_seconds == pytest.approx(50 * got.step_seconds)
    assert got.total_seconds == pytest.approx(got.training_seconds + got.evaluation_seconds)
    assert got.cost is None
    assert got.priced(3.0).cost == pytest.approx(got.total_seconds / 1200)


def test_the_document_has_memory_and_time() -> None:
    plan = choose(recipe(), H100, LLAMA_8B, LONG)
    document = as_document(plan)
    memory = document["memory"]
    assert isinstance(memory, dict)
    assert memory["peak_bytes"] == max(phase["bytes"] for phase in memory["phases"].values())
    assert memory["peak_bytes"] == sum(part["bytes"] for part in memory["phases"][memory["peak"]]["parts"])
    assert (memory["usable_gib"], memory["margin"]) == (79.6, MARGIN)
    assert isinstance(document["time"], dict)
    assert {"step_seconds", "total_seconds", "tokens_per_second", "source", "cost"} <= set(document["time"])


def test_a_plan_asks_the_memory_model_a_few_hundred_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 layers and a batch with 30 divisors, which tried one by one would be thousands: a plan must answer at once."""
    asked: list[Work] = []

    def counted(work: Work, kind: DeviceKind, written: Written = NOTHING_KEPT) -> Memory:
        asked.append(work)
        return predict_memory(work, kind, written)

    monkeypatch.setattr("luthier.plan.search.predict_memory", counted)
    choose(recipe(train={"batch_size": 720, "epochs": 1}), replace(H100, memory_gib=60.0), LLAMA_70B, LONG)
    assert 0 < len(asked) < 600


@pytest.mark.parametrize("memory", [7.0, 8.5, 12.0, 18.5, 21.0])
def test_the_search_finds_what_trying_everything_finds(memory: float) -> None:
    device = replace(A10G, memory_gib=memory)
    fitting = []
    for base, state in classes(TASK, device):
        every = [
            Choice(base, state, "none", rows, depth) for rows in micro_batches(TASK, device) for depth in range(33)
        ]
        tried = [candidate(TASK, device, one) for one in every]
        fitting = [one for one in tried if not shortfalls(one.memory, device, MARGIN)]
        if fitting:
            break
    fitting.sort(key=lambda one: (one.speed.step_seconds, one.choice.recomputed, -one.choice.micro_batch))
    found = search(TASK, device)
    assert (found and found.choice) == (fitting[0].choice if fitting else None)
