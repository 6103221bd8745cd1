"""Every `auto` resolved by its stated rule; what the user set is kept; what cannot fit is refused with its numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data.batches import Batches
from luthier.data.conversation import Example
from luthier.errors import DataError, FitError, UsageError
from luthier.hardware.device import Device
from luthier.hardware.probe import this_device
from luthier.model.config import PROJECTIONS, ModelConfig, parameters, projection_shapes, read_config
from luthier.plan.choose import DataFacts, Epoch, Lengths, choose
from luthier.plan.decision import YOURS
from luthier.plan.explain import memory_lines, plan_table, time_lines
from luthier.plan.plan import Plan, as_document
from luthier.plan.support import OPTIMIZER_DEVICES
from luthier.recipe.load import load_recipe, recipe_from_mapping
from luthier.recipe.schema import Recipe

SPRIG = ModelConfig("llama", 4096, 256, 688, 6, 8, 2, 32, tied=True, max_positions=2048)
LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, max_positions=131072)
LLAMA_70B = ModelConfig("llama", 128256, 8192, 28672, 80, 64, 8, 128, max_positions=131072)
FAR = ModelConfig("llama", 4096, 256, 688, 6, 8, 2, 32, tied=True, max_positions=131072)
CPU = Device("cpu", "a CPU", 16.0, 2, None, ("fp32",))
CPU_BF16 = Device("cpu", "a newer CPU", 64.0, 8, None, ("bf16", "fp32"))
T4 = Device("cuda", "T4", 14.6, 8, (7, 5), ("fp16", "fp32"))
A10G = Device("cuda", "A10G", 22.5, 8, (8, 6), ("bf16", "fp16", "fp32"))
H100 = Device("cuda", "H100", 79.6, 26, (9, 0), ("bf16", "fp16", "fp32"))
MPS = Device("mps", "Apple GPU", 48.0, 12, None, ("bf16", "fp16", "fp32"))
DEVICES = (CPU, CPU_BF16, T4, A10G, H100, MPS)


def facts_of(train_rows: int, eval_rows: int, longest: int, labelled_tokens: int) -> DataFacts:
    """Rows that are all equally long."""

    def epoch(_: int, packing: bool) -> Epoch:
        assert not packing
        return Epoch(train_rows, train_rows * longest)

    lengths = Lengths(((longest, train_rows + eval_rows),))
    return DataFacts(train_rows, eval_rows, lengths, labelled_tokens, epoch)


FACTS = facts_of(train_rows=803, eval_rows=101, longest=71, labelled_tokens=16_001)


def recipe(**values: object) -> Recipe:
    return recipe_from_mapping({"model": "sprig", "data": "pirate", **values})


def test_sprig_on_a_plain_cpu() -> None:
    plan = choose(recipe(), CPU, SPRIG, FACTS)
    got = plan.settings
    assert (got.precision, got.quantize, got.device, got.optimizer, got.checkpointing) == (
        "fp32",
        "none",
        "cpu",
        "adamw",
        0,
    )
    assert (got.batch_size, got.micro_batch, got.max_length) == (8, 8, 71)
    assert got.steps == math.ceil(3 * 803 / 8)
    assert got.warmup_steps == round(0.03 * got.steps)
    assert got.learning_rate == 1e-3  # the formula gives 2.5e-3, capped
    assert "0.0025" in plan.decision("train.learning_rate").reason


def test_published_parameter_counts_of_8b() -> None:
    """Rank 16 all-linear and rank 8 attention, as PEFT prints them; and 4-bit weights of about 5.5 GB."""
    all_linear = choose(recipe(adapter={"rank": 16}), H100, LLAMA_8B, FACTS)
    attention = choose(recipe(adapter={"rank": 8, "targets": "attention"}), H100, LLAMA_8B, FACTS)
    assert all_linear.trainable_parameters == 41_943_040
    assert all_linear.total_parameters == 8_072_204_288
    assert attention.trainable_parameters == 6_815_744
    assert attention.settings.targets == ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("config", "rate"),
    [(ModelConfig("llama", 9, 2048, 9, 1, 1, 1, 2), 4.9e-4), (LLAMA_8B, 2.9e-4), (LLAMA_70B, 1.7e-4)],
)
def test_learning_rate_is_the_published_formula(config: ModelConfig, rate: float) -> None:
    asked = recipe(quantize="nf4")
    assert choose(asked, H100, config, FACTS).settings.learning_rate == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    ("device", "precision"), [(CPU, "fp32"), (CPU_BF16, "bf16"), (T4, "fp16"), (A10G, "bf16"), (MPS, "bf16")]
)
def test_precision_follows_the_hardware(device: Device, precision: str) -> None:
    assert choose(recipe(), device, SPRIG, FACTS).settings.precision == precision


LONG = facts_of(train_rows=8000, eval_rows=100, longest=2048, labelled_tokens=2_000_000)


def test_8b_is_quantised_only_where_it_must_be() -> None:
    on_t4, on_h100 = (choose(recipe(), device, LLAMA_8B, LONG).settings for device in (T4, H100))
    assert (on_t4.quantize, on_t4.precision, on_t4.attention) == ("nf4", "fp16", "efficient")
    assert 0 < on_t4.checkpointing <= 32
    assert (on_h100.quantize, on_h100.precision, on_h100.attention) == ("none", "bf16", "flash")
    assert choose(recipe(), H100, LLAMA_8B, FACTS).settings.checkpointing == 0


@pytest.mark.parametrize(("tokens", "rank"), [(1, 8), (7680, 8), (7681, 16), (15361, 32), (30721, 32), (10**9, 32)])
def test_rank_by_capacity(tokens: int, rank: int) -> None:
    """960 parameters a rank (four squares of 100 + 100, and 60 + 100 of down_proj); 64 is beyond its 60."""
    config = ModelConfig("llama", 50, 100, 60, 1, 10, 10, 10)
    asked = recipe(adapter={"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]})
    assert choose(asked, CPU, config, facts_of(10, 1, 9, tokens)).settings.rank == rank


def test_alpha_and_its_scale() -> None:
    rslora = choose(recipe(adapter={"scale": "rslora", "rank": 16}), CPU, SPRIG, FACTS).settings
    standard = choose(recipe(adapter={"rank": 16}), CPU, SPRIG, FACTS).settings
    assert rslora.alpha / math.sqrt(rslora.rank) == standard.alpha / standard.rank == 2.0


@pytest.mark.parametrize(("device", "batch"), [(CPU, 12), (H100, 12), (T4, 7), (A10G, 32)])
def test_micro_batch_divides_the_batch_and_fits(device: Device, batch: int) -> None:
    long = facts_of(803, 101, 1500, 16_001)
    plan = choose(recipe(train={"batch_size": batch}), device, LLAMA_8B if device in (H100, T4) else SPRIG, long)
    got = plan.settings
    assert batch % got.micro_batch == 0
    assert plan.work.tokens == got.micro_batch * 1500
    assert plan.work.micro_batches * got.micro_batch == batch
    assert plan.memory.peak.gib <= device.usable_gib * (1 - plan.margin)


def test_steps_of_epochs() -> None:
    facts = facts_of(100, 10, 50, 1000)
    assert choose(recipe(train={"epochs": 2, "batch_size": 7}), CPU, SPRIG, facts).settings.steps == 29  # 200 / 7
    assert choose(recipe(train={"epochs": 1.5, "batch_size": 7}), CPU, SPRIG, facts).settings.steps == 22  # 150 / 7
    assert (
        choose(recipe(train={"epochs": 0.1, "batch_size": 3}), CPU, SPRIG, facts_of(30, 3, 50, 9)).settings.steps == 1
    )
    assert choose(recipe(train={"epochs": 0.001}), CPU, SPRIG, facts).settings.steps == 1
    few = choose(recipe(), CPU, SPRIG, facts_of(56, 6, 50, 1000))  # 7 steps an epoch: as many epochs as are sensible
    assert few.settings.steps == 70
    assert choose(recipe(), CPU, SPRIG, facts_of(60_000, 6, 50, 1000)).settings.steps == 1875  # one epoch of 32 rows


def examples(rows: int) -> list[Example]:
    return [Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32), row) for row in range(rows)]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([0.25, 1, 1.5, 3, 7]))
@example(5, 32, 3)
@example(9, 8, 3)
def test_the_run_ends_within_a_batch_of_the_epochs_asked_for(rows: int, batch_size: int, epochs: float) -> None:
    """By the stream of rows itself: at least the epochs asked for, and not a whole batch more."""
    plan = choose(recipe(train={"epochs": epochs, "batch_size": batch_size}), CPU, SPRIG, facts_of(rows, 1, 9, 99))
    stream = Batches(examples(rows), batch_size, plan.settings.micro_batch, seed=0)
    seen = [row for step in range(plan.settings.steps) for row in stream.indices(step)]
    assert stream.epoch(plan.settings.steps) == len(seen) / rows
    assert epochs * rows <= len(seen) < epochs * rows + batch_size
    asked_more = len(seen) > epochs * rows
    assert ("filled up from the epoch after" in plan.decision("train.steps").reason) == asked_more


def test_few_rows_are_planned_as_they_are_batched() -> None:
    facts = facts_of(5, 1, 50, 100)
    auto = choose(recipe(), CPU, SPRIG, facts)
    assert (auto.settings.batch_size, auto.settings.steps) == (5, 10)  # ten epochs, of one step each
    assert "1 step an epoch" in auto.decision("train.epochs").reason
    yours = choose(recipe(train={"batch_size": 32, "epochs": 3}), CPU, SPRIG, facts)
    assert yours.settings.steps == 1  # 15 rows
    assert "about 0.16 steps per epoch. There are only 5 rows" in yours.decision("train.batch_size").reason
    uneven = choose(recipe(train={"batch_size": 8}), CPU, SPRIG, facts_of(57, 1, 50, 100))  # a hundred steps are 14
    assert (uneven.decision("train.epochs").value, uneven.settings.steps) == (10.0, 72)
    assert "only about 7.1 steps an epoch" in uneven.decision("train.epochs").reason
    many = choose(recipe(train={"batch_size": 8}), CPU, SPRIG, facts_of(201, 1, 50, 100))
    assert (many.decision("train.epochs").value, many.settings.steps) == (4.0, 101)  # 3 epochs would be 76


def test_evaluations() -> None:
    assert choose(recipe(), CPU, SPRIG, facts_of(800, 0, 50, 9)).settings.eval_every == 0
    cheap = choose(recipe(train={"steps": 200}), CPU, SPRIG, facts_of(800, 4, 50, 9))
    dear = choose(recipe(train={"steps": 200}), CPU, SPRIG, facts_of(800, 80_000, 50, 9))
    assert (cheap.settings.eval_every, dear.settings.eval_every) == (20, 200)
    assert (cheap.time.evaluations, dear.time.evaluations) == (11, 2)  # step 0 and the last are always measured
    assert cheap.settings.save_every == cheap.settings.eval_every
    assert "the fewest there can be; holding out" in dear.decision("train.eval_every").reason
    assert choose(recipe(train={"steps": 1}), CPU, SPRIG, facts_of(800, 4, 50, 9)).settings.eval_every == 1
    assert choose(recipe(train={"eval_every": 0, "steps": 200}), CPU, SPRIG, FACTS).settings.save_every == 20
    with pytest.raises(UsageError, match=r"train\.eval_every is 5, but no row is held out"):
        choose(recipe(train={"eval_every": 5}), CPU, SPRIG, facts_of(800, 0, 50, 9))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"max_length is 4,096, but the model knows only 2,048") as caught:
        choose(recipe(train={"max_length": 4096}), CPU, SPRIG, FACTS)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="warmup_steps is 50, but the run has only 13 steps"):
        choose(recipe(train={"warmup_steps": 50, "epochs": 1}), CPU, SPRIG, facts_of(100, 10, 50, 1000))
    with pytest.raises(DataError, match="no row is left"):
        choose(recipe(), CPU, SPRIG, facts_of(0, 10, 50, 1000))
    assert choose(recipe(), CPU, SPRIG, facts_of(9, 1, 5000, 100)).settings.max_length == 2048


def test_evaluations_stay_within_a_tenth_of_the_time_where_they_can() -> None:
    for held_out in (1, 10, 100, 300):
        plan = choose(recipe(train={"steps": 300}), CPU, SPRIG, facts_of(800, held_out, 50, 9))
        assert plan.time.evaluation_seconds <= 0.1 * plan.time.total_seconds
        asked = choose(recipe(train={"steps": 300, "eval_every": 1}), CPU, SPRIG, facts_of(800, held_out, 50, 9))
        assert (asked.settings.eval_every, asked.time.evaluations) == (1, 301)


def test_what_cannot_fit_is_refused_with_numbers() -> None:
    """70B: 69.9e9 weights, of which 68.4e9 in the projections: 68.4e9 * 4.127 / 8 + 2.1e9 * 2 bytes = 36.8 GiB."""
    with pytest.raises(FitError, match=r"A10G has 20\.7 GiB for it") as caught:
        choose(recipe(), A10G, LLAMA_70B, FACTS)
    assert caught.value.exit_code == 4
    assert "weights 36." in caught.value.message
    with pytest.raises(FitError, match=r"weights 15\.0 GiB") as caught:
        choose(recipe(quantize="none"), T4, LLAMA_8B, FACTS)
    assert "quantize: nf4 (needs " in str(caught.value.remedy)
    assert choose(recipe(), H100, LLAMA_70B, FACTS).settings.quantize == "nf4"


def test_optimizer_state_of_a_large_adapter() -> None:
    """671 million parameters: 5 GiB of AdamW's state, 1.25 in 8 bits."""
    lean = {"checkpointing": True, "micro_batch": 1, "batch_size": 8}
    wide = recipe(adapter={"rank": 256}, quantize="nf4", train=lean)
    exact = choose(wide, H100, LLAMA_8B, FACTS)
    assert exact.settings.optimizer == "adamw"
    tight = replace(A10G, memory_gib=(exact.memory.peak.gib - 1) / 0.92)
    plan = choose(wide, tight, LLAMA_8B, FACTS)
    assert plan.settings.optimizer == "adamw-8bit"
    assert "with AdamW's full state no plan takes less than" in plan.decision("train.optimizer").reason


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "paged-adamw-8bit"])
def test_an_optimizer_that_the_device_lacks_is_refused_when_planning(device: Device, name: str) -> None:
    asked = recipe(train={"optimizer": name})
    has = {"cpu": ["adamw", "adamw-8bit"], "mps": ["adamw"], "cuda": ["adamw", "adamw-8bit", "paged-adamw-8bit"]}
    if name in has[device.kind]:
        assert choose(asked, device, SPRIG, FACTS).settings.optimizer == name
        return
    with pytest.raises(
        UsageError, match=rf"train\.optimizer: {name} needs .*cuda, and this run is on {device.kind}"
    ) as no:
        choose(asked, device, SPRIG, FACTS)
    assert no.value.exit_code == 2
    assert no.value.remedy == f"set train.optimizer to one of: {', '.join(has[device.kind])}"


