"""The engines' one thread: answers wait in one queue, take free slots in their order, and are stepped in turn.

    event loop                      this thread
    submit(jobs)   -> waiting  ->   a free slot: engines[model].add
                                    each engine that has work: step()
    Answer wakes   <- one call <-   the events of all that was written in a step
    cancel(jobs)   -> dropped  ->   engines[model].cancel: the slot is free after the step that is under way

Each model has an engine of its own over the same base tensors; slots are counted over all. A step that raises fails the
answers of its engine, which is made anew; after FAULTS of them without a token between, the server says that it is not
well. What an answer comes to does not depend on the thread: it is the engine's.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import LuthierError
from luthier.generate.engine import Engine
from luthier.generate.request import Event, Request
from luthier.serve.limits import Limits
from luthier.serve.metrics import Metrics
from luthier.serve.models import Served
from luthier.serve.refusals import Refusal, of_error

__all__ = ["FAULTS", "Job", "Scheduler"]

FAULTS = 3
"""Steps of one model that may fail one after another before the server calls itself unwell."""

_RETRY = {"Retry-After": "1"}


class Job:
    """One answer that is being made. `events` and `failure` belong to the event loop's thread, `number` to the other.

    `wake` is called on the loop when something has come.
    """

    def __init__(self, model: str, request: Request, wake: Callable[[Job], None]) -> None:
        self.model, self.request, self.wake = model, request, wake
        self.events: list[Event] = []
        self.failure: Refusal | None = None
        self.ended = False
        self.number = -1
        self.queued = time.monotonic()
        self.first = False

    def put(self, event: Event) -> None:
        """Another token of it."""
        self.events.append(event)
        self.ended = event.finish is not None
        self.wake(self)

    def fail(self, failure: Refusal) -> None:
        """It ends with an error; what comes later is not looked at."""
        if not self.ended:
            self.failure, self.ended = failure, True
            self.wake(self)


class Scheduler:
    """Runs `models`' engines; made and used on the event loop, but for its own thread."""

    def __init__(
        self, models: Mapping[str, Served], limits: Limits, metrics: Metrics, log: Callable[[str], None]
    ) -> None:
        """`log` is told of steps that failed, with their traceback."""
        self._models, self._limits, self._metrics, self._log = models, limits, metrics, log
        self._loop = asyncio.get_running_loop()
        self._engines = {name: self._engine(name) for name in models}
        self._jobs: dict[tuple[str, int], Job] = {}
        self._faults = dict.fromkeys(models, 0)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._dropped: deque[Job] = deque()
        self._running = 0
        self._ending = False
        self._dead: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _engine(self, name: str) -> Engine:
        model = self._models[name]
        return Engine(model.decoder, _decode_with(model.template.tokenizer), slots=self._limits.slots)

    def start(self) -> None:
        """Begin the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End the thread after the step that is under way; wait up to `seconds` for it."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def unwell(self) -> str | None:
        """Why it should not be given more to do; None while all is well."""
        if self._dead is not None:
            return self._dead
        broken = [name for name, faults in self._faults.items() if faults >= FAULTS]
        return f"the last {FAULTS} steps of {', '.join(broken)} failed" if broken else None

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the answers to one request. Raises Refusal: 429 where there is no place for all, 500 where it is dead,
        400 where there never would be."""
        with self._changed:
            if self._dead is not None or self._ending:
                raise Refusal(503, self._dead or "The server is stopping.", code="unavailable")
            places = self._limits.slots + self._limits.queue
            if len(jobs) > places:
                raise Refusal(400, f"{len(jobs)} answers at once were asked for, {places} is the most here.", param="n")
            if self._running + len(self._waiting) + len(jobs) > places:
                said = f"The queue is full ({self._limits.queue} wait already): try again in a moment."
                raise Refusal(429, said, code="queue_full", headers=_RETRY)
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Take back those that have not ended. Nothing comes of them after this."""
        left = [job for job in jobs if not job.ended]
        if not left:
            return
        for job in left:
            job.ended = True
        self._metrics.cancelled.inc(len(left))
        with self._changed:
            self._dropped.extend(left)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._take():
                for name, engine in tuple(self._engines.items()):
                    if not engine.idle:
                        self._step(name, engine)
        except Exception as error:  # noqa: BLE001  (a defect: it is told, every answer fails with it, /health says so)
            if self._ending:  # the event loop has gone meanwhile
                return
            self._log(f"the engines' thread has ended: {''.join(traceback.format_exception(error))}")
            with self._changed:
                self._dead = f"the engines' thread has ended: {type(error).__name__}"
                jobs = [*self._waiting, *self._jobs.values()]
                self._waiting.clear()
            self._fail(jobs, error)

    def _take(self) -> bool:
        """Do as was asked meanwhile, and wait where there is nothing to do. False: end."""
        with self._changed:
            while not (self._ending or self._waiting or self._dropped or self._running):
                self._changed.wait()
            while self._dropped:
                self._drop(self._dropped.popleft())
            while self._waiting and self._running < self._limits.slots:
                self._admit(self._waiting.popleft())
            self._count()
            return not self._ending

    def _admit(self, job: Job) -> None:
        try:
            job.number = self._engines[job.model].add(job.request)
        except LuthierError as error:  # prepare.py has asked the same before; should they ever differ, one answer fails
            self._loop.call_soon_threadsafe(job.fail, of_error(error))
            return
        self._jobs[job.model, job.number] = job
        self._running += 1

    def _drop(self, job: Job) -> None:
        if job.number < 0:
            if job in self._waiting:
                self._waiting.remove(job)
        elif self._jobs.get((job.model, job.number)) is job:  # a new engine may have given its number to another
            del self._jobs[job.model, job.number]
            self._engines[job.model].cancel(job.number)
            self._running -= 1

    def _count(self) -> None:
        self._metrics.running.set(self._running)
        self._metrics.waiting.set(len(self._waiting))

    def _step(self, name: str, engine: Engine) -> None:
        began = time.perf_counter()
        try:
            events = engine.step()
        except Exception as error:  # noqa: BLE001  (told, counted, and the answers that it was of fail with it)
            self._recover(name, error)
            return
        self._metrics.step.labels(name).observe(time.perf_counter() - began)
        if not events or self._ending:
            return
        self._faults[name] = 0
        self._metrics.tokens.labels(name).inc(len(events))
        pairs = [(self._jobs[name, event.request], event) for event in events]
        ended = [job for job, event in pairs if event.finish is not None]
        now = time.monotonic()
        for job, _ in pairs:
            if not job.first:
                job.first = True
                self._metrics.first.labels(name).observe(now - job.queued)
        if ended:
            with self._changed:
                for job in ended:
                    del self._jobs[name, job.number]
                self._running -= len(ended)
                self._count()
        self._loop.call_soon_threadsafe(_deliver, pairs)

    def _recover(self, name: str, error: Exception) -> None:
        """The engine's caches may be half-written: its answers fail, and it is made anew over the same weights."""
        self._log(f"a step of {name} failed: {''.join(traceback.format_exception(error))}")
        self._metrics.faults.labels(name).inc()
        with self._changed:
            self._faults[name] += 1
            jobs = [job for (model, _), job in self._jobs.items() if model == name]
            self._jobs = {key: job for key, job in self._jobs.items() if key[0] != name}
            self._running -= len(jobs)
            self._count()
        self._fail(jobs, error)  # first: there may be no memory for what comes now
        self._engines[name] = self._engine(name)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """These answers end with 500. The error's own words may tell of the machine: they go to the log."""
        failure = Refusal(
            500, f"The engine failed ({type(error).__name__}); the server's log says more.", code="engine"
        )
        for job in jobs:
            self._loop.call_soon_threadsafe(job.fail, failure)


def _deliver(pairs: Sequence[tuple[Job, Event]]) -> None:
    for job, event in pairs:
        if not job.ended:
            job.put(event)


def _decode_with(tokenizer: ChatTokenizer) -> Callable[[Sequence[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special=True)
