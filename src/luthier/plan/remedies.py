"""When nothing fits: what is needed against what there is, and the nearest changes that would make it fit.

Each change is computed, by running the search again with it. They are ordered by how little they alter what the user
asked for: first what gives the same result (free memory, recompute, a smaller micro-batch), then what rounds (8-bit
state, 4-bit base), then what learns less (shorter rows, a smaller rank), then another machine. Changes of the first
kinds are tried together where none is enough alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from luthier.errors import FitError
from luthier.hardware.device import Device
from luthier.plan.fitting import held_by_others
from luthier.plan.footprint import Phase
from luthier.plan.machine import choose_precision
from luthier.plan.search import Candidate, Pinned, Shortfall, Task, fits, leanest, search, shortfalls, used_devices
from luthier.plan.settings import Optimizer
from luthier.plan.show import amount, duration, gib
from luthier.plan.support import OPTIMIZER_DEVICES, QUANTIZE_DEVICES
from luthier.recipe.schema import Recipe

__all__ = ["Remedy", "refusal", "remedies"]

_SHOWN = 3
_SHORTEST = 64
_CARDS = (2, 4, 8)
_DOING = {
    "load": "loading",
    "train": "training",
    "evaluate": "measuring the held-out loss",
    "merge": "merging",
    "host": "loading and merging on the host",
    "disk": "the run's files",
}


@dataclass(frozen=True)
class Remedy:
    """A change, as a user writes it, what is to be known of it, and the plan that it leads to."""

    change: str
    found: Candidate
    note: str = ""

    def __str__(self) -> str:
        note = f"{self.note}; " if self.note else ""
        step = duration(self.found.speed.step_seconds)
        return f"{self.change} ({note}needs {amount(self.found.memory.peak.bytes)}, {step} a step)"


@dataclass(frozen=True)
class _Case:
    """What did not fit."""

    recipe: Recipe
    task: Task
    device: Device
    margin: float

    def tried(self, change: str, task: Task, device: Device, note: str = "") -> Iterator[Remedy]:
        found = search(task, device, self.margin)
        if found is not None:
            yield Remedy(change, found, note)


def refusal(recipe: Recipe, task: Task, device: Device, margin: float) -> FitError:
    """The error to raise where `search` found nothing."""
    least = leanest(task, device)
    short = shortfalls(least.memory, device, margin)
    lines = [_need(one, device, margin) for one in short]
    place = {one.place for one in short}
    if place == {"disk"}:
        return FitError("\n".join(lines), _more_disk(task, device, short[0]))
    found = remedies(recipe, task, device, margin)
    smaller = "a smaller model of the same family"
    if not found:
        return FitError("\n".join(lines), f"{smaller}: no setting and no machine of the catalogue is enough")
    listed = "".join(f"\n    {remedy}" for remedy in found)
    return FitError("\n".join(lines), f"one of these, each computed:{listed}\n  or {smaller}")


def _more_disk(task: Task, device: Device, short: Shortfall) -> str:
    more = gib(short.phase.gib - short.have)
    remedy = f"free {more} on the disk that the run goes to, or choose another with --out"
    without = leanest(replace(task, exports=()), device).memory.disk
    if task.exports and without.gib <= short.have:
        remedy += f"; export: [] (without exports {amount(without.bytes)} are written)"
    return remedy


def _need(short: Shortfall, device: Device, margin: float) -> str:
    """What is needed against what there is, by component."""
    phase, have = short.phase, gib(short.have)
    if short.place == "disk":
        free = f"{have} are free" if short.have > 0 else "nothing is free"
        return f"the disk is too small: {_parts(phase)} take {gib(phase.gib)}, and {free}"
    if short.place == "host":
        return f"it does not fit the host's memory: {gib(phase.gib)} are needed ({_parts(phase)}), and {have} are there"
    many = used_devices(device)
    of = f"each of {many} {device.name}" if many > 1 else device.name
    total = f"{device.usable_gib:.3g} GiB, of which {margin:.0%} stay free"
    return (
        f"it does not fit: {_DOING[phase.name]} needs at least {gib(phase.gib)}, and {of} has {have} for it ({total})."
        f"{held_by_others(device)} Needed are {_parts(phase)}"
    )


def _parts(phase: Phase) -> str:
    """The parts, largest first; what is less than a hundredth of all stands together."""
    ordered = sorted((part for part in phase.parts if part.bytes), key=lambda part: -part.bytes)
    large = [part for part in ordered if part.bytes >= 0.01 * phase.bytes]
    listed = [f"{part.name} {amount(part.bytes)}" for part in large]
    rest = phase.bytes - sum(part.bytes for part in large)
    return ", ".join([*listed, f"other {amount(rest)}"] if rest else listed)


def remedies(recipe: Recipe, task: Task, device: Device, margin: float) -> tuple[Remedy, ...]:
    """The three nearest changes with which it fits; fewer where there are fewer."""
    case = _Case(recipe, task, device, margin)
    found: list[Remedy] = []
    for kind in (_free, _unpin, _together, _shorter, _narrower, _single_machine, _more_cards):
        found += kind(case)
        if len(found) >= _SHOWN:
            break
    return tuple(found[:_SHOWN])


def _free(case: _Case) -> Iterator[Remedy]:
    """What other processes hold, if that is what is missing."""
    device = case.device
    if device.usable_gib >= device.memory_gib:
        return
    need = leanest(case.task, device).memory.peak.gib / (1 - case.margin)
    if need > device.usable_gib:
        freed = replace(device, free_gib=min(device.memory_gib, need * (1 + 1e-9)))
        more = gib(need - device.usable_gib)
        yield from case.tried(f"free {more} of {device.name}", case.task, freed, "other processes hold it")


def _pins(case: _Case) -> Iterator[tuple[str, Pinned]]:
    """What the user set and might leave open, the harmless first: (the change, the pins with it)."""
    pinned, kind = case.task.pinned, case.device.kind
    if pinned.recomputed is not None and pinned.recomputed < case.task.config.layers:
        yield "train.checkpointing: auto", replace(pinned, recomputed=None)
    if pinned.micro_batch is not None and pinned.micro_batch > 1:
        yield "train.micro_batch: auto", replace(pinned, micro_batch=None)
    eight: Optimizer = "adamw-8bit"
    if pinned.optimizer == "adamw" and kind in OPTIMIZER_DEVICES[eight]:
        yield f"train.optimizer: {eight}", replace(pinned, optimizer=eight)
    if pinned.quantize == "none" and kind in QUANTIZE_DEVICES["nf4"]:
        yield "quantize: nf4", replace(pinned, quantize="nf4")


def _unpin(case: _Case) -> Iterator[Remedy]:
    for change, pinned in _pins(case):
        found = search(replace(case.task, pinned=pinned), case.device, case.margin)
        if found is not None:
            said = f"train.micro_batch: {found.choice.micro_batch}" if change.startswith("train.micro") else change
            yield Remedy(said, found)
    if case.recipe.train.precision == "fp32":
        narrow = choose_precision(_without_precision(case.recipe), case.device).value
        if narrow != "fp32":
            task = replace(case.task, precision=narrow)
            yield from case.tried(f"train.precision: {narrow}", task, case.device)


def _without_precision(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "auto"})})


def _together(case: _Case) -> Iterator[Remedy]:
    """Several settings at once, where no one alone is enough: one more at a time, until it fits."""
    changes = list(_pins(case))
    if any(True for _ in _unpin(case)):
        return
    said: list[str] = []
    pinned = case.task.pinned
    for change, _ in changes:
        pinned = next(after for name, after in _pins(replace(case, task=replace(case.task, pinned=pinned)))
                      if name == change)  # fmt: skip
        said.append(change)
        if len(said) > 1 and (found := search(replace(case.task, pinned=pinned), case.device, case.margin)):
            yield Remedy(" with ".join(said), found)
            return


def _largest(options: range, is_enough: Callable[[int], bool]) -> int | None:
    """The largest of ascending `options` that is enough, where all below it are too; None where none is."""
    low, high = 0, len(options)
    while low < high:
        middle = (low + high) // 2
        if is_enough(options[middle]):
            low = middle + 1
        else:
            high = middle
    return options[low - 1] if low else None


def _shorter(case: _Case) -> Iterator[Remedy]:
    """The largest max_length with which it fits, in steps of 64 tokens."""
    task = case.task
    options = range(_SHORTEST, task.max_length, _SHORTEST)
    most = _largest(options, lambda tokens: fits(replace(task, max_length=tokens), case.device, case.margin))
    if most is None:
        return
    cut = task.lengths.longer_than(most)
    rows = f"{cut:,} of {task.lengths.rows:,} rows are longer"
    yield from case.tried(f"train.max_length: {most}", replace(task, max_length=most), case.device, rows)


def _narrower(case: _Case) -> Iterator[Remedy]:
    """The largest smaller rank with which it fits, of the powers of two."""
    for rank in (2**power for power in range(12, 1, -1)):
        if rank < case.task.rank:
            task = replace(case.task, rank=rank)
            if fits(task, case.device, case.margin):
                yield from case.tried(f"adapter.rank: {rank}", task, case.device)
                return


def _on(case: _Case, device: Device) -> Task:
    return replace(case.task, precision=choose_precision(case.recipe, device).value)


def _allowed(case: _Case, device: Device) -> bool:
    """Whether what the user set can be had on `device`."""
    pinned = case.task.pinned
    return (pinned.quantize is None or device.kind in QUANTIZE_DEVICES[pinned.quantize]) and (
        pinned.optimizer is None or device.kind in OPTIMIZER_DEVICES[pinned.optimizer]
    )


def _machines(case: _Case) -> list[Device]:
    """Accelerators of the catalogue, the smallest first."""
    from luthier.hardware.catalogue import MACHINES

    found = [device for device in MACHINES if device.kind != "cpu" and device.count == 1 and _allowed(case, device)]
    return sorted(found, key=lambda device: device.memory_gib)


def _single_machine(case: _Case) -> Iterator[Remedy]:
    """The smallest machine with one device on which it fits: of the same kind, then of another."""
    by_kind = sorted(_machines(case), key=lambda device: device.kind != case.device.kind)
    seen: set[str] = set()
    for device in by_kind:
        task = _on(case, device)
        if device.kind not in seen and fits(task, device, case.margin):
            seen.add(device.kind)
            yield from case.tried(f"--hardware {device.known_as}", task, device, f"has {gib(device.memory_gib)}")


def _more_cards(case: _Case) -> Iterator[Remedy]:
    """Several of the same card, or of the nearest in the catalogue."""
    from luthier.hardware.catalogue import known

    cards = [device for device in _machines(case) if device.kind == "cuda"]
    near = min(cards, key=lambda device: abs(device.memory_gib - case.device.memory_gib), default=None)
    if near is None or case.device.kind != "cuda":
        return
    for count in _CARDS:
        device = known(f"{count}x{near.known_as}")
        task = _on(case, device)
        if count > case.device.count and fits(task, device, case.margin):
            note = "planned only: this version trains on one device"
            yield from case.tried(f"--hardware {device.known_as}", task, device, note)
            return