OLD_FP32 = {"precision": "fp32"}


@pytest.mark.parametrize(
    ("device", "train", "able"),
    [
        (T4, {"attention": "flash"}, "efficient, math"),
        (H100, {"attention": "flash", **OLD_FP32}, "efficient, math"),
        (MPS, {"attention": "flash"}, "math"),
        (MPS, {"attention": "efficient"}, "math"),
    ],
)
def test_attention_that_the_device_lacks_is_refused(device: Device, train: dict[str, object], able: str) -> None:
    with pytest.raises(UsageError, match=rf"train\.attention: \w+ is not there on {device.name}") as no:
        choose(recipe(train=train), device, SPRIG, FACTS)
    assert no.value.exit_code == 2
    assert no.value.remedy == f"set train.attention to one of: auto, {able}"
    for name in able.split(", "):
        assert choose(recipe(train={**train, "attention": name}), device, SPRIG, FACTS).settings.attention == name


def test_prompts_that_count_reach_the_head() -> None:
    assert choose(recipe(), CPU, SPRIG, FACTS).work.labelled == 16_001 / (803 * 71)
    assert choose(recipe(prompt_loss_weight=0.1), CPU, SPRIG, FACTS).work.labelled == 1.0


def test_one_core_is_one() -> None:
    assert " 1 core, " in choose(recipe(), replace(CPU, cores=1), SPRIG, FACTS).decision("hardware").reason


