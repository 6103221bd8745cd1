"""The search: of all plans that fit the machine with a margin, the best.

What depends on memory is searched: the base's number format, the optimizer, how the work is cut over devices, the
micro-batch, and how many layers are recomputed. What the user set is no axis of the search. Of what fits, first by
class:

    16-bit base, AdamW  >  16-bit, 8-bit AdamW  >  NF4, AdamW  >  NF4, 8-bit AdamW

and within a class, of those that take at most NEAR longer than the fastest, the one that needs least memory; at equal
memory the faster one, then the one that recomputes fewer layers.

The class stands before the time because two wishes conflict where a 16-bit base only just fits: there NF4 can be the
faster plan, for it leaves room to keep activations that 16-bit would have to recompute. NF4 rounds the base that is
learned on, and 8-bit state rounds the moments, so both are taken only where nothing else fits; what it would have
been in 4 bits stands in the decision. Paged state is never taken unasked.

Within a class a candidate's predicted time depends on the candidate alone, and more memory makes the fastest no slower.
What is taken is within NEAR of that, so more memory gives no worse class and no plan of the same class that is slower
than NEAR allows (a candidate that recomputes less takes another's place, so the leanest may be a slightly slower one);
the same holds of a smaller margin.

Memory rises with the micro-batch, and falls with every layer that is recomputed, from the first on. The last layer is a
case of its own: recomputing it keeps less while the loss is computed, but as its backward pass comes first, nothing has
been freed by then. So for each micro-batch the least number of recomputed layers is found by bisection below the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from luthier.hardware.device import GIB, Device, Precision
from luthier.hardware.kernels import kernels_of
from luthier.model.config import ModelConfig
from luthier.plan.disk import NOTHING_KEPT, Written
from luthier.plan.footprint import Memory, Phase
from luthier.plan.memory import predict_memory
from luthier.plan.rows import Lengths
from luthier.plan.settings import Attention, Optimizer, Quantize
from luthier.plan.sizes import EVALUATION_TOKENS
from luthier.plan.speed import Speed, predict_speed
from luthier.plan.support import OPTIMIZER_DEVICES, QUANTIZE_DEVICES, attentions
from luthier.plan.work import Sharding, Work
from luthier.recipe.micro_batch import most_tokens

__all__ = [
    "MARGIN",
    "Candidate",
    "Choice",
    "Pinned",
    "Shortfall",
    "Task",
    "attention_on",
    "candidate",
    "classes",
    "fits",
    "leanest",
    "micro_batches",
    "recomputed_layers",
    "search",
    "shortfalls",
    "used_devices",
    "without_limits",
]

NEAR = 1.05
"""Times as long as the fastest plan that counts as no slower: predictions of time are no better than that."""

MARGIN = 0.08
"""Of the usable memory, what a plan leaves free: for the error of the prediction, and for what others take later."""


@dataclass(frozen=True)
class Pinned:
    """What the user set of what is searched; None: auto. recomputed: layers, of those that the model has. The attention
    backend is no axis of the search, but memory depends on it."""

    quantize: Quantize | None = None
    optimizer: Optimizer | None = None
    micro_batch: int | None = None
    recomputed: int | None = None
    attention: Attention | None = None


@dataclass(frozen=True)
class Task:
    """What is to be trained, as far as it is decided before memory is looked at.

    packed: rows that a pack has on average, None: rows are not packed. step_tokens: of an average optimizer step.
    labelled: the share of tokens that are learned. written: what is left on disk.
    """

    config: ModelConfig
    precision: Precision
    rank: int
    targets: tuple[str, ...]
    dropout: float
    max_length: int
    batch_size: int
    lengths: Lengths
    eval_rows: int
    step_tokens: float
    packed: float | None = None
    labelled: float = 1.0
    written: Written = NOTHING_KEPT
    pinned: Pinned = Pinned()

    def tokens(self, micro_batch: int) -> int:
        """Of the heaviest micro-batch that can come."""
        if self.packed is not None:
            return micro_batch * self.max_length
        most = most_tokens(micro_batch, self.step_tokens / self.batch_size, self.longest)
        return min(most, self.lengths.heaviest(micro_batch, self.max_length))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row, as cut."""
        return min(self.lengths.longest, self.max_length)

    @cached_property
    def evaluation_tokens(self) -> int:
        """Of the largest group of held-out rows; 0 where nothing is held out."""
        return min(max(EVALUATION_TOKENS, self.longest), self.lengths.heaviest(self.eval_rows, self.max_length))


