"""The whole flow, top to bottom: what `run` does, one function a stage.

    recipe -> prepare -> train -> evaluate -> export (merge first)

A stage takes what a recipe means on this machine (`Prepared`) and a run directory, leaves its files there, and tells on
stderr what it does. The commands call these, `run` calls all of them in order.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import orjson

from luthier.cli import console
from luthier.cli.loading import unfinished
from luthier.cli.resuming import check_free
from luthier.cli.working import sitting_began, stage, stopped_by
from luthier.errors import DataError, Interrupted, UsageError
from luthier.guard.documents import read_object
from luthier.lock import hold
from luthier.recipe.load import dump_recipe
from luthier.runs import SCHEMA_VERSION, RunDirectory, recover_folder, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from luthier.cli.preparing import Prepared
    from luthier.hardware.device import Device
    from luthier.model.decoder import Decoder
    from luthier.recipe.schema import Recipe
    from luthier.train.loop import TrainResult

__all__ = [
    "evaluate",
    "load_tuned",
    "reopen",
    "run_all",
    "train",
    "train_document",
]


_WORTH_MEASURING = 20.0
"""Seconds of a run after which three more, to measure the machine for the next plan, are no matter."""


def reopen(path: Path, sets: Sequence[str] = ()) -> tuple[RunDirectory, Recipe]:
    """A run directory that was trained in, and its recipe, changed by `sets`."""
    from luthier.recipe.load import load_recipe

    run = RunDirectory(path)
    if not run.recipe.is_file():
        raise UsageError(f"{path} is not a run directory: it has no {run.recipe.name}", "luthier train makes one")
    if not run.adapter.is_dir():
        with hold(path, "luthier"):
            if not recover_folder(run.adapter):  # a kill between two renames left the one before beside it
                raise unfinished(path)
    return run, load_recipe(run.recipe, sets)


def train(prepared: Prepared, run: RunDirectory, *, resume: bool) -> tuple[TrainResult, Decoder]:
    """Tune an adapter; leaves recipe.yaml, plan.json, data/data.json, events.jsonl, checkpoints/ and adapter/.

    The decoder that is given back holds the run's adapter. What plan.json says of the future, it is held against at the
    end; where the proof (train/proof.py) finds that less fits than planned, it is the plan that fits.
    """
    from luthier.model.fingerprint import fingerprint
    from luthier.plan.plan import as_document
    from luthier.plan.proof import Adopted, adopt, compared, expect, is_proved
    from luthier.train.display import make_display
    from luthier.train.loop import Hooks, check_resumable
    from luthier.train.loop import train as train_loop

    check_free(run, prepared.recipe, resume=resume)
    weights = fingerprint(prepared.base)
    check_resumable(run, prepared.dataset, prepared.plan.settings, prepared.base_name, weights)
    former = _measured(run)
    decoder = _load(prepared, "")
    began = time.monotonic()
    write_text(run.recipe, dump_recipe(prepared.recipe))
    plan = prepared.plan
    write_json(run.plan, {**as_document(plan), "measured": former})
    _write_data(prepared, run)

    def adopts(adopted: Adopted) -> None:
        nonlocal plan
        plan = adopt(plan, adopted)
        write_json(run.plan, {**as_document(plan), "measured": former})

    with _stopped_at_once(run):
        result = train_loop(
            decoder,
            prepared.dataset,
            prepared.plan.settings,
            run,
            base=prepared.base_name,
            listener=make_display(),
            resume=resume,
            hooks=Hooks(
                companions=lambda folder: _beside_adapter(folder, prepared, weights),
                forecast=lambda settings, load: expect(prepared.plan, settings, load),
                adopt=adopts,
                prove=is_proved(plan.device, plan.memory),
                began=sitting_began(),
                step_seconds=plan.time.step_seconds,
                weights=weights,
            ),
        )
    if "train" in result.measured.peaks:  # else all was done before: what was measured then stays
        found = compared(plan, result.measured)
        write_json(run.plan, {**as_document(plan), "measured": found})
        console.say(f"[dim]{_held_against(found)}[/]")
        if time.monotonic() - began > _WORTH_MEASURING:
            _measure_machine(plan.device)
    return result, decoder


def _beside_adapter(folder: Path, prepared: Prepared, weights: str) -> None:
    """As PEFT's users do: the adapter's folder alone then says how to talk to it; and which base it belongs to."""
    from luthier.export.merge import write_tokenizer
    from luthier.export.origin import note_base

    write_tokenizer(prepared.base, folder, prepared.dataset.template)
    note_base(folder, prepared.base_name, weights)


@contextmanager
def _stopped_at_once(run: RunDirectory) -> Iterator[None]:
    """Say what there is to go on from where a second signal leaves the training wherever it was."""
    from luthier.train.checkpoints import Checkpoints

    try:
        yield
    except KeyboardInterrupt as stop:
        newest = Checkpoints(run.checkpoints).steps()
        good = f"the newest checkpoint is of step {newest[0]}" if newest else "there is no checkpoint yet"
        raise Interrupted(f"{stopped_by(stop)}: stopped at once; {good}") from stop


def _measure_machine(device: Device) -> None:
    """Measure this machine's speed, once, for the plans to come: after a run, for before it the first step would wait.

    What draws random numbers afterwards draws those that it would have drawn.
    """
    from luthier.hardware.calibrate import calibrate, stored_rates

    if stored_rates(device) is not None:
        return
    import torch

    from luthier.train.timed import KernelsTimed

    cards = range(torch.cuda.device_count())
    with torch.random.fork_rng(cards), console.waiting("measuring this machine's speed for the next plan, once"):
        try:
            calibrate(device, timed=KernelsTimed(device))
        except UsageError as error:  # no place to keep it: the run is whole all the same
            console.say(f"[dim]{error.message}[/]")


def _measured(run: RunDirectory) -> object:
    """What an earlier sitting of the run measured; None where none has come to its end."""
    return read_object(run.plan).get("measured") if run.plan.is_file() else None


def _held_against(found: Mapping[str, object]) -> str:
    """Memory and speed, as they were and as predicted, in one line."""

    def figure(name: str, form: str, unit: str) -> str:
        value, predicted, error = (
            cast("float | None", found[f"{kind}{name}"]) for kind in ("", "predicted_", "error_")
        )
        if value is None or predicted is None or error is None:
            return f"{name.replace('_', ' ')} not known"
        return f"{value:{form}} {unit} (predicted {predicted:{form}}, {error:+.0%})"

    memory, step = figure("peak_gib", ".2f", "GiB"), figure("step_seconds", ".3g", "s")
    return f"memory at most {memory}; a step {step}; {figure('tokens_per_second', ',.0f', 'tokens/s')}"


def _write_data(prepared: Prepared, run: RunDirectory) -> None:
    """data/data.json, and the rejected rows where there are any."""
    from luthier.data.prepare import rejected_rows

    dataset = prepared.dataset
    write_json(run.data, {**dataset.report.as_document(), "digest": prepared.digest})
    if dataset.report.rejected:
        problems = rejected_rows(dataset.sources, dataset.store)
        rows = zip(problems, dataset.store.rejected(), strict=True)
        lines = [orjson.dumps({**problem._asdict(), "raw": row.raw}).decode() for problem, row in rows]
        write_text(run.rejected, "\n".join(lines) + "\n")


def _load(prepared: Prepared, more: str) -> Decoder:
    from luthier.cli.loading import load_base

    settings = prepared.plan.settings
    with console.waiting(f"loading {prepared.recipe.model}{more}"), stage("the model was loaded"):
        return load_base(prepared.base, settings.precision, settings.device, settings.quantize)


def load_tuned(prepared: Prepared, run: RunDirectory) -> Decoder:
    """The base as it was trained on, with the run's adapter."""
    from luthier.model.adapter import load_adapter

    decoder = _load(prepared, " and its adapter")
    load_adapter(decoder, run.adapter)
    return decoder.eval()


