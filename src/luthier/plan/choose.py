"""recipe + machine + model's shape + facts of the data -> Plan. Pure: no weights are read, the machine is not asked.

Every `auto` is resolved: what the hardware or the data decides by a rule of adapter.py, machine.py, rows.py or
schedule.py, what memory and time decide by search.py. What the user set is kept as it is, and questioned in its reason
where the evidence is against it. Order matters only where one choice rests on another.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import DataError, UsageError
from luthier.hardware.device import Device, Precision
from luthier.model.config import ModelConfig, parameters
from luthier.plan.adapter import (
    as_given,
    choose_alpha,
    choose_learning_rate,
    choose_rank,
    choose_targets,
)
from luthier.plan.computing import choose_computing
from luthier.plan.decision import YOURS, Decision
from luthier.plan.disk import Written
from luthier.plan.fitting import Found, decide, held_by_others
from luthier.plan.machine import choose_precision, hardware_source
from luthier.plan.plan import Plan
from luthier.plan.proof import choose_proof
from luthier.plan.remedies import refusal
from luthier.plan.rows import DataFacts, Epoch, Lengths, choose_max_length, choose_packing, rows_as_given
from luthier.plan.schedule import (
    choose_batch_size,
    choose_epochs,
    choose_eval_every,
    choose_save_every,
    choose_steps,
    choose_warmup,
)
from luthier.plan.search import (
    MARGIN,
    Candidate,
    Pinned,
    Task,
    recomputed_layers,
    search,
    used_devices,
    without_limits,
)
from luthier.plan.settings import Settings
from luthier.plan.sizes import adapter_parameters
from luthier.plan.stopping import choose_stopping, max_seconds, skips_of
from luthier.plan.support import check_attention, check_optimizer, check_quantize
from luthier.plan.timing import evaluation_seconds, plan_time
from luthier.recipe.schema import Recipe

__all__ = ["DataFacts", "Epoch", "Lengths", "choose"]

_NO_WORKERS = "Batches are cut from a memory-mapped file by the training process itself: no worker takes memory."


@dataclass(frozen=True)
class _Course:
    """What is decided of rows, batches and steps before memory is looked at."""

    max_length: Decision[int]
    packing: Decision[bool]
    batch_size: Decision[int]
    epochs: Decision[float]
    steps: Decision[int]
    warmup_steps: Decision[int]
    epoch: Epoch


def _choose_course(recipe: Recipe, config: ModelConfig, facts: DataFacts) -> _Course:
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
    return _Course(
        max_length=length,
        packing=choose_packing(recipe, epoch, length.value),
        batch_size=batch,
        epochs=epochs,
        steps=steps,
        warmup_steps=choose_warmup(recipe, steps.value),
        epoch=epoch,
    )


@dataclass(frozen=True)
class _Adapter:
    targets: Decision[tuple[str, ...]]
    rank: Decision[int]
    alpha: Decision[float]
    rate: Decision[float]


def _choose_adapter(recipe: Recipe, config: ModelConfig, facts: DataFacts) -> _Adapter:
    targets = choose_targets(recipe.adapter)
    rank = choose_rank(recipe.adapter, config, targets.value, facts.labelled_tokens)
    return _Adapter(targets, rank, choose_alpha(recipe.adapter, rank.value), choose_learning_rate(recipe, config))


def _pinned(recipe: Recipe, device: Device, config: ModelConfig, precision: Precision) -> Pinned:
    """What the user set of what is searched, checked against the device."""
    train = recipe.train
    if recipe.quantize != "auto":
        check_quantize(recipe.quantize, device, precision)
    if train.optimizer != "auto":
        check_optimizer(train.optimizer, device.kind)
    if train.attention != "auto":
        check_attention(train.attention, device, config, precision)
    return Pinned(
        quantize=None if recipe.quantize == "auto" else recipe.quantize,
        optimizer=None if train.optimizer == "auto" else train.optimizer,
        micro_batch=None if train.micro_batch == "auto" else train.micro_batch,
        recomputed=recomputed_layers(train.checkpointing, config.layers),
        attention=None if train.attention == "auto" else train.attention,
    )


def _task(
    recipe: Recipe,
    device: Device,
    config: ModelConfig,
    facts: DataFacts,
    precision: Precision,
    adapter: _Adapter,
    course: _Course,
) -> Task:
    """What is to be searched for."""
    return Task(
        config=config,
        precision=precision,
        rank=adapter.rank.value,
        targets=adapter.targets.value,
        dropout=recipe.adapter.dropout,
        max_length=course.max_length.value,
        batch_size=course.batch_size.value,
        lengths=facts.lengths,
        eval_rows=facts.eval_rows,
        step_tokens=course.batch_size.value * course.epoch.tokens / course.epoch.units,
        packed=course.epoch.rows_per_unit if course.packing.value else None,
        # A prompt token of any weight reaches the head.
        labelled=1.0 if recipe.prompt_loss_weight else min(1.0, facts.labelled_tokens / max(1, course.epoch.tokens)),
        written=Written(recipe.export, recipe.train.keep, course.steps.value),
        pinned=_pinned(recipe, device, config, precision),
    )


def choose(
    recipe: Recipe,
    device: Device,
    config: ModelConfig,
    facts: DataFacts,
    *,
    margin: float = MARGIN,
    must_fit: bool = True,
) -> Plan:
    """Resolve every setting of `recipe` so that `margin` of the device's usable memory stays free.

    Raises:
        FitError: nothing fits, and it `must_fit`; says what is needed, and which changes would help.
        UsageError: a setting cannot be with this model or these rows (see rows.py and schedule.py), or this device.
        DataError: there are no rows to train on.
    """
    if not 0 <= margin < 1:
        raise UsageError(f"a margin of {margin:g} of memory is not possible", "--margin: 0 or more, below 1")
    if facts.train_rows < 1:
        raise DataError("no row is left to train on", "more rows, or another `split`")
    precision = choose_precision(recipe, device)
    adapter = _choose_adapter(recipe, config, facts)
    course = _choose_course(recipe, config, facts)
    task = _task(recipe, device, config, facts, precision.value, adapter, course)
    best = search(task, device, margin) or (None if must_fit else search(task, without_limits(device), margin=0.0))
    if best is None:

        def shorter(tokens: int) -> Task:
            cut = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": tokens})})
            return _task(cut, device, config, facts, precision.value, adapter, _choose_course(cut, config, facts))

        raise refusal(recipe, task, device, margin, shorter)
    steps, measured = course.steps.value, evaluation_seconds(task, best.speed)
    evaluate = choose_eval_every(recipe, steps, facts.eval_rows, steps * best.speed.step_seconds, measured)
    save = choose_save_every(recipe, steps, evaluate.value)
    trainable = adapter_parameters(config, adapter.targets.value, adapter.rank.value)
    decisions: tuple[Decision[object], ...] = (
        *_given(recipe, device, config),
        precision,
        *decide(Found(recipe, task, device, margin, best)),
        *choose_computing(recipe, device, config, precision.value),
        *(adapter.targets, adapter.rank, adapter.alpha, adapter.rate),
        *(course.max_length, course.packing, course.batch_size, course.epochs, course.steps, course.warmup_steps),
        *(evaluate, save, choose_proof(device, best.memory)),
        *choose_stopping(recipe, trainable, best.choice.optimizer, best.speed.step_seconds),
        *(*rows_as_given(recipe, facts.lengths, course.max_length.value), *as_given(recipe)),
        Decision("train.workers", 0, _NO_WORKERS, "this version"),
    )
    return Plan(
        settings=_settings(recipe, adapter, course, best, evaluate.value, save.value, device),
        decisions=decisions,
        device=device,
        trainable_parameters=trainable,
        total_parameters=parameters(config) + trainable,
        work=best.work,
        memory=best.memory,
        time=plan_time(task, best, steps, evaluate.value),
        margin=margin,
        devices=used_devices(device),
    )


def _settings(
    recipe: Recipe,
    adapter: _Adapter,
    course: _Course,
    best: Candidate,
    eval_every: int,
    save_every: int,
    device: Device,
) -> Settings:
    train, choice = recipe.train, best.choice
    return Settings(
        rank=adapter.rank.value,
        alpha=adapter.alpha.value,
        dropout=recipe.adapter.dropout,
        targets=adapter.targets.value,
        scale=recipe.adapter.scale,
        quantize=choice.quantize,
        precision=best.work.precision,
        steps=course.steps.value,
        batch_size=course.batch_size.value,
        micro_batch=choice.micro_batch,
        learning_rate=adapter.rate.value,
        schedule=train.schedule,
        warmup_steps=course.warmup_steps.value,
        optimizer=choice.optimizer,
        weight_decay=train.weight_decay,
        clip=train.clip,
        checkpointing=choice.recomputed,
        attention=best.work.attention,
        max_length=course.max_length.value,
        packing=course.packing.value,
        longest_first=train.longest_first,
        train_on=recipe.train_on,
        prompt_loss_weight=recipe.prompt_loss_weight,
        long_rows=recipe.long_rows,
        eval_every=eval_every,
        save_every=save_every,
        seed=recipe.seed,
        device=device.kind,
        keep=train.keep,
        on_nonfinite=skips_of(train),
        max_time=max_seconds(train),
        stop_file=train.stop_file,
    )


def _given(recipe: Recipe, device: Device, config: ModelConfig) -> tuple[Decision[object], ...]:
    """What everything rests on: the model and the machine."""
    model = f"{parameters(config):,} parameters, of the {config.family} family."
    many = "" if device.count == 1 else f"{device.count} devices of "
    cores = "1 core" if device.cores == 1 else f"{device.cores} cores"
    machine = f"{many}{device.memory_gib:.3g} GiB, {cores}, fast in {', '.join(device.fast)}."
    return (
        Decision("model", recipe.model, model, YOURS),
        Decision("hardware", device.known_as or device.name, machine + held_by_others(device), hardware_source(device)),
    )
