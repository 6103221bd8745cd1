"""What checkpoints cost a run, and how long a resumed run takes to its first step.

    python benchmarks/resume.py cost MODEL [--steps 4] [--rank 16] [--rows 8] [--length 256]
    python benchmarks/resume.py start [--at 10000] [--rows 1000000]

cost: how long training stands still for a checkpoint, and how much a core has to compute to write it in the background,
set against fifty steps. Both are measured by themselves, for in fifty steps they are smaller than steps differ. The
share counts every second computed in the background as if the steps stood still for it, and the slowest of the
checkpoints. MODEL is a model's folder, or sprig.

start: from the call of `train` to the first step, at step 0 and resumed at step 10,000, of a data set of a million
rows, with packing and without. The claim: within 2 s of each other.

A JSON document on stdout; benchmarks/results/resume.json holds those of one machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.conversation import Example, Source
from luthier.hardware.probe import this_device
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.checkpoint import Follows, Progress, take_snapshot
from luthier.train.checkpoints import Checkpoints
from luthier.train.events import (
    EndEvent,
    EvalEvent,
    EventLog,
    InterruptEvent,
    ProgressEvent,
    ProofEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from luthier.train.identity import identify
from luthier.train.keeper import Keeper, Saved
from luthier.train.loop import train
from luthier.train.making import make_trainee
from luthier.train.optimizer import allocate_state

LIMIT_SECONDS = 2.0
LIMIT_SHARE = 0.02
EVERY = 50
SAVES = 6
SECONDS = ("stops", "writes", "computes")

SETTINGS = Settings(
    rank=16, alpha=32.0, dropout=0.0,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), scale="standard",
    quantize="none", precision="bf16", steps=8, batch_size=8, micro_batch=8, learning_rate=1e-4, schedule="constant",
    warmup_steps=0, optimizer="adamw", weight_decay=0.0, clip=1.0, checkpointing=0, attention="flash", max_length=256,
    packing=False, longest_first=False, train_on="all", prompt_loss_weight=0.0, long_rows="truncate", eval_every=0,
    save_every=0, seed=0, device="cpu",
)  # fmt: skip


class Rows:
    """Rows of random tokens, made when they are read; their lengths are known, as those of the store are."""

    def __init__(self, count: int, longest: int) -> None:
        random = np.random.default_rng(0)
        self.lengths: NDArray[np.int32] = random.integers(longest // 2, longest + 1, size=count).astype(np.int32)
        self.weights: NDArray[np.float64] = np.ones(count)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Example:  # type: ignore[override]
        ids = np.random.default_rng(row).integers(20, 400, size=int(self.lengths[row])).astype(np.int32)
        return Example(ids, ids, int(row))


@dataclass
class Data:
    """As training sees a data set, with nothing held out."""

    train: Rows
    digest: str = "made up"

    @property
    def eval(self) -> tuple[Example, ...]:
        return ()

    @property
    def places(self) -> tuple[Source, ...]:
        return ()


class StopError(Exception):
    """The first step is done."""


class Clock:
    """A listener that notes when each step was done, and stops at the first where it is to."""

    def __init__(self, *, first_only: bool) -> None:
        self.first_only, self.steps, self.saves, self.at = first_only, list[float](), list[float](), -1

    def on_start(self, event: StartEvent) -> None:
        self.at = event.step

    def on_step(self, _event: StepEvent) -> None:
        self.steps.append(time.perf_counter())
        if self.first_only:
            raise StopError

    def on_save(self, event: SaveEvent) -> None:
        self.saves.append(event.seconds)

    def on_proof(self, event: ProofEvent) -> None: ...
    def on_progress(self, event: ProgressEvent) -> None: ...
    def on_eval(self, event: EvalEvent) -> None: ...
    def on_warning(self, event: WarningEvent) -> None: ...
    def on_interrupt(self, event: InterruptEvent) -> None: ...
    def on_end(self, event: EndEvent) -> None: ...
    def close(self) -> None: ...


def first_step(settings: Settings, data: Data, folder: Path, at: int) -> float:
    """Seconds from the call to the first step, of a run that is at step `at`."""
    base = locate_model("sprig")
    run = RunDirectory(folder)
    if at:
        trainee = make_trainee(load_decoder(base, dtype=torch.bfloat16), settings)
        allocate_state(trainee.optimizer, trainee.parameters)
        keeper = Keeper(Checkpoints(run.checkpoints), 1, None)
        follows = Follows(0, 0, 1, 0.0)
        keeper.begin(take_snapshot(trainee, Progress(step=at), identify(settings, data, "sprig"), follows, None))
        if not isinstance(keeper.collect(wait=True), Saved):
            raise SystemExit("the checkpoint to resume from could not be written")
        line = StepEvent(
            step=1, loss=1.0, learning_rate=1e-4, grad_norm=1.0, epoch=0.1, tokens=1000, tokens_per_second=1e3,
            seconds=1.0, memory_active_gib=1.0, memory_allocated_gib=1.0, memory_reserved_gib=1.0,
        )  # fmt: skip
        with EventLog.opened(run.events) as log:
            for step in range(1, at + 1):
                log.write(replace(line, step=step))
    decoder, clock = load_decoder(base, dtype=torch.bfloat16), Clock(first_only=True)
    began = time.perf_counter()
    try:
        train(decoder, data, settings, run, base="sprig", listener=clock, resume=True)
    except StopError:
        if clock.at != at:
            raise SystemExit(f"the run began at step {clock.at}, not at {at}") from None
        return clock.steps[0] - began
    raise SystemExit("no step was taken")


def start(rows: int, at: int) -> dict[str, object]:
    found: dict[str, object] = {"data_rows": rows, "at": at, "limit_seconds": LIMIT_SECONDS}
    data = Data(Rows(rows, 64))
    for packing in (False, True):
        settings = replace(SETTINGS, steps=10**6, packing=packing, max_length=128)
        with tempfile.TemporaryDirectory() as folder:
            seconds = {step: first_step(settings, data, Path(folder) / str(step), step) for step in (0, at)}
        name = "packed" if packing else "unpacked"
        found[name] = {"from_0": seconds[0], "resumed": seconds[at], "later": seconds[at] - seconds[0]}
    return found


def step_seconds(model: str, settings: Settings, data: Data) -> list[float]:
    """Of each step but the first, of a run without checkpoints on the way."""
    with tempfile.TemporaryDirectory() as folder:
        decoder, clock = load_decoder(locate_model(model), dtype=torch.bfloat16), Clock(first_only=False)
        train(decoder, data, settings, RunDirectory(Path(folder)), base=model, listener=clock)
    return [after - before for before, after in pairwise(clock.steps)]


@dataclass(frozen=True)
class Save:
    """Seconds of one checkpoint: `stops`, in which no step is taken (the copy of the state, the log's flush); then, in
    a thread, `writes` by the clock, `computes` of a core's time; and what it comes to on disk."""

    stops: float
    writes: float
    computes: float
    bytes: int


def saves(model: str, settings: Settings, data: Data, count: int) -> list[Save]:
    """Checkpoints one after another with nothing else going on, so that the process's own time is all theirs."""
    trainee, found = make_trainee(load_decoder(locate_model(model), dtype=torch.bfloat16), settings), list[Save]()
    allocate_state(trainee.optimizer, trainee.parameters)
    identity = identify(settings, data, model)
    with tempfile.TemporaryDirectory() as folder, EventLog.opened(Path(folder) / "events.jsonl") as log:
        keeper = Keeper(Checkpoints(Path(folder) / "checkpoints"), 3, None)
        for step in range(1, count + 1):
            began = time.perf_counter()
            snapshot = take_snapshot(trainee, Progress(step=step), identity, Follows(0, step, step, 0.0), None)
            log.settle()
            computed = time.process_time()
            keeper.begin(snapshot)
            stopped = time.perf_counter()
            if not isinstance(keeper.collect(wait=True), Saved):
                raise SystemExit("a checkpoint could not be written")
            written, computed = time.perf_counter() - stopped, time.process_time() - computed
            size = sum(path.stat().st_size for path in keeper.checkpoints.path(step).rglob("*") if path.is_file())
            found.append(Save(stopped - began, written, computed, size))
    return found


def cost(model: str, steps: int, rank: int, rows: int, length: int) -> dict[str, object]:
    settings = replace(SETTINGS, steps=steps + 1, rank=rank, batch_size=rows, micro_batch=rows, max_length=length)
    data = Data(Rows(rows * (steps + 2), length))
    all_steps, all_saves = step_seconds(model, settings, data), saves(model, settings, data, SAVES)
    step = statistics.median(all_steps)
    # As if every second that the writing thread computes were taken from the steps: they have all cores.
    most = max(save.stops + save.computes for save in all_saves)
    return {
        "model": Path(model).name,
        "rank": rank,
        "tokens_per_step": int(data.train.lengths.mean() * rows),
        "checkpoint_bytes": all_saves[0].bytes,
        "step_seconds": step,
        "save": {name: statistics.median(getattr(one, name) for one in all_saves) for name in SECONDS},
        "every": EVERY,
        "share_stops_alone": max(save.stops for save in all_saves) / (EVERY * step),
        "share": most / (EVERY * step),
        "limit_share": LIMIT_SHARE,
        "all_steps": all_steps,
        "all_saves": [asdict(save) for save in all_saves],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    costing = commands.add_parser("cost")
    costing.add_argument("model")
    for name, value in (("steps", 4), ("rank", 16), ("rows", 8), ("length", 256)):
        costing.add_argument(f"--{name}", type=int, default=value)
    starting = commands.add_parser("start")
    for name, value in (("at", 10_000), ("rows", 1_000_000)):
        starting.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    if asked.command == "cost":
        found = cost(asked.model, asked.steps, asked.rank, asked.rows, asked.length)
    else:
        found = start(asked.rows, asked.at)
    device = this_device()
    machine = {"cpu": device.name, "cores": device.cores, "threads": torch.get_num_threads()}
    machine |= {"memory_gib": device.memory_gib, "torch": torch.__version__}
    print(json.dumps({asked.command: found, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