def test_nf4_is_neither_taken_nor_advised_where_it_does_not_run() -> None:
    with pytest.raises(UsageError, match=r"quantize: nf4 needs cpu or cuda, and this run is on mps") as no:
        choose(recipe(quantize="nf4"), MPS, SPRIG, FACTS)
    assert "a machine with cpu or cuda, also to evaluate or resume a run" in str(no.value.remedy)
    tight = replace(MPS, memory_gib=19.0)  # 15 GiB of weights
    plan = choose(recipe(), tight, LLAMA_8B, FACTS)
    assert plan.settings.quantize == "none"
    assert "NF4 runs on cpu and cuda only" in plan.decision("quantize").reason
    assert choose(recipe(), replace(tight, kind="cuda", memory_gib=12.0), LLAMA_8B, FACTS).settings.quantize == "nf4"
    for asked in ({}, {"quantize": "none"}):
        with pytest.raises(FitError, match=r"weights 15\.0 GiB") as caught:
            choose(recipe(**asked), replace(MPS, memory_gib=8.0), LLAMA_8B, FACTS)
        assert "quantize: nf4" not in str(caught.value.remedy)


@pytest.mark.parametrize("device", [CPU, CPU_BF16, T4, A10G, H100], ids=lambda device: device.name)
def test_the_qlora_preset_plans_wherever_nf4_runs(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((files("luthier") / "recipe" / "presets" / "qlora-8b.yaml").read_text(encoding="utf-8"))
    got = choose(load_recipe(path), device, LLAMA_8B, FACTS).settings
    assert got.quantize == "nf4"
    assert device.kind in OPTIMIZER_DEVICES[got.optimizer]


YOUR_VALUES: dict[str, object] = {
    "rank": 5,
    "alpha": 7.5,
    "batch_size": 12,
    "micro_batch": 4,
    "learning_rate": 0.03,
    "warmup_steps": 3,
    "optimizer": "paged-adamw-8bit",
    "precision": "fp16",
    "checkpointing": True,
    "max_length": 33,
    "eval_every": 17,
    "save_every": 19,
}


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.sampled_from(sorted(YOUR_VALUES))), st.sampled_from(DEVICES), st.integers(1, 10**5), st.integers(0, 500)
)
def test_your_values_are_never_changed(names: set[str], device: Device, rows: int, held_out: int) -> None:
    if "micro_batch" in names:
        names = names | {"batch_size"}
    if device.kind != "cuda":
        names = names - {"optimizer"}  # the paged one is there alone
    chosen = {name: YOUR_VALUES[name] for name in names}
    adapter = {name: value for name, value in chosen.items() if name in ("rank", "alpha")}
    train = {name: value for name, value in chosen.items() if name not in adapter}
    facts = facts_of(rows, held_out or 1, 71, rows * 20)
    plan = choose(recipe(adapter=adapter, train={**train, "steps": 60}), device, SPRIG, facts)
    for name, value in chosen.items():
        assert getattr(plan.settings, name) == (SPRIG.layers if name == "checkpointing" else value)
        decision = plan.decision(f"{'adapter' if name in adapter else 'train'}.{name}")
        assert decision.value == value
        assert decision.source.startswith(YOURS)
    check_sound(plan)


