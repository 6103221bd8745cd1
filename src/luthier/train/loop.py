"""The training loop, to be read from top to bottom: prove the plan, then evaluate, save, step, until all is done.

    rows (data) + settings (plan)  ->  prove, [ evaluate? save? step ]*  ->  run/adapter, events.jsonl, checkpoints

Between two steps the state is whole: there the loop looks whether a signal came, saves, and can be gone on from, bit
for bit the same run on a CPU (`--resume`). What each of these does is in session.py; the step itself in step.py.

Before the first step the largest micro-batch is tried (proof.py), unless the plan says that memory is ample; what is
out of memory is cut smaller there.
`train` has eight arguments, one more than the rule: it is the stage's one door, and a bundle would hide what it takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from luthier.errors import Interrupted, UsageError
from luthier.kernels import only_math
from luthier.model.decoder import Decoder
from luthier.plan.proof import Measured
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory, recover_folder
from luthier.train.checkpoint import Progress, TrainingRows, check_identity, identify, load_checkpoint
from luthier.train.events import EndEvent, EventLog, Listener, forget_after
from luthier.train.measured import measured
from luthier.train.session import Hooks, Session, make_batches, make_trainee
from luthier.train.signals import StopSignals

__all__ = ["Hooks", "TrainResult", "check_directory", "check_resumable", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What training came to. Losses in nats per labelled token of the held-out rows; None where there are none.

    `first_eval` is the base model's, before the first step; `best_eval` the lowest of the steps after. `adapter` is
    the folder of the run's adapter: that of `best_step` (`adapter_from` best), or where nothing was held out that of
    the last step. `tokens` and `seconds` are over all sittings of the run; `measured` is to hold the plan against.
    """

    steps: int
    first_eval: float | None
    best_eval: float | None
    best_step: int | None
    last_eval: float | None
    tokens: int
    seconds: float
    adapter: Path
    adapter_from: Literal["best", "last"]
    adapter_step: int
    measured: Measured


def train(
    decoder: Decoder,
    dataset: TrainingRows,
    settings: Settings,
    run: RunDirectory,
    *,
    base: str,
    listener: Listener,
    resume: bool = False,
    hooks: Hooks | None = None,
) -> TrainResult:
    """Train a LoRA on `decoder`, which has none yet, and write it to `run.adapter`; the decoder then holds it.

    `base` is the model's name as the adapter's file is to state it. With `resume` the run in the directory goes on
    from its last checkpoint, or from the start where it had not come to one. `hooks`: what the caller does on the way.

    Raises UsageError (a run is there already, or the one there is another), TrainingError (a loss or gradient that is
    not finite; a damaged checkpoint), FitError (out of memory), Interrupted (a signal; a checkpoint is saved).
    """
    check_directory(run, resume=resume)
    last = run.checkpoints / "last"
    begun = recover_folder(last)
    torch.manual_seed(settings.seed)  # the generator of dropout
    trainee, identity = make_trainee(decoder, settings), identify(settings, dataset, base)
    progress = load_checkpoint(last, trainee, identity) if begun else Progress()
    forget_after(run.events, progress.step, progress.evaluated)
    with ExitStack() as stack:
        stack.enter_context(only_math(settings.attention))
        stack.enter_context(closing(listener))
        stack.enter_context(_without_the_old())
        log, signals = stack.enter_context(EventLog.opened(run.events)), stack.enter_context(StopSignals())
        session = Session(trainee, dataset, settings, run, identity, progress, log, listener, signals, hooks or Hooks())
        end = _go(session)
    if signals.received is not None:  # it came while the last files were written
        raise Interrupted(
            f"{signals.received.name}: stopped when training had just ended; the adapter is in {run.adapter}",
            "run the same command again with --resume to go on from there",
        )
    return _result(end, session)


def _go(session: Session) -> EndEvent:
    """The loop. A signal is looked for wherever the state is whole: it waits for a step, or for a few held-out rows."""
    signals = session.signals
    session.start()
    if session.progress.step == 0 and session.hooks.prove:
        session.prove()
    settings, batches = session.settings, make_batches(session.dataset, session.settings)
    while True:
        if session.evaluation_is_due() and signals.received is None:
            session.evaluate()
        if signals.received is not None:
            session.interrupt(signals.received)
        if session.save_is_due():
            session.save("last")
        if session.progress.step == settings.steps:
            return session.finish()
        session.step(batches)


@contextmanager
def _without_the_old() -> Iterator[None]:
    """While the block runs, Python's collector does not look at what was there before it: the libraries' hundred
    thousands of objects, which it would go through several times in every step of a small model."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_directory(run: RunDirectory, *, resume: bool) -> None:
    """Raise UsageError where `run` holds a run already and it is not to be gone on with. `train` does this itself; a
    caller that writes into the directory before it asks first."""
    if resume:
        return
    if run.adapter.exists():
        raise UsageError(
            f"{run.path} already holds a trained run", "train into another directory (--out), or remove this one"
        )
    if run.events.exists() or run.checkpoints.exists():
        raise UsageError(
            f"{run.path} already holds a run that did not come to its end",
            "go on with it by --resume, train into another directory (--out), or remove this one",
        )


def check_resumable(run: RunDirectory, dataset: TrainingRows, settings: Settings, base: str) -> None:
    """Raise UsageError, with the differences, where the checkpoint in `run` is of another run than this would be.

    `train` refuses it too; a caller that writes the recipe and the plan into the directory asks before it does.
    """
    last = run.checkpoints / "last"
    if recover_folder(last):
        check_identity(last, identify(settings, dataset, base))


def _result(end: EndEvent, session: Session) -> TrainResult:
    return TrainResult(
        steps=end.step,
        first_eval=end.first_eval,
        best_eval=end.best_eval,
        best_step=session.progress.best_step,
        last_eval=end.last_eval,
        tokens=end.tokens,
        seconds=end.seconds,
        adapter=session.run.adapter,
        adapter_from=end.adapter_from,
        adapter_step=end.adapter_step,
        measured=measured(session.run.events, session.peaks),
    )
