"""What holds of every plan: memory helps, a margin that holds contains every smaller one, your values stand."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import FitError, UsageError
from luthier.hardware.device import Device
from luthier.model.config import PROJECTIONS, ModelConfig
from luthier.plan.choose import DataFacts, Epoch, Lengths, choose
from luthier.plan.plan import Plan
from luthier.plan.search import NEAR, Candidate, Pinned, Task, search
from luthier.recipe.load import recipe_from_mapping

CLASSES = [(base, state) for base in ("none", "nf4") for state in ("adamw", "adamw-8bit", "paged-adamw-8bit")]


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    heads, groups = draw(st.sampled_from([4, 8, 32])), draw(st.sampled_from([1, 2, 4]))
    head = draw(st.sampled_from([32, 64, 128]))
    hidden = heads * head
    inner = draw(st.sampled_from([2, 3, 4])) * hidden
    vocab, layers = draw(st.sampled_from([4096, 32000, 128256])), draw(st.integers(1, 80))
    return ModelConfig("llama", vocab, hidden, inner, layers, heads, heads // groups, head, max_positions=8192)


@st.composite
def devices(draw: st.DrawFn) -> Device:
    memory = draw(st.floats(1, 200))
    kind, capability, fast = draw(
        st.sampled_from(
            [
                ("cpu", None, ("fp32",)),
                ("cpu", None, ("bf16", "fp32")),
                ("cuda", (7, 5), ("fp16", "fp32")),
                ("cuda", (9, 0), ("bf16", "fp16", "fp32")),
                ("mps", None, ("bf16", "fp16", "fp32")),
            ]
        )
    )
    count = draw(st.sampled_from([1, 1, 2, 4])) if kind == "cuda" else 1
    return Device(kind, "some", memory, 8, capability, fast, count=count, known_as="some")  # type: ignore[arg-type]


@st.composite
def tasks(draw: st.DrawFn, device: Device) -> Task:
    counts = draw(st.dictionaries(st.integers(1, 4096), st.integers(1, 1000), min_size=1, max_size=5))
    batch = draw(st.integers(1, 64))
    precision = "bf16" if "bf16" in device.fast else "fp16" if device.kind == "cuda" else "fp32"
    able = ("none", "nf4") if device.kind != "mps" else ("none",)
    pinned = Pinned(
        quantize=draw(st.none() | st.sampled_from(able)),
        optimizer=draw(st.none() | st.sampled_from(("adamw",))),
        micro_batch=draw(st.none() | st.sampled_from([rows for rows in range(1, batch + 1) if batch % rows == 0])),
    )
    return Task(
        config=draw(configs()),
        precision=precision,  # type: ignore[arg-type]
        rank=draw(st.sampled_from([4, 16, 64, 256])),
        targets=PROJECTIONS,
        dropout=0.0,
        max_length=draw(st.integers(8, 4096)),
        batch_size=batch,
        lengths=Lengths(tuple(sorted(counts.items()))),
        eval_rows=draw(st.integers(0, 200)),
        step_tokens=float(draw(st.integers(1, 65536))),
        pinned=pinned,
    )


def rank(found: Candidate) -> int:
    return CLASSES.index((found.choice.quantize, found.choice.optimizer))


def no_worse(better: Candidate | None, than: Candidate | None) -> bool:
    """Whether what `better` had more room for is of a better class, or of the same and not slower than NEAR allows.

    With more memory a candidate that recomputes less takes another's place, so the leanest near it may be another.
    """
    if than is None:
        return True
    if better is None or rank(better) > rank(than):
        return False
    return rank(better) < rank(than) or better.speed.step_seconds <= NEAR * than.speed.step_seconds


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_more_memory_never_gives_a_slower_plan_nor_a_worse_class(data: st.DataObject) -> None:
    device = data.draw(devices())
    task = data.draw(tasks(device))
    more = replace(device, memory_gib=device.memory_gib * data.draw(st.floats(1, 8)))
    assert no_worse(search(task, more), search(task, device))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_fits_with_a_margin_fits_with_any_smaller(data: st.DataObject) -> None:
    device = data.draw(devices())
    task = data.draw(tasks(device))
    large = data.draw(st.floats(0, 0.9))
    small = data.draw(st.floats(0, large))
    assert no_worse(search(task, device, small), search(task, device, large))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_disk_the_host_and_free_memory_are_kept_to(data: st.DataObject) -> None:
    device = data.draw(devices())
    task = data.draw(tasks(device))
    free = replace(
        device,
        free_gib=device.memory_gib * data.draw(st.floats(0.1, 1)),
        host_gib=data.draw(st.floats(1, 60)),
        disk_gib=data.draw(st.floats(0, 9)),
    )
    found = search(task, free)
    if found is not None:
        assert free.disk_gib is not None
        assert free.host_gib is not None
        assert found.memory.host.gib <= (free.usable_gib if free.kind == "cpu" else free.host_gib)
        assert found.memory.peak.gib <= free.usable_gib * 0.92
        assert found.memory.disk.gib <= free.disk_gib


BATCHES = {"8/1": (8, 1), "8/8": (8, 8), "12/3": (12, 3), "1/1": (1, 1)}
YOURS: dict[str, st.SearchStrategy[object]] = {
    "quantize": st.sampled_from(["none", "nf4"]),
    "optimizer": st.sampled_from(["adamw", "adamw-8bit", "paged-adamw-8bit"]),
    "attention": st.sampled_from(["flash", "efficient", "math"]),
    "learning_rate": st.sampled_from([1e-5, 3e-4, 0.02]),
    "epochs": st.sampled_from([0.5, 1.0, 4.0]),
    "alpha": st.sampled_from([1.0, 7.5, 64.0]),
    "targets": st.sampled_from([PROJECTIONS, PROJECTIONS[:4], ("v_proj", "down_proj")]),
    "checkpointing": st.booleans() | st.integers(0, 80),
    "batch_and_micro": st.sampled_from(["8/1", "8/8", "12/3", "1/1"]),
    "precision": st.sampled_from(["bf16", "fp16", "fp32"]),
    "rank": st.integers(1, 64),
    "max_length": st.integers(8, 4096),
    "eval_every": st.integers(0, 50),
}


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sets(st.sampled_from(sorted(YOURS))))
def test_your_values_are_never_changed(data: st.DataObject, names: set[str]) -> None:
    device = data.draw(devices().filter(lambda one: one.kind != "mps"))
    config = data.draw(configs())
    yours = {name: data.draw(YOURS[name]) for name in sorted(names)}
    adapter = {name: value for name, value in yours.items() if name in ("rank", "alpha", "targets")}
    apart = {*adapter, "quantize", "batch_and_micro"}
    train = {name: value for name, value in yours.items() if name not in apart}
    if "epochs" not in train:
        train["steps"] = 60
    if "batch_and_micro" in yours:
        train |= dict(zip(("batch_size", "micro_batch"), BATCHES[str(yours["batch_and_micro"])], strict=True))
    recipe = recipe_from_mapping(
        {
            "model": "sprig",
            "data": "pirate",
            "train": train,
            "adapter": {name: list(value) if isinstance(value, tuple) else value for name, value in adapter.items()},
            **{name: value for name, value in yours.items() if name == "quantize"},
        }
    )
    facts = DataFacts(500, 50, Lengths(((700, 550),)), 10_000, lambda most, _: Epoch(500, 500 * min(700, most)))
    try:
        plan = choose(recipe, device, config, facts)
    except FitError:
        return  # refused rather than changed
    except UsageError:  # likewise, where the device has no such thing
        assert lacks(device, yours)
        return
    assert not lacks(device, yours)
    for name, value in yours.items():
        assert_stands(plan, name, value, config.layers)


def lacks(device: Device, yours: dict[str, object]) -> bool:
    """Whether something was asked for that there is on other devices only. Without a precision set, an accelerator has
    16 bits."""
    paged = yours.get("optimizer") == "paged-adamw-8bit" and device.kind != "cuda"
    old = device.capability is not None and device.capability < (8, 0)
    no_flash = device.kind == "cuda" and (old or yours.get("precision") == "fp32")
    return paged or (yours.get("attention") == "flash" and no_flash)


def assert_stands(plan: Plan, name: str, value: object, layers: int) -> None:
    got = plan.settings
    if name == "batch_and_micro":
        assert (got.batch_size, got.micro_batch) == BATCHES[str(value)]
    elif name == "checkpointing":
        assert isinstance(value, int)
        assert got.checkpointing == (min(value, layers) if not isinstance(value, bool) else layers * value)
        assert plan.decision("train.checkpointing").value == value
    elif name == "epochs":
        assert plan.decision("train.epochs").value == value
        assert got.steps == math.ceil(float(str(value)) * 500 / got.batch_size)
    else:
        assert getattr(got, name) == value
