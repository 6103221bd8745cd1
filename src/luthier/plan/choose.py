"""recipe + machine + model's shape + facts of the data -> Plan. Pure: no weights are read, the machine is not asked.

Every `auto` is resolved by a rule of adapter.py, machine.py or schedule.py; what the user set is kept as it is, and
questioned in its reason where the evidence is against it. Order matters only where one choice rests on another.
"""

from __future__ import annotations

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
from luthier.plan.schedule import (
    DataFacts,
    choose_batch_size,
    choose_epochs,
    choose_eval_every,
    choose_max_length,
    choose_save_every,
    choose_steps,
    choose_warmup,
)
from luthier.plan.settings import Settings
from luthier.recipe.schema import Recipe

__all__ = ["DataFacts", "choose"]


def choose(recipe: Recipe, device: Device, config: ModelConfig, facts: DataFacts) -> Plan:
    """Resolve every setting of `recipe`.

    Raises:
        FitError: the weights alone are more than the memory.
        UsageError: a setting cannot be with this model or these rows (see schedule.py).
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
    length = choose_max_length(recipe, config, facts.longest)
    batch = choose_batch_size(recipe, facts.train_rows)
    micro = choose_micro_batch(recipe, batch.value, length.value, device)
    epochs = choose_epochs(recipe, facts.train_rows, batch.value)
    steps = choose_steps(recipe, facts.train_rows, batch.value, epochs.value)
    warmup = choose_warmup(recipe, steps.value)
    trainable = adapter_parameters(config, targets.value, rank.value)
    optimizer = choose_optimizer(recipe, trainable, device)
    weights = weight_gib(config, precision.value, quantize.value)
    recompute = choose_checkpointing(recipe, weights, device)
    evaluate = choose_eval_every(recipe, steps.value, batch.value, facts.eval_rows)
    save = choose_save_every(recipe, steps.value, evaluate.value)
    decisions: tuple[Decision[object], ...] = (
        *_given(recipe, device, config),
        *(precision, quantize, targets, rank, alpha, rate, length, batch, micro, epochs, steps, warmup),
        *(optimizer, recompute, evaluate, save),
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
        steps=steps.value,
        batch_size=batch.value,
        micro_batch=micro.value,
        learning_rate=rate.value,
        schedule=train.schedule,
        warmup_steps=warmup.value,
        optimizer=optimizer.value,
        weight_decay=train.weight_decay,
        clip=train.clip,
        checkpointing=recompute.value,
        max_length=length.value,
        eval_every=evaluate.value,
        save_every=save.value,
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