def check_sound(plan: Plan) -> None:
    """What holds of every plan."""
    got = plan.settings
    assert got.batch_size % got.micro_batch == 0
    assert 0 <= got.warmup_steps < got.steps
    assert got.save_every >= 1
    assert got.max_length <= SPRIG.max_positions
    assert plan.trainable_parameters == SPRIG.layers * got.rank * sum(
        sum(projection_shapes(SPRIG)[t]) for t in got.targets
    )
    names = [decision.setting for decision in plan.decisions]
    assert len(names) == len(set(names))
    for decision in plan.decisions:
        assert len(decision.reason) > 5
        assert decision.source
    document = as_document(plan)
    assert json.loads(json.dumps(document)) == document


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DEVICES), st.integers(1, 10**6), st.integers(0, 10**5), st.integers(1, 10**5), st.integers(1, 10**9)
)
def test_every_auto_is_resolved(device: Device, rows: int, held_out: int, longest: int, tokens: int) -> None:
    check_sound(choose(recipe(), device, SPRIG, facts_of(rows, held_out, longest, tokens)))


def test_every_setting_has_a_decision() -> None:
    plan = choose(recipe(), CPU, SPRIG, FACTS)
    decided = {decision.setting.rpartition(".")[2] for decision in plan.decisions}
    assert set(plan.settings.__dataclass_fields__) - decided == {"device"}  # it is `hardware` there


