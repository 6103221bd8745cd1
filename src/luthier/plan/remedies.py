"""When nothing fits: what is needed against what there is, and the nearest changes that would make it fit.

Each change is computed, by running the search again with it. They are ordered by how little they alter what the user
asked for: first what gives the same result (free memory, a leaner attention, recompute, a smaller micro-batch), then
what rounds (8-bit state, 4-bit base), then what learns less (shorter rows, a smaller rank), then another machine.
Changes of settings are tried together where none is enough alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from luthier.errors import DataError, FitError, UsageError
from luthier.hardware.device import Device
from luthier.plan.disk import Written
from luthier.plan.fitting import held_by_others
from luthier.plan.footprint import Phase
from luthier.plan.machine import choose_precision
from luthier.plan.search import (
    Candidate,
    Pinned,
    Shortfall,
    Task,
    attention_on,
    fits,
    leanest,
    search,
    shortfalls,
    used_devices,
)
from luthier.plan.show import amount, duration, gib, gib_up
from luthier.plan.support import OPTIMIZER_DEVICES, QUANTIZE_DEVICES, attentions, quantizes
from luthier.recipe.schema import Recipe

__all__ = ["Remedy", "refusal", "remedies"]

_SHOWN = 3
_SHORTEST = 64
_CARDS = (2, 4, 8)
_DOING = {
    "load": "loading",
    "train": "training",
    "evaluate": "measuring the held-out loss",
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
    shorter: Callable[[int], Task]

    def tried(self, change: str, task: Task, device: Device, note: str = "") -> Iterator[Remedy]:
        found = search(task, device, self.margin)
        if found is not None:
            yield Remedy(change, found, note)


def refusal(recipe: Recipe, task: Task, device: Device, margin: float, shorter: Callable[[int], Task]) -> FitError:
    """The error to raise where `search` found nothing. shorter: see `remedies`."""
    least = leanest(task, device)
    short = shortfalls(least.memory, device, margin)
    message = "\n".join(_need(one, device, margin) for one in short)
    disk = next((one for one in short if one.place == "disk"), None)
    more_disk = "" if disk is None else _more_disk(task, device, disk)
    if disk is not None and len(short) == 1:
        return FitError(message, more_disk)
    enough = device if disk is None else replace(device, disk_gib=disk.phase.gib)  # so that the rest can be spoken of
    found = remedies(recipe, task, enough, margin, shorter)
    smaller = "a smaller model of the same family"
    if found:
        listed = "".join(f"\n    {remedy}" for remedy in found)
        remedy = f"one of these, each computed:{listed}\n  or {smaller}"
    else:
        remedy = f"{smaller}: no setting and no machine of the catalogue is enough"
    return FitError(message, f"{remedy}\n  and for the disk: {more_disk}" if more_disk else remedy)


def _more_disk(task: Task, device: Device, short: Shortfall) -> str:
    remedy = (
        f"free {gib_up(short.phase.gib - short.have)} on the disk that the run goes to, or choose another with --out"
    )
    written = task.written

    def enough(changed: Written) -> Phase | None:
        found = leanest(replace(task, written=changed), device).memory.disk
        return found if found.gib <= short.have else None

    if written.keep > 1 and (fewer := enough(replace(written, keep=1))):
        remedy += f"; train.keep: 1 (with one checkpoint beside the best {amount(fewer.bytes)} are written)"
    if written.exports and (without := enough(replace(written, exports=()))):
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


def remedies(
    recipe: Recipe, task: Task, device: Device, margin: float, shorter: Callable[[int], Task]
) -> tuple[Remedy, ...]:
    """The three nearest changes with which it fits; fewer where there are fewer.

    shorter: the task with this `train.max_length` instead; UsageError or DataError where there can be none.
    """
    case = _Case(recipe, task, device, margin, shorter)
    found: list[Remedy] = []
    for kind in (_free, _loosened, _shorter, _narrower, _single_machine, _more_cards):
        found += kind(case)
        if len(found) >= _SHOWN:
            break
    return tuple(found[:_SHOWN])


def _free(case: _Case) -> Iterator[Remedy]:
    """What other programs hold, if that is what is missing."""
    device = case.device
    need = leanest(case.task, device).memory.peak.gib / (1 - case.margin)
    if device.usable_gib < need <= device.memory_gib:
        freed = replace(device, free_gib=need * (1 + 1e-9))
        place = "memory" if device.kind == "cpu" else device.name
        change = f"free {gib_up(need * (1 + 1e-9) - device.usable_gib)} of {place}"
        yield from case.tried(change, case.task, freed, "other programs hold it")


def _looser(case: _Case) -> Iterator[tuple[str, Callable[[Task], Task]]]:
    """What the user set and might leave open, the harmless first: (the change, what it does to a task)."""
    pinned, device = case.task.pinned, case.device

    def pins(change: Callable[[Pinned], Pinned]) -> Callable[[Task], Task]:
        return lambda task: replace(task, pinned=change(task.pinned))

    if pinned.attention == "math" and attention_on(device, case.task.config, case.task.precision) != "math":
        yield "train.attention: auto", pins(lambda old: replace(old, attention=None))
    if pinned.recomputed is not None and pinned.recomputed < case.task.config.layers:
        yield "train.checkpointing: auto", pins(lambda old: replace(old, recomputed=None))
    if pinned.micro_batch is not None and pinned.micro_batch > 1:
        yield "train.micro_batch: auto", pins(lambda old: replace(old, micro_batch=None))
    if pinned.optimizer == "adamw" and device.kind in OPTIMIZER_DEVICES["adamw-8bit"]:
        yield "train.optimizer: adamw-8bit", pins(lambda old: replace(old, optimizer="adamw-8bit"))
    if pinned.quantize == "none" and device.kind in QUANTIZE_DEVICES["nf4"]:
        yield "quantize: nf4", pins(lambda old: replace(old, quantize="nf4"))
    if case.recipe.train.precision == "fp32":
        narrow = choose_precision(_without_precision(case.recipe), device).value
        if narrow != "fp32":
            yield f"train.precision: {narrow}", lambda task: replace(task, precision=narrow)


def _without_precision(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "auto"})})


def _loosened(case: _Case) -> Iterator[Remedy]:
    """Each setting that is enough alone; where none is, one after another together, until it fits."""
    changes = list(_looser(case))
    alone = [one for change, loosen in changes for one in case.tried(change, loosen(case.task), case.device)]
    yield from alone
    said, task = "", case.task
    for change, loosen in () if alone else changes:
        said, task = f"{said} with {change}" if said else change, loosen(task)
        if found := list(case.tried(said, task, case.device)):
            yield from found
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
    if case.recipe.long_rows == "error":  # longer rows would be refused
        return

    def task_of(tokens: int) -> Task | None:
        try:
            return case.shorter(tokens)
        except (UsageError, DataError):  # no row is left, or too few for the warm-up that was asked for
            return None

    def is_enough(tokens: int) -> bool:
        task = task_of(tokens)
        return task is None or fits(task, case.device, case.margin)

    most = _largest(range(_SHORTEST, case.task.max_length, _SHORTEST), is_enough)
    task = None if most is None else task_of(most)
    if task is None:
        return
    lengths = case.task.lengths
    rows = f"{lengths.longer_than(task.max_length):,} of {lengths.rows:,} rows are longer"
    yield from case.tried(f"train.max_length: {task.max_length}", task, case.device, rows)


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
    pinned, task = case.task.pinned, _on(case, device)
    return (
        (pinned.quantize is None or quantizes(pinned.quantize, device))
        and (pinned.optimizer is None or device.kind in OPTIMIZER_DEVICES[pinned.optimizer])
        and (pinned.attention is None or pinned.attention in attentions(device, task.config, task.precision))
    )


def _machines(case: _Case) -> list[Device]:
    """Accelerators of the catalogue, the smallest first."""
    from luthier.hardware.catalogue import MACHINES

    found = [device for device in MACHINES if device.kind != "cpu" and device.count == 1 and _allowed(case, device)]
    return sorted(found, key=lambda device: device.memory_gib)


def _shown_by(device: Device) -> str:
    return f"luthier plan ... --hardware {device.known_as} shows it"


def _single_machine(case: _Case) -> Iterator[Remedy]:
    """The smallest machine with one device on which it fits: of the same kind, then of another."""
    by_kind = sorted(_machines(case), key=lambda device: device.kind != case.device.kind)
    seen: set[str] = set()
    for device in by_kind:
        task = _on(case, device)
        if device.kind not in seen and fits(task, device, case.margin):
            seen.add(device.kind)
            note = f"{gib(device.memory_gib)}, {_shown_by(device)}"
            yield from case.tried(f"another machine, such as {device.known_as}", task, device, note)


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
            note = f"planned only: this version trains on one device, {_shown_by(device)}"
            yield from case.tried(f"several cards, such as {device.known_as}", task, device, note)
            return
