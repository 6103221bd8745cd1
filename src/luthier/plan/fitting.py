"""The decisions that the search took, each with what the alternative would have come to: computed, not guessed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from luthier.hardware.device import Device
from luthier.plan import sources
from luthier.plan.decision import YOURS, Decision
from luthier.plan.search import (
    Candidate,
    Choice,
    Pinned,
    Task,
    candidate,
    leanest,
    micro_batches,
    search,
    shortfalls,
    used_devices,
)
from luthier.plan.settings import Optimizer, Quantize
from luthier.plan.show import amount, duration
from luthier.plan.support import OPTIMIZER_DEVICES, QUANTIZE_DEVICES, quantizes
from luthier.recipe.schema import Recipe

__all__ = ["Found", "decide", "held_by_others"]

_QUALITY = "QLoRA's authors found 16-bit quality kept, LoftQ's found a gap: sources conflict"

_FP8 = (
    "Weights, activations and gradients are rounded to 3 bits of mantissa for the products with the base; what that "
    "gains in speed and costs in loss has not been measured, so the times above are those of bf16's products."
)


@dataclass(frozen=True)
class Found:
    """What the search came to, with all that its decisions rest on."""

    recipe: Recipe
    task: Task
    device: Device
    margin: float
    best: Candidate

    @property
    def choice(self) -> Choice:
        return self.best.choice

    def otherwise(self, pinned: Pinned) -> Candidate | None:
        """The best plan under other pins."""
        return search(replace(self.task, pinned=pinned), self.device, self.margin)

    def swapped(self, choice: Choice) -> Candidate:
        """Another choice, whether it fits or not."""
        return candidate(self.task, self.device, choice)

    def need(self, pinned: Pinned) -> str:
        """The least memory under other pins, as text."""
        return amount(leanest(replace(self.task, pinned=pinned), self.device).memory.peak.bytes)


def room(device: Device, margin: float) -> str:
    """`22.1 GiB`: what a plan may take of a device."""
    return f"{device.usable_gib * (1 - margin):.3g} GiB"


def held_by_others(device: Device) -> str:
    """A sentence where a good part of the memory is not free, else nothing."""
    taken = device.memory_gib - device.usable_gib
    if taken < 0.05 * device.memory_gib:
        return ""
    return f" Other programs hold {taken:.3g} of its {device.memory_gib:.3g} GiB."


def _times(other: Candidate, than: Candidate) -> str:
    """How long a step of `other` takes, beside one of `than`."""
    ratio = other.speed.step_seconds / than.speed.step_seconds if than.speed.step_seconds else 1.0
    if abs(ratio - 1) < 0.005:
        return "a step would take as long"
    return f"a step would take {abs(ratio - 1):.0%} {'longer' if ratio > 1 else 'less'}"


def decide(found: Found) -> tuple[Decision[object], ...]:
    """Quantisation, optimizer, micro-batch, recomputed layers, and for several devices how they share the work."""
    return (
        _quantize(found),
        _optimizer(found),
        _micro_batch(found),
        _checkpointing(found),
        *_sharding(found),
    )


def _fit(found: Found) -> str:
    """`in bf16 training needs 16.2 GiB of 22.1 GiB`."""
    base = {"nf4": "4 bits", "fp8": "FP8", "none": found.task.precision}[found.choice.quantize]
    peak = amount(found.best.memory.peak.bytes)
    return f"with the base in {base} the run needs {peak} of the {room(found.device, found.margin)} there are for it"


def _quantize(found: Found) -> Decision[Quantize]:
    asked, base = found.recipe.quantize, found.choice.quantize
    able = found.device.kind in QUANTIZE_DEVICES["nf4"]
    fit, precision = _fit(found), found.task.precision
    held = held_by_others(found.device)
    if base == "none":
        said = "As you set it: " if asked == "none" else "4 bits are not needed: "
        reason = f"{said}{fit}.{held}"
        if not able:
            reason += f" NF4 runs on {' and '.join(QUANTIZE_DEVICES['nf4'])} only."
            return Decision("quantize", base, reason, YOURS if asked == "none" else "bitsandbytes")
        packed = found.swapped(replace(found.choice, quantize="nf4"))
        saved = found.best.memory.peak.bytes - packed.memory.peak.bytes
        costs = f"would save {amount(max(saved, 0))} and {_times(packed, found.best)}"
        rejected: tuple[str, ...] = (f"nf4: {costs}; {_QUALITY}",)
        if quantizes("fp8", found.device) and precision == "bf16":
            rejected += ("fp8: never by itself, for what it gains and loses has not been measured",)
        source = f"{sources.MODELS}; {sources.QLORA}; {sources.LOFTQ}"
        return Decision("quantize", base, reason, YOURS if asked == "none" else source, rejected)
    if base == "fp8":
        reason = f"As you set it: {fit}.{held} {_FP8}"
        return Decision("quantize", base, reason, YOURS)
    if asked == "nf4":
        plain = found.otherwise(replace(found.task.pinned, quantize="none"))
        reason = f"As you set it: {fit}.{held}"
        if plain is not None:
            reason += (
                f" {precision} would fit too, in {amount(plain.memory.peak.bytes)}: {_times(plain, found.best)}, and "
                f"the merged model is made of it. On quality: {_QUALITY}."
            )
            return Decision("quantize", base, reason, f"{YOURS}; {sources.QLORA}; {sources.LOFTQ}")
        return Decision("quantize", base, reason, YOURS)
    least = found.need(replace(found.task.pinned, quantize="none"))
    reason = f"Needed: in {precision} no plan takes less than {least}, {fit}.{held} On quality: {_QUALITY}."
    rejected = (f"none: {least} at least, {room(found.device, found.margin)} there",)
    return Decision("quantize", base, reason, f"{sources.MODELS}; {sources.QLORA}; {sources.LOFTQ}", rejected)


def _optimizer(found: Found) -> Decision[Optimizer]:
    asked, name, device = found.recipe.train.optimizer, found.choice.optimizer, found.device
    sizes: dict[Optimizer, int] = {}
    for other, devices in OPTIMIZER_DEVICES.items():
        if device.kind in devices:
            swapped = found.best if other == name else found.swapped(replace(found.choice, optimizer=other))
            sizes[other] = swapped.memory.phase("train").bytes
    costs: dict[Optimizer, str] = {"adamw-8bit": "rounds its state", "paged-adamw-8bit": "slower once it pages"}
    state = next((part for part in found.best.memory.phase("train").parts if part.name == "optimizer"), None)
    takes = "" if state is None else f"Its state takes {amount(state.bytes)}"
    if asked != "auto":
        reason = f"As you set it. {takes}{'.' if takes else ''}"
        saved = sizes.get("adamw", 0) - sizes[name]
        if name != "adamw" and found.otherwise(replace(found.task.pinned, optimizer="adamw")) is not None:
            reason += f" Exact AdamW would fit too, with {amount(max(saved, 0))} more."
        return Decision("train.optimizer", name, reason.strip(), YOURS)
    if name == "adamw-8bit":
        least = found.need(replace(found.task.pinned, quantize=found.choice.quantize, optimizer="adamw"))
        reason = f"Needed: with AdamW's full state no plan takes less than {least}. {takes}, about a quarter."
        return Decision("train.optimizer", name, reason, sources.EIGHT_BIT, (f"adamw: {least} at least",))
    rejected = tuple(
        f"{other}: not on {device.kind}"
        if other not in sizes
        else f"{other}: {cost}, to save {amount(max(0, sizes[name] - sizes[other]))}"
        for other, cost in costs.items()
    )
    return Decision("train.optimizer", name, f"{takes or 'It fits'}, and all fits: exact.", sources.EIGHT_BIT, rejected)


def _micro_batch(found: Found) -> Decision[int]:
    task, rows, batch = found.task, found.choice.micro_batch, found.task.batch_size
    unit = "row" if task.packed is None else "full pack"
    what = f"{rows:,} {unit}{'' if rows == 1 else 's'}, up to {task.tokens(rows):,} tokens, at once"
    times = found.best.work.micro_batches
    each = f"{times:,} such make a step" if times > 1 else "that is a whole step"
    each += f", which takes {duration(found.best.speed.step_seconds)}"
    if found.recipe.train.micro_batch != "auto":
        return Decision("train.micro_batch", rows, f"As you set it: {what}; {each}.", YOURS)
    rejected = []
    options = micro_batches(task, found.device)
    place = options.index(rows)
    for other in (*options[max(0, place - 1) : place], *options[place + 1 : place + 2]):
        pinned = replace(task.pinned, micro_batch=other)
        kept = replace(pinned, quantize=found.choice.quantize, optimizer=found.choice.optimizer)
        rival = found.otherwise(kept)
        if rival is None:
            rejected.append(f"{other:,}: needs {found.need(kept)} at least")
        else:
            deeper = rival.choice.recomputed - found.choice.recomputed
            more = f", {deeper} more layers recomputed" if deeper > 0 else ""
            rejected.append(f"{other:,}: {_times(rival, found.best)}{more}")
    reason = f"Of the divisors of {batch:,} that fit, the leanest that is about as fast as the fastest: {what}; {each}."
    if len(options) == 1:
        reason = f"A batch of {batch:,} cannot be divided: {what}."
    return Decision("train.micro_batch", rows, reason, sources.MICRO_BATCH, tuple(rejected))


def _checkpointing(found: Found) -> Decision[bool | int]:
    layers, depth = found.task.config.layers, found.choice.recomputed
    value: bool | int = depth if 0 < depth < layers else depth == layers
    none = found.best if depth == 0 else found.swapped(replace(found.choice, recomputed=0))
    every = found.best if depth == layers else found.swapped(replace(found.choice, recomputed=layers))
    asked = found.recipe.train.checkpointing
    slower = _times(every, none)
    saves = amount(max(0, none.memory.peak.bytes - every.memory.peak.bytes))
    source = f"{sources.MODELS}; {sources.CHECKPOINTING}"
    if asked != "auto":
        if depth == 0:
            reason = f"As you set it: activations of all {layers} layers are kept."
            return Decision("train.checkpointing", asked, reason, YOURS)
        reason = f"As you set it: {_of(depth, layers)} layers are recomputed."
        choice = found.choice
        rival = found.otherwise(
            replace(found.task.pinned, quantize=choice.quantize, optimizer=choice.optimizer, recomputed=None)
        )
        if rival is not None and rival.speed.step_seconds < found.best.speed.step_seconds:
            what = "none" if rival.choice.recomputed == 0 else _of(rival.choice.recomputed, layers)
            reason += (
                f" It saves memory that is there: left to the plan, {what} would be, with a micro-batch of "
                f"{rival.choice.micro_batch}, and {_times(rival, found.best)}."
            )
        return Decision("train.checkpointing", asked, reason, f"{YOURS}; {source}")
    if depth == 0:
        reason = f"Activations of all {layers} layers are kept: they fit."
        return Decision("train.checkpointing", value, reason, source, (f"true: would save {saves}, but {slower}",))
    which = _of(depth, layers)
    reason = (
        f"{which[0].upper() + which[1:]} layers are recomputed in the backward pass: the fewest that fit with this "
        f"micro-batch. Kept, they would need {amount(none.memory.peak.bytes)}; with the recomputation "
        f"{_times(found.best, none)}."
    )
    rejected = [f"false: {amount(none.memory.peak.bytes)} needed"]
    if depth < layers:
        rejected.append(f"true (all {layers}): {_times(every, found.best)}, without need")
    return Decision("train.checkpointing", value, reason, source, tuple(rejected))


def _of(depth: int, layers: int) -> str:
    return f"all {layers}" if depth == layers else f"{depth} of {layers}"


def _idle(found: Found) -> str:
    """A sentence where not every device has a micro-batch to the end of a step."""
    batches, devices = -(-found.task.batch_size // found.choice.micro_batch), used_devices(found.device)
    idle = -batches % devices
    if not idle:
        return ""
    when = "all the time" if batches < devices else "in the last of a step's micro-batches"
    return (
        f" {idle} of {devices} devices stand idle {when}: a batch of {found.task.batch_size:,} makes {batches:,} "
        f"micro-batches; a train.batch_size that {devices} divides would keep all at work."
    )


def _sharding(found: Found) -> tuple[Decision[object], ...]:
    device, choice = found.device, found.choice
    if device.count == 1:
        return ()
    here = f"Training on several devices is predicted here; this version trains on one.{_idle(found)}"
    if used_devices(device) == 1:
        reason = f"This machine has {device.count} such devices. {here}"
        return (Decision("sharding", "none", reason, "this version", ("ddp, fsdp: not in this version",)),)
    other = found.swapped(replace(choice, sharding="fsdp" if choice.sharding == "ddp" else "ddp"))
    needs = amount(other.memory.peak.bytes)
    if choice.sharding == "ddp":
        reason = f"A replica fits on each of the {device.count} devices, and only gradients are exchanged. {here}"
        rejected = (f"fsdp: would need {needs} on each, {_times(other, found.best)}",)
    else:
        fit = "does not fit" if shortfalls(other.memory, device, found.margin) else "fits too, but is not faster"
        reason = f"Weights, gradients and state are cut over {device.count} devices; a replica on each {fit}. {here}"
        rejected = (f"ddp: needs {needs} on each",)
    return (Decision("sharding", choice.sharding, reason, sources.MODELS, rejected),)
