"""What the loop does to a run between two steps: one method each, each leaving the state whole and its event told."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NoReturn

from luthier.data.batches import Batches
from luthier.errors import FitError, Interrupted, TrainingError
from luthier.evaluate.loss import held_out_loss
from luthier.kernels.choose import kernels_for
from luthier.plan.proof import Adopted, Load
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.checkpoint import Follows, Progress, made_with, take_snapshot
from luthier.train.events import (
    EndEvent,
    EvalEvent,
    Event,
    EventLog,
    InterruptEvent,
    Listener,
    ProgressEvent,
    ProofEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    tell,
)
from luthier.train.faults import fault, left_out, spike
from luthier.train.finish import choose_adapter, put_adapter
from luthier.train.hooks import Hooks
from luthier.train.identity import Identity, TrainingRows, identify
from luthier.train.keeper import Keeper
from luthier.train.limits import Stops
from luthier.train.making import make_batches
from luthier.train.manifest import digest
from luthier.train.memory import memory_now, memory_peak, out_of_memory, reset_peaks
from luthier.train.proof import Trial, step_down
from luthier.train.remedies import smaller
from luthier.train.saving import Saving
from luthier.train.schedule import learning_rate
from luthier.train.spikes import Spikes
from luthier.train.step import NOT_FINITE, NotFiniteError, StepError, StepResult, Trainee, take_step

__all__ = ["Session"]


class _GivenUpError(Exception):
    """The sitting is to end now, not when all held-out rows are measured."""


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
    stops: Stops
    hooks: Hooks
    keeper: Keeper
    notes: tuple[str, ...] = ()  # what the user is to be told as the sitting begins
    peaks: dict[str, float] = field(default_factory=dict)  # GiB, by phase
    recipe_sha256: str | None = field(init=False)
    _spikes: Spikes = field(init=False)
    _began: int = field(init=False)  # the step at which this sitting began
    _waits: bool = field(init=False, default=False)  # whether events wait for room on the disk
    saving: Saving = field(init=False)

    def __post_init__(self) -> None:
        self.saving = Saving(self.keeper, self.tell, self.log.settle)
        self.recipe_sha256 = digest(self.run.recipe) if self.run.recipe.is_file() else None
        self._spikes, self._began = Spikes.read(self.run.events), self.progress.step
        self._note_peak("load")

    def _note_peak(self, phase: str) -> None:
        peak = memory_peak(self.trainee.decoder.device).allocated
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0.0))

    @cached_property
    def batches(self) -> Batches:
        """The micro-batches of every step. Made anew where the proof has cut them smaller."""
        return make_batches(self.dataset, self.settings)

    def tell(self, event: Event) -> None:
        """Write the event down, then tell the listener. Raises TrainingError where it cannot be written, but for a
        disk without room."""
        waited, self._waits = self._waits, not self._written(event)
        self.stops.learn(event)
        tell(self.listener, event)
        if self._waits and not waited:
            message = f"no room on the disk of {self.run.path}: events wait in memory until there is some"
            tell(self.listener, WarningEvent(step=event.step, message=message, kind="disk"))

    def _written(self, event: Event) -> bool:
        try:
            return self.log.write(event)
        except OSError as error:
            self.keeper.collect(wait=True)  # and told by this message alone: the log has no place for it
            raise TrainingError(
                f"{self.run.events} cannot be written: {error.strerror}{self.saving.whole()}",
                "mend that disk, then run the same command again with --resume",
            ) from error

    def start(self) -> None:
        """Say what is about to be trained."""
        made = made_with(self.trainee.decoder.device)
        self.tell(
            StartEvent(
                step=self.progress.step,
                steps=self.settings.steps,
                train_rows=len(self.dataset.train),
                eval_rows=len(self.dataset.eval),
                trainable_parameters=sum(leaf.numel() for leaf in self.trainee.parameters.values()),
                torch=made.torch,
                threads=made.threads,
                processor=made.processor,
            )
        )
        decoder = self.trainee.decoder
        if notice := kernels_for(decoder.device, decoder.dtype, self.settings.attention).notice:
            self.tell(WarningEvent(step=self.progress.step, message=notice))
        self._tell_notes(self.notes)

    def _tell_notes(self, notes: tuple[str, ...]) -> None:
        for note in notes:
            self.tell(WarningEvent(step=self.progress.step, message=note))

    def prove(self) -> None:
        """Take the largest micro-batch forward and backward, with less at once where it is out of memory.

        Raises FitError where no plan of the same mathematics fits.
        """
        planned = self.settings
        trial = Trial(lambda settings: make_batches(self.dataset, settings).heaviest(), self._proving, self._step_down)
        with self._within_memory("the largest micro-batch, before the first step", trains=True):
            self.settings, proof = step_down(self.trainee, planned, trial, self.hooks.forecast)
        if proof is None:  # given up, for the sitting is to end: nothing is proved, so nothing is changed
            self.settings = planned
            self.trainee.decoder.checkpointing = planned.checkpointing
            return
        self._note_peak("train")
        if self.settings != planned:
            self._adopt(planned, proof.load)
        self.tell(ProofEvent.of(proof, self.progress.step))

    def _proving(self, load: Load, done: int, total: int) -> bool:
        """Show that it goes on; False where the sitting is to end."""
        self.listener.on_progress(ProgressEvent("proof", self.progress.step, done, total, load.tokens))
        return self.stops.reason is None

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
        self.__dict__.pop("batches", None)
        self.identity = identify(self.settings, self.dataset, self.identity.base, self.identity.weights)
        reason = (
            f"Out of memory in the proof with {self._ways(planned)}; "
            f"{self._ways(self.settings)} fits and has {self._same(planned, self.settings)}."
        )
        if self.hooks.adopt is not None:
            self.hooks.adopt(Adopted(self.settings, load, reason))

    def step(self, batches: Batches) -> None:
        """One optimizer step, with the micro-batches and the learning rate of its number.

        One whose loss or gradient is not finite is left out where `on_nonfinite` allows one more: it counts, and
        changes nothing. Raises TrainingError, naming step, rows and last checkpoint, before anything is updated;
        FitError, naming step and last checkpoint, where memory does not suffice.
        """
        done, device = self.progress.step, self.trainee.decoder.device
        rate = self._set_learning_rate(done)
        reset_peaks(device)
        began, micro_batches = time.perf_counter(), batches.step(done)
        try:
            with self._within_memory(f"step {done + 1}", trains=True):
                result = take_step(self.trainee, micro_batches, self.settings.clip)
        except StepError as error:
            if isinstance(error, NotFiniteError) and self.progress.skipped < self.settings.on_nonfinite:
                self._leave_out(error, time.perf_counter() - began)
                return
            raise fault(done + 1, error, self.progress.skipped, self.saving.last_good(), self.dataset) from error
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
        if (bound := self._spikes.add(result.loss)) is not None:
            rows = tuple(row for batch in micro_batches for row in batch.rows)
            self.tell(spike(done + 1, result.loss, bound, rows, self.dataset))

    def _leave_out(self, error: NotFiniteError, seconds: float) -> None:
        """Count the step, without an update."""
        self.trainee.optimizer.zero_grad(set_to_none=True)
        before = self.progress
        step, skipped = before.step + 1, before.skipped + 1
        self.progress = replace(before, step=step, seconds=before.seconds + seconds, skipped=skipped)
        self.tell(left_out(step, error, skipped, self.settings.on_nonfinite, self.dataset))

    def _set_learning_rate(self, done: int) -> float:
        rate = self._learning_rate(done)
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _learning_rate(self, done: int) -> float:
        settings = self.settings
        return learning_rate(
            settings.schedule,
            done=done,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
        )

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
        """Measure the held-out loss; the lowest after step 0 is kept as the best checkpoint.

        Where the sitting is to end it ends with nothing changed, so that it is due again.
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
            raise TrainingError(f"step {step}: the held-out loss is not finite{self.saving.last_good()}", NOT_FINITE)
        best = step > 0 and (before.best_eval is None or held_out.loss < before.best_eval)
        self.progress = replace(
            before,
            seconds=before.seconds + seconds,
            evaluated=step,
            first_eval=held_out.loss if step == 0 else before.first_eval,
            last_eval=held_out.loss,
            best_eval=held_out.loss if best else before.best_eval,
            best_step=step if best else before.best_step,
            history=(*before.history, (step, held_out.loss)),
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
        if best or (step > 0 and self.keeper.has(step)):  # a stop had it saved before it was measured
            self.save()

    def _evaluating(self, rows: int) -> None:
        """Show that it goes on; raises _GivenUpError where the sitting is to end before the last rows are done."""
        total = len(self.dataset.eval)
        self.listener.on_progress(ProgressEvent("evaluation", self.progress.step, rows, total))
        if rows < total and self.stops.reason is not None:
            raise _GivenUpError

    def save_is_due(self) -> bool:
        """Every `save_every` steps and after the last, once each."""
        step, every = self.progress.step, self.settings.save_every
        now = step == self.settings.steps or (every > 0 and step % every == 0)
        return now and step > 0 and not self.keeper.has(step)

    def save(self) -> None:
        """Take a snapshot of the state and begin to write it; `settle` tells what has come of it."""
        settings, step = self.settings, self.progress.step
        units = self.batches.units_per_epoch
        epoch, unit = divmod(step * settings.batch_size, units)
        follows = Follows(epoch, unit, units, self._learning_rate(step))
        self.saving.begin(take_snapshot(self.trainee, self.progress, self.identity, follows, self.recipe_sha256))

    def settle(self, *, must: str | None = None) -> None:
        """Tell what has come of the last `save`, where it is done; see `Saving.settle`."""
        self.saving.settle(self.progress.step, must=must)

    def why_stop(self) -> str | None:
        """Why the sitting is to end now; None: it goes on. Where all steps are done, the clock is no reason."""
        is_done = self.progress.step == self.settings.steps and not self.evaluation_is_due()
        return self.stops.asked if is_done else self.stops.reason

    def interrupt(self, reason: str) -> NoReturn:
        """Save and raise Interrupted."""
        step = self.progress.step
        stopped = f"{reason}: stopped after step {step} of {self.settings.steps}"
        self.saving.settle(step, wait=True)
        if not self.keeper.has(step):
            self.save()
            self.settle(must=stopped)
        self.tell(InterruptEvent(step=step, signal=reason if reason.startswith("SIG") else "", reason=reason))
        remedy = "run the same command again with --resume to go on from there"
        if reason.startswith("train.max_time") and step == self._began:
            remedy += "; this sitting had no time for a single step: it needs a longer train.max_time"
        if reason.startswith("the stop file"):
            remedy = f"remove {self.settings.stop_file}, then {remedy}"
        raise Interrupted(f"{stopped}, the checkpoint is saved", remedy)

    def finish(self) -> EndEvent:
        """Make the adapter of the best checkpoint (the last where nothing was held out) the run's and the decoder's."""
        self.settle(must="training is done, and its last checkpoint is not on disk")
        checkpoints = self.keeper.checkpoints
        done = choose_adapter(checkpoints, self.progress)
        self._tell_notes(done.notes)
        chosen = checkpoints.path(done.step)
        put_adapter(chosen, done.step, self.run.adapter, self.trainee.decoder, self.hooks.companions)
        self.progress = replace(self.progress, best_eval=done.best_eval, best_step=done.best_step)
        end = EndEvent(
            step=self.progress.step,
            seconds=self.progress.seconds,
            tokens=self.progress.tokens,
            first_eval=self.progress.first_eval,
            last_eval=self.progress.last_eval,
            best_eval=done.best_eval,
            adapter_from="last" if done.best_step is None else "best",
            adapter_step=done.step,
        )
        self.tell(end)
        with suppress(OSError):  # a disk without room, which has been told: the adapter is in place all the same
            self.log.settle()
        return end

    @contextmanager
    def _within_memory(self, doing: str, *, trains: bool) -> Iterator[None]:
        """The one place where running out of memory in training becomes a FitError."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            message = f"{doing}: out of memory on {self.settings.device}{self.saving.last_good()}"
            layers = self.trainee.decoder.config.layers
            raise FitError(message, smaller(self.settings, layers, trains=trains)) from error