def evaluate(prepared: Prepared, run: RunDirectory, decoder: Decoder | None = None) -> dict[str, object]:
    """Base against tuned on held-out rows; leaves eval.json and gives its document. Loads the model where not given.

    Raises DataError where the rows are no longer those of the run: what is held out now may have been trained on.
    """
    from luthier.evaluate.compare import as_document, compare
    from luthier.train.attention import attention_of

    if read_object(run.data).get("digest") != prepared.digest:
        raise DataError(
            f"the data is not what {run.path} was trained on, so nothing says which rows were held out",
            "put the rows back as they were, or train again on the new ones",
        )
    decoder = load_tuned(prepared, run) if decoder is None else decoder
    with (
        stage("base and tuned were compared"),
        attention_of(decoder, prepared.plan.settings.attention),
        console.counting("holding base against tuned on held-out rows") as advance,
    ):
        comparison = compare(decoder, prepared.dataset, prepared.recipe.evaluate, progress=advance)
    document = as_document(comparison)
    write_json(run.evaluation, document)
    return document


def run_all(prepared: Prepared, run: RunDirectory, *, resume: bool) -> dict[str, object]:
    """Every stage in order; gives what each came to."""
    from luthier.cli import show
    from luthier.cli.proving import Prover, export_all

    show.data(prepared)
    show.plan(prepared)
    result, decoder = train(prepared, run, resume=resume)
    evaluated: dict[str, object] | None = None
    if prepared.dataset.eval or prepared.dataset.test:
        evaluated = evaluate(prepared, run, decoder)
    del decoder  # exports read files: its memory is theirs
    exported = export_all(Prover(run, prepared.recipe, prepared.base), prepared.recipe.export)
    return {
        "schema": SCHEMA_VERSION,
        "run": str(run.path),
        "plan": read_object(run.plan),
        "train": train_document(result, run),
        "evaluation": evaluated,
        "exports": exported,
    }


def train_document(result: TrainResult, run: RunDirectory) -> dict[str, object]:
    """What training came to, for `--json`; `measured` as in plan.json, beside what was predicted."""
    return {**asdict(result), "adapter": str(result.adapter), "measured": _measured(run)}
