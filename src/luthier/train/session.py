"""What the loop does to a run between two steps: one method each, each leaving the state whole and its event told."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

from luthier.data.batches import Batches
from luthier.errors import FitError, Interrupted, TrainingError
from luthier.evaluate.loss import held_out_loss
from luthier.kernels.choose import kernels_for
from luthier.model.adapter import load_adapter
from luthier.model.decoder import Decoder
from luthier.model.load import return_freed
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.plan.proof import Adopted, Load
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory, atomic_folder, recover_folder
from luthier.train.checkpoint import Identity, Progress, TrainingRows, identify, read_progress, save_checkpoint
from luthier.train.events import (
    EndEvent,
    EvalEvent,
    Event,
    EventLog,
    InterruptEvent,
    Listener,
    ProgressEvent,
    ProofEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    tell,
)
from luthier.train.memory import memory_now, memory_peak, out_of_memory, reset_peaks
from luthier.train.optimizer import make_optimizer
from luthier.train.proof import Forecast, Trial, step_down
from luthier.train.remedies import places, smaller
from luthier.train.schedule import learning_rate
from luthier.train.signals import StopSignals
from luthier.train.step import NOT_FINITE, StepError, StepResult, Trainee, make_scaler, take_step

__all__ = ["Hooks", "Session", "make_batches", "make_trainee"]


def make_trainee(decoder: Decoder, settings: Settings) -> Trainee:
    """Add the LoRA that `settings` ask for, seeded, and make its optimizer and loss scaler; the decoder then computes
    as they say."""
    spec = LoRASpec(settings.rank, settings.alpha, settings.dropout, settings.targets, settings.scale)
    add_lora(decoder, spec, settings.seed)
    decoder.checkpointing = settings.checkpointing
    decoder.use(kernels_for(decoder.device, decoder.dtype, settings.attention).kernels)
    decoder.train()
    parameters = lora_parameters(decoder)
    optimizer = make_optimizer(
        settings.optimizer, parameters, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return Trainee(decoder, parameters, optimizer, make_scaler(settings.device, settings.precision))


def make_batches(dataset: TrainingRows, settings: Settings) -> Batches:
    """The micro-batches of every step."""
    return Batches(
        dataset.train,
        settings.batch_size,
        settings.micro_batch,
        settings.seed,
        capacity=settings.max_length if settings.packing else None,
        longest_first=settings.longest_first,
    )


@dataclass(frozen=True)
class Hooks:
    """What the caller has to do with a run.

    companions: is given the adapter's folder before that is put in place, to write what belongs beside the adapter (a
    tokenizer): all of it appears at once. forecast: what is predicted of a micro-batch, for the proof to be held
    against. adopt: is told, before the first step, which settings the run goes on with where the planned ones were out
    of memory. prove: whether the largest micro-batch is tried before the first step (plan/proof.py: `is_proved`).
    """

    companions: Callable[[Path], None] | None = None
    forecast: Forecast | None = None
    adopt: Callable[[Adopted], None] | None = None
    prove: bool = True


class _GivenUpError(Exception):
    """A signal came while held-out rows were measured."""


@dataclass
class Session:
    """One sitting of a run: from its start, or where it is resumed, to its end or interruption."""

    trainee: Trainee
    dataset: TrainingRows
    settings: Settings
    run: RunDirectory
    identity: Identity
    progress: Progress
    log: EventLog
    listener: Listener
    signals: StopSignals
    hooks: Hooks
    peaks: dict[str, float] = field(default_factory=dict)  # GiB, by phase
    _saved: int | None = field(init=False)  # the step of the checkpoint `last` on disk

    def __post_init__(self) -> None:
        self._saved = self.progress.step if self.progress.step > 0 else None
        self._note_peak("load")

    def _note_peak(self, phase: str) -> None:
        peak = memory_peak(self.trainee.decoder.device).allocated
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0.0))

    def tell(self, event: Event) -> None:
        """Write the event down, then tell the listener."""
        self.log.write(event)
        tell(self.listener, event)

    def start(self) -> None:
        """Say what is about to be trained."""
        self.tell(
            StartEvent(
                step=self.progress.step,
                steps=self.settings.steps,
                train_rows=len(self.dataset.train),
                eval_rows=len(self.dataset.eval),
                trainable_parameters=sum(leaf.numel() for leaf in self.trainee.parameters.values()),
            )
        )
        decoder = self.trainee.decoder
        if notice := kernels_for(decoder.device, decoder.dtype, self.settings.attention).notice:
            self.tell(WarningEvent(step=self.progress.step, message=notice))

    def prove(self) -> None:
        """Take the largest micro-batch forward and backward, with less at once where it is out of memory.

        Raises FitError where no plan of the same mathematics fits.
        """
        planned = self.settings
        trial = Trial(lambda settings: make_batches(self.dataset, settings).heaviest(), self._proving, self._step_down)
        with self._within_memory("the largest micro-batch, before the first step", trains=True):
            self.settings, proof = step_down(self.trainee, planned, trial, self.hooks.forecast)
        if proof is None:  # given up for a signal: nothing is proved, so nothing is changed
            self.settings = planned
            self.trainee.decoder.checkpointing = planned.checkpointing
            return
        self._note_peak("train")
        if self.settings != planned:
            self._adopt(planned, proof.load)
        self.tell(ProofEvent.of(proof, self.progress.step))

    def _proving(self, load: Load, done: int, total: int) -> bool:
        """Show that it goes on; False where a signal has come."""
        self.listener.on_progress(ProgressEvent("proof", self.progress.step, done, total, load.tokens))
        return self.signals.received is None

    def _step_down(self, failed: Settings, load: Load, following: Settings) -> None:
        self.settings = following
        message = (
            f"out of memory with {self._ways(failed)} ({load.tokens:,} tokens at once): trying {self._ways(following)}"
        )
        same = self._same(failed, following)
        self.tell(WarningEvent(step=self.progress.step, message=f"{message}, which has {same}"))

    def _ways(self, settings: Settings) -> str:
        layers = self.trainee.decoder.config.layers
        return f"micro_batch {settings.micro_batch} and {settings.checkpointing} of {layers} layers recomputed"

    @staticmethod
    def _same(planned: Settings, now: Settings) -> str:
        """What stays as it was."""
        masks = ", but for dropout's masks" if planned.dropout and planned.micro_batch != now.micro_batch else ""
        return f"the same batches and gradient{masks}"

    def _adopt(self, planned: Settings, load: Load) -> None:
        """Make the settings that fit the run's, on disk too, before anything is trained with them."""
        self.identity = identify(self.settings, self.dataset, self.identity.base)
        reason = (
            f"Out of memory in the proof with {self._ways(planned)}; "
            f"{self._ways(self.settings)} fits and has {self._same(planned, self.settings)}."
        )
        if self.hooks.adopt is not None:
            self.hooks.adopt(Adopted(self.settings, load, reason))
        if (self.run.checkpoints / "last").is_dir():  # of step 0, with the settings that do not fit
            self.save("last")

    def step(self, batches: Batches) -> None:
        """One optimizer step, with the micro-batches and the learning rate of its number.

        Raises TrainingError, naming step, rows and last checkpoint, before anything is updated; FitError, naming step
        and last checkpoint, where memory does not suffice.
        """
        done, device = self.progress.step, self.trainee.decoder.device
        rate = self._set_learning_rate(done)
        reset_peaks(device)
        began = time.perf_counter()
        try:
            with self._within_memory(f"step {done + 1}", trains=True):
                result = take_step(self.trainee, batches.step(done), self.settings.clip)
        except StepError as error:
            where = places(self.dataset, error.rows)
            raise TrainingError(f"step {done + 1}: {error.what}{self._last_good()}; {where}", error.remedy) from error
        seconds = time.perf_counter() - began
        self._note_peak("train")
        self.progress = replace(
            self.progress,
            step=done + 1,
            tokens=self.progress.tokens + result.tokens,
            seconds=self.progress.seconds + seconds,
        )
        if result.halvings:
            times = f"{result.halvings} times" if result.halvings > 1 else "once"
            self.tell(WarningEvent(step=done + 1, message=f"fp16 overflow: loss scale halved {times}, step redone"))
        self._tell_step(result, rate, batches.epoch(done + 1), seconds)

    def _set_learning_rate(self, done: int) -> float:
        settings = self.settings
        rate = learning_rate(
            settings.schedule,
            done=done,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
        )
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _tell_step(self, result: StepResult, rate: float, epoch: float, seconds: float) -> None:
        memory = memory_now(self.trainee.decoder.device)
        self.tell(
            StepEvent(
                step=self.progress.step,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                epoch=epoch,
                tokens=result.tokens,
                tokens_per_second=result.tokens / seconds,
                seconds=seconds,
                memory_active_gib=memory.active,
                memory_allocated_gib=memory.allocated,
                memory_reserved_gib=memory.reserved,
            )
        )

    def evaluation_is_due(self) -> bool:
        """At step 0, every `eval_every` steps and after the last, once each, where rows are held out."""
        step, every = self.progress.step, self.settings.eval_every
        now = step in (0, self.settings.steps) or (every > 0 and step % every == 0)
        return now and bool(self.dataset.eval) and self.progress.evaluated != step

    def evaluate(self) -> None:
        """Measure the held-out loss; the lowest after step 0 is kept as the checkpoint `best`.

        A signal ends it with nothing changed, so that it is due again.
        Raises TrainingError where the loss is not finite, FitError where memory does not suffice.
        """
        began, before, step = time.perf_counter(), self.progress, self.progress.step
        reset_peaks(self.trainee.decoder.device)
        try:
            with self._within_memory(f"step {step}, measuring the held-out loss", trains=False):
                held_out = held_out_loss(self.trainee.decoder, self.dataset.eval, between=self._evaluating)
        except _GivenUpError:
            return
        self._note_peak("evaluate")
        seconds = time.perf_counter() - began
        if not math.isfinite(held_out.loss):
            raise TrainingError(f"step {step}: the held-out loss is not finite{self._last_good()}", NOT_FINITE)
        best = step > 0 and (before.best_eval is None or held_out.loss < before.best_eval)
        self.progress = replace(
            before,
            seconds=before.seconds + seconds,
            evaluated=step,
            first_eval=held_out.loss if step == 0 else before.first_eval,
            last_eval=held_out.loss,
            best_eval=held_out.loss if best else before.best_eval,
            best_step=step if best else before.best_step,
        )
        self.tell(
            EvalEvent(
                step=step,
                loss=held_out.loss,
                perplexity=held_out.perplexity,
                tokens=held_out.tokens,
                seconds=seconds,
                best=best,
            )
        )
        if best:
            self.save("best")

    def _evaluating(self, rows: int) -> None:
        """Show that it goes on; raises _GivenUpError where a signal has come before the last rows are done."""
        total = len(self.dataset.eval)
        self.listener.on_progress(ProgressEvent("evaluation", self.progress.step, rows, total))
        if self.signals.received is not None and rows < total:
            raise _GivenUpError

    def save_is_due(self) -> bool:
        """Every `save_every` steps and after the last, once each."""
        step, every = self.progress.step, self.settings.save_every
        return step not in (0, self._saved) and (step == self.settings.steps or (every > 0 and step % every == 0))

    def save(self, checkpoint: Literal["last", "best"]) -> None:
        """Write a whole checkpoint in the place of the one before it."""
        began = time.perf_counter()
        save_checkpoint(self.run.checkpoints / checkpoint, self.trainee, self.progress, self.identity)
        if checkpoint == "last":
            self._saved = self.progress.step
        self.tell(SaveEvent(step=self.progress.step, checkpoint=checkpoint, seconds=time.perf_counter() - began))

    def interrupt(self, received: signal.Signals) -> NoReturn:
        """Save and raise Interrupted."""
        self.save("last")
        step = self.progress.step
        self.tell(InterruptEvent(step=step, signal=received.name))
        raise Interrupted(
            f"{received.name}: stopped after step {step} of {self.settings.steps}, the checkpoint is saved",
            "run the same command again with --resume to go on from there",
        )

    def finish(self) -> EndEvent:
        """Make the adapter of the checkpoint `best` (`last` where nothing was held out) the run's and the decoder's."""
        chosen: Literal["best", "last"] = "last" if self.progress.best_step is None else "best"
        folder = self.run.checkpoints / chosen
        recover_folder(folder)
        of = read_progress(folder)  # its own word: a GPU may find a slightly different best when a run is resumed
        with atomic_folder(self.run.adapter) as beside:
            shutil.copytree(folder / "adapter", beside, dirs_exist_ok=True)
            if self.hooks.companions is not None:
                self.hooks.companions(beside)
        return_freed()  # of the steps, lest the adapter's file, and what a caller does next, come on top of it
        load_adapter(self.trainee.decoder, self.run.adapter)
        self.trainee.decoder.eval()
        self.progress = replace(self.progress, best_eval=of.best_eval, best_step=of.best_step)
        end = EndEvent(
            step=self.progress.step,
            seconds=self.progress.seconds,
            tokens=self.progress.tokens,
            first_eval=self.progress.first_eval,
            last_eval=self.progress.last_eval,
            best_eval=of.best_eval,
            adapter_from=chosen,
            adapter_step=of.step,
        )
        self.tell(end)
        return end

    @contextmanager
    def _within_memory(self, doing: str, *, trains: bool) -> Iterator[None]:
        """The one place where running out of memory in training becomes a FitError."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            message = f"{doing}: out of memory on {self.settings.device}{self._last_good()}"
            layers = self.trainee.decoder.config.layers
            raise FitError(message, smaller(self.settings, layers, trains=trains)) from error

    def _last_good(self) -> str:
        return "" if self._saved is None else f"; the last checkpoint, of step {self._saved}, is whole"