@dataclass(frozen=True)
class Choice:
    """One point of the search."""

    quantize: Quantize
    optimizer: Optimizer
    sharding: Sharding
    micro_batch: int
    recomputed: int


@dataclass(frozen=True)
class Candidate:
    """A choice with what it takes."""

    choice: Choice
    work: Work
    memory: Memory
    speed: Speed


@dataclass(frozen=True)
class Shortfall:
    """What is too much for a place (`device`, `host` or `disk`): the phase, and the GiB that there are for it."""

    place: str
    phase: Phase
    have: float


def recomputed_layers(asked: bool | int | Literal["auto"], layers: int) -> int | None:
    """What a recipe's `train.checkpointing` means in layers; None: auto. More than there are is all of them."""
    if asked == "auto":
        return None
    if isinstance(asked, bool):
        return layers if asked else 0
    return min(asked, layers)


def attention_on(device: Device, config: ModelConfig, precision: Precision) -> Attention:
    """The backend of torch's scaled_dot_product_attention that is taken for this model on `device`."""
    return attentions(device, config, precision)[0]


def used_devices(device: Device) -> int:
    """How many devices the plan uses: all of a machine from the catalogue. Of this machine one: training here is."""
    return device.count if device.known_as is not None else 1


def classes(task: Task, device: Device) -> tuple[tuple[Quantize, Optimizer], ...]:
    """The kinds of base and optimizer that may be taken, best first."""
    pinned, kind = task.pinned, device.kind
    formats: tuple[Quantize, ...] = ("none", "nf4")  # not fp8, of which neither gain nor loss has been measured
    states: tuple[Optimizer, ...] = ("adamw", "adamw-8bit")
    bases = (pinned.quantize,) if pinned.quantize else tuple(one for one in formats if kind in QUANTIZE_DEVICES[one])
    kept = (pinned.optimizer,) if pinned.optimizer else tuple(one for one in states if kind in OPTIMIZER_DEVICES[one])
    return tuple((base, state) for base in bases for state in kept)


def _shardings(device: Device) -> tuple[Sharding, ...]:
    return ("ddp", "fsdp") if used_devices(device) > 1 else ("none",)