def test_what_the_evidence_is_against_is_questioned() -> None:
    asked = recipe(
        adapter={"targets": "attention", "rank": 4000},
        train={"learning_rate": 0.03, "precision": "fp16", "batch_size": 256},
    )
    plan = choose(asked, CPU, SPRIG, FACTS)
    assert "Evidence is against it" in plan.decision("adapter.targets").reason
    assert "adds no rank" in plan.decision("adapter.rank").reason
    assert "more than three times" in plan.decision("train.learning_rate").reason
    assert "no fast fp16" in plan.decision("train.precision").reason
    assert "penalty at large batches" in plan.decision("train.batch_size").reason


def test_document_has_the_names_that_others_read() -> None:
    document = as_document(choose(recipe(), CPU, SPRIG, FACTS))
    assert {"schema", "decisions", "trainable_parameters", "total_parameters", "memory", "time"} <= set(document)
    decisions = document["decisions"]
    assert isinstance(decisions, list)
    assert all(set(one) == {"setting", "value", "reason", "source", "rejected"} for one in decisions)


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_shown_stays_within_the_width(width: int) -> None:
    from rich.console import Console

    for device, config in ((CPU, SPRIG), (T4, LLAMA_8B), (replace(A10G, free_gib=13.0), LLAMA_8B)):
        plan = choose(recipe(), device, config, LONG if config is LLAMA_8B else FACTS)
        for why in (False, True):
            console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
            lines = [*memory_lines(plan, width), *time_lines(plan, width)]
            assert all(len(line.plain) <= width for line in lines[:-1])  # the last names a source
            for line in lines:
                console.print(line)
            console.print(plan_table(plan, why=why))
            text = console.export_text()
            assert all(len(line.rstrip()) <= width for line in text.splitlines())
            flat = " ".join(text.split())
            for decision in plan.decisions:
                assert decision.setting in flat
                if why:
                    assert decision.reason.split()[-1] in flat


def test_the_bar_is_scaled_to_the_device() -> None:
    """Half of the cells for half of the memory; what others hold first; the line where the margin begins."""
    plan = choose(recipe(), replace(A10G, free_gib=13.5), LLAMA_8B, LONG)
    bar = memory_lines(plan, 92)[1].plain
    assert (len(bar), bar[0], bar[-1]) == (92, "[", "]")
    assert bar.count("/") == round(90 * 9 / 22.5)
    assert bar.index("│") - 1 == round(90 * (9 + 13.5 * 0.92) / 22.5)
    filled = sum(bar.count(glyph) for glyph in "█▓▒░▚▞▤▥")
    assert filled == pytest.approx(90 * plan.memory.peak.gib / 22.5, abs=1)


def test_from_files_on_this_machine(tiny_llama: Path) -> None:
    """A model that transformers wrote, on the machine at hand."""
    config = read_config(tiny_llama)
    plan = choose(recipe(), this_device(), config, facts_of(31, 4, 60, 900))
    assert plan.total_parameters - plan.trainable_parameters == parameters(config)
    assert plan.settings.targets == PROJECTIONS
    assert plan.settings.rank <= 32  # k and v have 32 rows
