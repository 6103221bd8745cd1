"""The proof: before the first step, the largest micro-batch goes forward and backward as it will while training.

A CPU's run that needs less than half of the memory goes without (plan/proof.py).

Everything is held then that a step holds at its fullest: weights, adapter, gradients as of a pass before, and the
optimizer's state. Then gradients are dropped and torch's random generators put back: the run after it is, bit for bit,
the run without it (the optimizer's state is made as its first update would make it).

It is done while the run stands at step 0; a run resumed later has stood the real thing. What is out of memory goes down
the ladder of plan/proof.py, one rung at a time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from luthier.data.batches import Batch
from luthier.plan.proof import Expected, Load, Proof, ladder
from luthier.plan.settings import Settings
from luthier.train.checkpoint import generator_states, restore_generators
from luthier.train.memory import memory_peak, out_of_memory, reset_peaks, synchronize
from luthier.train.optimizer import allocate_state
from luthier.train.step import Trainee, add_gradient

__all__ = ["Forecast", "Trial", "load_of", "prove", "step_down"]

Forecast = Callable[[Settings, Load], Expected]
"""What is predicted of a micro-batch under some settings."""


def passes(device: torch.device) -> int:
    """How many times the micro-batch is taken. A CPU needs one: its memory does not go through a cache that settles,
    and a second would keep a large model's first step waiting for seconds."""
    return 1 if device.type == "cpu" else 2


@dataclass(frozen=True)
class Trial:
    """What the proof asks of the run: the largest micro-batch under some settings, who is told of passes done (False:
    give up), and who is told of a rung that does not fit."""

    batch: Callable[[Settings], Batch]
    passed: Callable[[Load, int, int], bool]
    failed: Callable[[Settings, Load, Settings], None]


def load_of(batch: Batch) -> Load:
    """What memory and time depend on."""
    return Load(batch.tokens, max(batch.lengths), len(batch.lengths))


def step_down(
    trainee: Trainee, settings: Settings, trial: Trial, forecast: Forecast | None
) -> tuple[Settings, Proof | None]:
    """Prove `settings`, or the first rung below them that fits; None where it was given up.

    Raises the last rung's error, where none fits; any other error as it is. The decoder then recomputes as the settings
    that are given back say.
    """
    layers = trainee.decoder.config.layers
    rungs = (settings, *ladder(settings, layers))
    for now, following in zip(rungs, (*rungs[1:], None), strict=True):
        trainee.decoder.checkpointing = now.checkpointing
        batch = trial.batch(now)
        load = load_of(batch)
        try:
            proof = prove(trainee, batch, now, trial.passed)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or following is None:
                raise
        else:
            return now, _beside(proof, forecast, now)
        _free_memory(trainee)  # after the except block, whose error holds the frames that hold the activations
        trial.failed(now, load, following)
    raise AssertionError("the last rung returns or raises")


def prove(trainee: Trainee, batch: Batch, settings: Settings, passed: Callable[[Load, int, int], bool]) -> Proof | None:
    """Take `batch` forward and backward and leave everything but the optimizer's first state as it was.

    None where `passed` says to give up between the passes.
    """
    decoder, device, load = trainee.decoder, trainee.decoder.device, load_of(batch)
    total = passes(device)
    generators, seconds = generator_states(device), 0.0
    try:
        allocate_state(trainee.optimizer, trainee.parameters)
        reset_peaks(device)
        for parameter in trainee.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for done in range(total):
            if not passed(load, done, total):
                return None
            synchronize(device)
            began = time.perf_counter()
            add_gradient(decoder, batch, max(batch.weight, 1.0), trainee.scaler)
            synchronize(device)
            seconds = time.perf_counter() - began
        memory = memory_peak(device)
    finally:
        trainee.optimizer.zero_grad(set_to_none=True)
        restore_generators(device, generators)
    return Proof(
        load=load,
        micro_batch=settings.micro_batch,
        checkpointing=settings.checkpointing,
        measured_gib=memory.allocated,
        reserved_gib=memory.reserved,
        measured_seconds=seconds,
    )


def _free_memory(trainee: Trainee) -> None:
    """Give back what a pass that failed held, so that the next begins as it did."""
    gc.collect()
    device = trainee.decoder.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()


def _beside(proof: Proof | None, forecast: Forecast | None, settings: Settings) -> Proof | None:
    """The proof with what was predicted."""
    if proof is None or forecast is None:
        return proof
    expected = forecast(settings, proof.load)
    return replace(proof, predicted_gib=expected.gib, predicted_seconds=expected.seconds)