def micro_batches(task: Task, device: Device) -> tuple[int, ...]:
    """Ascending: the divisors of the batch that leave every device something to do."""
    if task.pinned.micro_batch is not None:
        return (task.pinned.micro_batch,)
    batch = task.batch_size
    small = [rows for rows in range(1, math.isqrt(batch) + 1) if batch % rows == 0]
    every = sorted({*small, *(batch // rows for rows in small)})
    return tuple(rows for rows in every if rows == 1 or rows * used_devices(device) <= batch)


def work_of(task: Task, device: Device, choice: Choice) -> Work:
    """The task, carried out by `choice`."""
    devices = used_devices(device)
    attention = task.pinned.attention or attention_on(device, task.config, task.precision)
    return Work(
        config=task.config,
        precision=task.precision,
        quantize=choice.quantize,
        optimizer=choice.optimizer,
        attention=attention,
        rank=task.rank,
        targets=task.targets,
        tokens=task.tokens(choice.micro_batch),
        longest=task.longest,
        documents=choice.micro_batch * (1 if task.packed is None else math.ceil(task.packed)),
        recomputed=choice.recomputed,
        sharding=choice.sharding,
        devices=devices,
        evaluation_tokens=task.evaluation_tokens,
        step_tokens=task.step_tokens,
        batch_tokens=task.step_tokens / task.batch_size * choice.micro_batch if devices > 1 else 0.0,
        micro_batches=math.ceil(task.batch_size / (choice.micro_batch * devices)),
        dropout=task.dropout,
        labelled=task.labelled,
        kernels=kernels_of(device, task.precision, attention).name,
    )


def candidate(task: Task, device: Device, choice: Choice) -> Candidate:
    """`choice` with its memory and time, whether it fits or not."""
    work = work_of(task, device, choice)
    return Candidate(choice, work, predict_memory(work, device.kind, task.written), predict_speed(work, device))


def shortfalls(memory: Memory, device: Device, margin: float) -> tuple[Shortfall, ...]:
    """Where `memory` is more than there is; nothing: it fits. The margin is the device's alone: on the host only files
    are merged after training, and what is written to disk is known to the byte."""
    host = device.usable_gib if device.kind == "cpu" else device.host_gib
    usable = device.usable_gib * (1 - margin)
    places = (("device", memory.peak, usable), ("host", memory.host, host), ("disk", memory.disk, device.disk_gib))
    return tuple(
        Shortfall(place, phase, have) for place, phase, have in places if have is not None and phase.bytes > have * GIB
    )


def _is_within(task: Task, device: Device, margin: float, choice: Choice) -> bool:
    memory = predict_memory(work_of(task, device, choice), device.kind, task.written)
    return not shortfalls(memory, device, margin)


def _least_recomputed(task: Task, device: Device, margin: float, choice: Choice) -> Choice | None:
    """`choice` with the fewest recomputed layers that fit; None where not even all of them suffice."""
    layers, asked = task.config.layers, task.pinned.recomputed
    if asked is not None:
        fixed = replace(choice, recomputed=asked)
        return fixed if _is_within(task, device, margin, fixed) else None
    if _is_within(task, device, margin, replace(choice, recomputed=0)):
        return replace(choice, recomputed=0)
    if not _is_within(task, device, margin, replace(choice, recomputed=layers - 1)):
        every = replace(choice, recomputed=layers)
        return every if _is_within(task, device, margin, every) else None
    low, high = 0, layers - 1  # `low` does not fit, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        if _is_within(task, device, margin, replace(choice, recomputed=middle)):
            high = middle
        else:
            low = middle
    return replace(choice, recomputed=high)


def _within_class(task: Task, device: Device, margin: float, base: Quantize, state: Optimizer) -> Iterator[Candidate]:
    for sharding in _shardings(device):
        for rows in micro_batches(task, device):
            found = _least_recomputed(task, device, margin, Choice(base, state, sharding, rows, 0))
            if found is None:
                break  # a larger micro-batch takes more
            yield candidate(task, device, found)


def _order(one: Candidate) -> tuple[int, float, int, int, int]:
    """The best first; a tie goes to a replica on each device before one cut over all."""
    choice, seconds = one.choice, one.speed.step_seconds
    return one.memory.peak.bytes, seconds, choice.recomputed, -choice.micro_batch, int(choice.sharding == "fsdp")


def without_limits(device: Device) -> Device:
    """A device of this kind that everything fits."""
    return replace(device, free_gib=None, memory_gib=math.inf, host_gib=None, disk_gib=None)


def search(task: Task, device: Device, margin: float = MARGIN) -> Candidate | None:
    """The best plan that fits with `margin` of the usable memory left free; None where none does."""
    for base, state in classes(task, device):
        found = list(_within_class(task, device, margin, base, state))
        if found:
            enough = NEAR * min(one.speed.step_seconds for one in found)
            return min((one for one in found if one.speed.step_seconds <= enough), key=_order)
    return None


def _leanest_choices(task: Task, device: Device) -> list[Choice]:
    """Of every class and sharding what may need least: no layer recomputed, all, or all but the last."""
    asked, layers = task.pinned.recomputed, task.config.layers
    depths = (0, layers, layers - 1) if asked is None else (asked,)
    rows = micro_batches(task, device)[0]
    return [
        Choice(base, state, sharding, rows, depth)
        for base, state in classes(task, device)
        for sharding in _shardings(device)
        for depth in depths
    ]


def leanest(task: Task, device: Device) -> Candidate:
    """The plan that needs least on a device, whether it fits or not."""
    every = _leanest_choices(task, device)
    needs = [predict_memory(work_of(task, device, one), device.kind).peak.bytes for one in every]
    return candidate(task, device, every[needs.index(min(needs))])


def fits(task: Task, device: Device, margin: float = MARGIN) -> bool:
    """Whether `search` finds a plan, asked more cheaply."""
    return any(_is_within(task, device, margin, one) for one in _leanest_choices(task, device))
