"""The training loop, to be read from top to bottom: prove the plan, then evaluate, save, step, until all is done.

    rows (data) + settings (plan)  ->  prove, [ evaluate? save? step ]*  ->  run/adapter, events.jsonl, checkpoints

Between two steps the state is whole: there the loop looks whether it is to stop (limits.py), saves, and can be gone on
from, bit for bit the same run on a CPU (`--resume`). What each of these does is in session.py; the step in step.py.

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

from luthier.errors import Interrupted
from luthier.kernels import only_math
from luthier.lock import hold
from luthier.model.decoder import Decoder
from luthier.plan.proof import Measured
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.events import EndEvent, EventLog, Listener, forget_after
from luthier.train.hooks import Hooks
from luthier.train.identity import TrainingRows, identify
from luthier.train.keeper import Keeper
from luthier.train.limits import Stops
from luthier.train.making import make_trainee
from luthier.train.measured import last_step_seconds, measured
from luthier.train.resume import check_directory, check_resumable, resume_from
from luthier.train.session import Session
from luthier.train.signals import StopSignals
from luthier.train.step import Trainee

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

    `base` is the model's name as the adapter's file is to state it. An unfinished run in the directory goes on from its
    newest whole checkpoint, or from the start where it had not come to one: without `resume` if it is the very same
    run, with it also where settings are changed that may be (resume.py). `hooks`: what the caller does on the way.

    Raises UsageError (a finished run is there already, or the one there is another, or another process works there),
    TrainingError (a loss or gradient that is not finite; no checkpoint is whole, or the last could not be written),
    FitError (out of memory), Interrupted (a signal, the stop file, the clock; a checkpoint is saved).
    """
    hooks = hooks or Hooks()
    with hold(run.path, "training"):
        check_directory(run, resume=resume)
        torch.manual_seed(settings.seed)  # the generator of dropout
        trainee, identity = make_trainee(decoder, settings), identify(settings, dataset, base, hooks.weights)
        start = resume_from(run, trainee, identity, resume=resume)
        progress, keeper = start.progress, Keeper(start.checkpoints, settings.keep, start.saved)
        keeper.mend(progress)
        forget_after(run.events, progress.step, progress.evaluated)
        with ExitStack() as stack:
            stack.enter_context(only_math(settings.attention))
            stack.push(keeper.leave)
            stack.enter_context(closing(listener))
            stack.enter_context(_without_the_old())
            log, signals = stack.enter_context(EventLog.opened(run.events)), stack.enter_context(StopSignals())
            stops = _stops(signals, settings, run, trainee, hooks, keeper)
            session = Session(
                trainee=trainee,
                dataset=dataset,
                settings=settings,
                run=run,
                identity=identity,
                progress=progress,
                log=log,
                listener=listener,
                stops=stops,
                hooks=hooks,
                keeper=keeper,
                notes=start.notes,
            )
            end = _go(session)
        if stops.asked is not None:  # it came while the last files were written
            raise Interrupted(
                f"{stops.asked}: stopped when training had just ended; the adapter is in {run.adapter}",
                "run the same command again with --resume to go on from there",
            )
        return _result(end, session)


def _go(session: Session) -> EndEvent:
    """The loop. Whether to stop is asked where the state is whole: it waits for a step, or for a few held-out rows."""
    session.start()
    if session.progress.step == 0 and session.hooks.prove:
        session.prove()
    while True:
        session.settle()
        if session.evaluation_is_due() and session.why_stop() is None:
            session.evaluate()
        if (reason := session.why_stop()) is not None:
            session.interrupt(reason)
        if session.save_is_due():
            session.save()
        if session.progress.step == session.settings.steps:
            return session.finish()
        session.step(session.batches)


def _stops(
    signals: StopSignals, settings: Settings, run: RunDirectory, trainee: Trainee, hooks: Hooks, keeper: Keeper
) -> Stops:
    trained = sum(leaf.numel() for leaf in trainee.parameters.values())
    stops = Stops(signals, settings, trained, hooks.began)
    stops.first_step = last_step_seconds(run.events) or hooks.step_seconds or 0.0
    stops.is_writing = lambda: keeper.is_writing
    return stops


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
