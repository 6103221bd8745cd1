"""recipe + machine + model's shape + facts of the data -> Plan. Pure: no weights are read, the machine is not asked.

Every `auto` is resolved by a rule of adapter.py, machine.py, rows.py or schedule.py; what the user set is kept as it
is, and questioned in its reason where the evidence is against it. Order matters only where one choice rests on another.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import DataError
from luthier.hardware.device import Device
from luthier.model.config import ModelConfig, parameters
from luthier.plan.adapter import (
    adapter_parameters,
    as_given,
    choose_alpha,
    choose_learning_rate,
    choose_rank,
    choose_targets,
)
from luthier.plan.decision import YOURS, Decision
from luthier.plan.machine import (
    choose_checkpointing,
    choose_micro_batch,
    choose_optimizer,
    choose_precision,
    choose_quantize,
    weight_gib,
)
from luthier.plan.plan import Plan
from luthier.plan.rows import DataFacts, Epoch, Lengths, choose_max_length, choose_packing, rows_as_given
from luthier.plan.schedule import (
    choose_batch_size,
    choose_epochs,
    choose_eval_every,
    choose_save_every,
    choose_steps,
    choose_warmup,
)
from luthier.plan.settings import Settings
from luthier.recipe.schema import Recipe

__all__ = ["DataFacts", "Epoch", "Lengths", "choose"]


@dataclass(frozen=True)
class _Course:
    """What is decided of rows, batches and steps."""

    max_length: Decision[int]
    packing: Decision[bool]
    batch_size: Decision[int]
    micro_batch: Decision[int]
    epochs: Decision[float]
    steps: Decision[int]
    warmup_steps: Decision[int]
    eval_every: Decision[int]
    save_every: Decision[int]


def _choose_course(recipe: Recipe, device: Device, config: ModelConfig, facts: DataFacts) -> _Course:
    packed = recipe.train.packing is True
    length = choose_max_length(recipe, config, facts.lengths, packed)
    epoch = facts.epoch(length.value, packed)
    if epoch.rows < 1:
        raise DataError(
            "no row is left to train on", f"a train.max_length above {length.value}, or another `long_rows`"
        )
    batch = choose_batch_size(recipe, epoch)
    epochs = choose_epochs(recipe, epoch, batch.value)
    steps = choose_steps(recipe, epoch, batch.value, epochs.value)
    evaluate = choose_eval_every(recipe, steps.value, batch.value * epoch.rows_per_unit, facts.eval_rows)
    return _Course(
        max_length=length,
        packing=choose_packing(recipe, epoch, length.value),
        batch_size=batch,
        micro_batch=choose_micro_batch(recipe, batch.value, length.value, device, "pack" if packed else "row"),
        epochs=epochs,
        steps=steps,
        warmup_steps=choose_warmup(recipe, steps.value),
        eval_every=evaluate,
        save_every=choose_save_every(recipe, steps.value, evaluate.value),
    )


def choose(recipe: Recipe, device: Device, config: ModelConfig, facts: DataFacts) -> Plan:
    """Resolve every setting of `recipe`.

    Raises:
        FitError: the weights alone are more than the memory.
        UsageError: a setting cannot be with this model or these rows (see rows.py and schedule.py).
        DataError: there are no rows to train on.
    """
    if facts.train_rows < 1:
        raise DataError("no row is left to train on", "more rows, or another `split`")
    train = recipe.train
    precision = choose_precision(recipe, device)
    quantize = choose_quantize(recipe, config, device, precision.value)
    targets = choose_targets(recipe.adapter)
    rank = choose_rank(recipe.adapter, config, targets.value, facts.labelled_tokens)
    alpha = choose_alpha(recipe.adapter, rank.value)
    rate = choose_learning_rate(recipe, config)
    course = _choose_course(recipe, device, config, facts)
    trainable = adapter_parameters(config, targets.value, rank.value)
    optimizer = choose_optimizer(recipe, trainable, device)
    weights = weight_gib(config, precision.value, quantize.value)
    recompute = choose_checkpointing(recipe, weights, device)
    decisions: tuple[Decision[object], ...] = (
        *_given(recipe, device, config),
        *(precision, quantize, targets, rank, alpha, rate, course.max_length, course.packing, course.batch_size),
        *(course.micro_batch, course.epochs, course.steps, course.warmup_steps, optimizer, recompute),
        *(course.eval_every, course.save_every),
        *rows_as_given(recipe, facts.lengths, course.max_length.value),
        *as_given(recipe),
    )
    settings = Settings(
        rank=rank.value,
        alpha=alpha.value,
        dropout=recipe.adapter.dropout,
        targets=targets.value,
        scale=recipe.adapter.scale,
        quantize=quantize.value,
        precision=precision.value,
        steps=course.steps.value,
        batch_size=course.batch_size.value,
        micro_batch=course.micro_batch.value,
        learning_rate=rate.value,
        schedule=train.schedule,
        warmup_steps=course.warmup_steps.value,
        optimizer=optimizer.value,
        weight_decay=train.weight_decay,
        clip=train.clip,
        checkpointing=config.layers if recompute.value else 0,
        attention="flash",
        max_length=course.max_length.value,
        packing=course.packing.value,
        longest_first=train.longest_first,
        train_on=recipe.train_on,
        prompt_loss_weight=recipe.prompt_loss_weight,
        long_rows=recipe.long_rows,
        eval_every=course.eval_every.value,
        save_every=course.save_every.value,
        seed=recipe.seed,
        device=device.kind,
    )
    return Plan(settings, decisions, device, trainable, parameters(config) + trainable)


def _given(recipe: Recipe, device: Device, config: ModelConfig) -> tuple[Decision[object], ...]:
    """What everything rests on: the model and the machine."""
    model = f"{parameters(config):,} parameters, of the {config.family} family."
    machine = f"{device.memory_gib:.3g} GiB, {device.cores} cores, fast in {', '.join(device.fast)}."
    return (
        Decision("model", recipe.model, model, YOURS),
        Decision("hardware", device.name, machine, "the probe of this machine"),
    )
