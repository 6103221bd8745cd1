"""Exports that are held against the run they came from: `luthier export`, and `luthier export RUN --verify` later.

    exported    write one export, verify it, leave exports/<kind>/verify.json
    again       verify what was exported before

The rows asked are held-out rows of the run; where they are gone, the samples in eval.json, and failing these a few
questions of ours: what is compared is two models, and any text does for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.markup import escape

from luthier.cli import console
from luthier.cli.exporting import KINDS, Wanted, export, install
from luthier.cli.verify_document import document_path, forget, has_passed, merge_document
from luthier.cli.working import stage
from luthier.errors import DataError, ExportError, FileError, FitError, LuthierError, ModelError, UsageError
from luthier.guard.documents import INDEX_BYTES, read_object
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.data.conversation import Example
    from luthier.data.render import Template
    from luthier.export.losses import MergeLosses
    from luthier.export.runtime import Precision
    from luthier.export.verify import Asked, Reference, Row, Verified
    from luthier.recipe.schema import Recipe

__all__ = ["Prover", "again", "export_all", "exported"]

ROWS, TOKENS, LONGEST = 48, 4096, 384
"""Held-out rows that are asked: so many at most, of so many tokens together, each cut at so many."""
LOSS_ROWS = 64
_UNREADABLE = (ExportError, ModelError, FileError, OSError, RuntimeError, ValueError, KeyError)
QUESTIONS = ("What colour is the sky?", "Tell me a story.", "How do I make tea?")


def exported(prover: Prover, wanted: Wanted, *, verify: bool = True) -> dict[str, object]:
    """Write one export of the run and, unless told otherwise, verify it; then have Ollama take it where that was asked.

    Raises ExportError where it is not the model; what was written stays, with its verify.json.
    """
    run, kind = prover.run, wanted.kind
    if kind == "gguf":  # whose folder keeps other files: what was found of this one holds no longer
        forget(run, kind, lambda file: file.startswith(f"model-{wanted.type}"))
    made = export(run, prover.recipe, prover.base, wanted)
    if verify:
        prover.prove_merge(kind)
        found = prover.prove(kind, Path(str(made["path"])))
        made |= {"verify": str(document_path(run, kind)), "verified": found.passed}
        if found.losses is not None:
            made["held_out_loss"] = asdict(found.losses)
    return install(made) if wanted.install else made


def export_all(prover: Prover, kinds: Sequence[str]) -> list[dict[str, object]]:
    """Write and verify them all; one that is not the model is an error when the others are written."""
    made: list[dict[str, object]] = []
    failed: list[ExportError] = []
    for kind in kinds:
        try:
            made.append(exported(prover, Wanted(kind)))
        except ExportError as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return made


def again(prover: Prover, kind: str | None) -> list[dict[str, object]]:
    """Verify the exports of the run that are there, or one kind of them.

    Raises UsageError where there is none or its runtime is not installed, ExportError where one is not the model.
    """
    from luthier.export.runtimes import RUNTIMES

    run = prover.run
    if kind is not None and kind not in RUNTIMES:
        raise UsageError(f"there is no export {kind!r} to verify", f"known: {', '.join(RUNTIMES)}")
    kinds = [one for one in RUNTIMES if kind in (None, one) and RUNTIMES[one].models(run.export(one))]
    if not kinds:
        what = "no export" if kind is None else f"no export {kind}"
        raise UsageError(f"{run.path} has {what} to verify", f"luthier export {run.path} --to {kind or 'hf'}")
    found: list[dict[str, object]] = []
    failed: list[ExportError] = []
    unasked: list[UsageError] = []
    for one in kinds:
        try:
            prover.prove_merge(one)
            proof = prover.prove(one, None)
        except ExportError as error:
            failed.append(error)
            continue
        if proof.passed is None:
            unasked.append(UsageError(proof.reason, proof.install or None))
        else:
            found.append(read_object(document_path(run, one), INDEX_BYTES))
    for wrong in (*failed, *unasked):
        raise wrong
    return found


@dataclass(frozen=True)
class Proof:
    """What was found of one export now; `passed` None: it could not be asked, and `reason` says why."""

    passed: bool | None
    reason: str = ""
    install: str = ""
    losses: MergeLosses | None = None


class Prover:
    """The models of one run, asked once each: what merged and exported models are held against."""

    def __init__(self, run: RunDirectory, recipe: Recipe, base: Path) -> None:
        self.run, self.recipe, self.base = run, recipe, base
        self._references: dict[str, Reference] = {}

    def prove_merge(self, kind: str) -> None:
        """What exports of `kind` are made of and held against: the merged model, verified itself where it has not been.

        Raises ExportError where it is not the model, or was made of another adapter than the run has now.
        """
        from luthier.export.origin import is_merged_from

        merged = self.run.export("hf")
        if not KINDS[kind].merged or not (merged / "config.json").is_file():
            return
        if not is_merged_from(merged, self.run.adapter):
            raise ExportError(
                f"{merged} was made of another adapter than {self.run.adapter} is now, and so were its exports",
                f"export again: luthier export {self.run.path} --to {kind}",
            )
        if kind != "hf" and not has_passed(self.run, "hf"):
            self.prove("hf", None)

    def prove(self, kind: str, path: Path | None) -> Proof:
        """Verify the exported model at `path` (None: all of this kind) and write verify.json.

        Raises ExportError where one is not the model.
        """
        from luthier.export.runtimes import RUNTIMES

        models = RUNTIMES[kind].models(self.run.export(kind))
        chosen = [model for model in models if path is None or path in (model, model.parent)]
        found = [self._one(kind, model) for model in chosen]
        losses = self._losses() if kind == "hf" and found[-1].passed is not None else None
        if losses is not None:
            _say_losses(losses, self.run)
        more: dict[str, object] = {} if losses is None else {"held_out_loss": asdict(losses)}
        merge_document(self.run, kind, [asdict(one) for one in found], {model.name for model in models}, more)
        for one in found:
            _say(kind, one)
        wrong = next((one for one in found if one.passed is False), None)
        if wrong is not None:
            listed = "\n".join(f"  {failure}" for failure in wrong.failures)
            raise ExportError(
                f"{self.run.export(kind) / wrong.file if kind != 'hf' else self.run.export(kind)} is not the model "
                f"that was trained, says {wrong.runtime}:\n{listed}",
                f"do not use this export; {document_path(self.run, kind)} has the figures, and another --quantize or "
                "--to may hold",
            )
        unasked = next((one for one in found if one.passed is None), None)
        return Proof(True, losses=losses) if unasked is None else Proof(None, unasked.reason, unasked.install)

    def _one(self, kind: str, model: Path) -> Verified:
        from luthier.export.runtimes import RUNTIMES
        from luthier.export.verify import Verified, missing, verify_model

        runtime = RUNTIMES[kind]
        absent = missing(runtime)
        if absent is not None:
            return _of(absent, model)
        try:
            precision = self._precision()
        except FitError as error:
            return Verified(model.name, None, runtime.package, reason=error.message)
        with console.waiting(f"verifying {kind} in {runtime.package}"), stage(f"{kind} was verified"):
            reference = self._reference(kind, precision)
            try:
                found = verify_model(runtime, model, self._asked, reference, precision)
                return self._with_modelfile(found, model.with_name("Modelfile")) if kind.startswith("ollama") else found
            except _UNREADABLE as error:  # it is for the runtime to open it; the others are asked all the same
                said = (f"{runtime.package} cannot open it: {error}",)
                return Verified(model.name, False, runtime.package, reference.name, failures=said)

    def _with_modelfile(self, found: Verified, path: Path) -> Verified:
        """And the template that Ollama asks by, held against the one that was trained."""
        from luthier.export.modelfile_check import check_modelfile

        checked = check_modelfile(path, self._template, self._asked.questions)
        failures = (*found.failures, checked.difference) if checked.identical is False else found.failures
        return replace(found, modelfile=checked, failures=failures, passed=not failures)

    def _reference(self, kind: str, precision: Precision) -> Reference:
        """Of the merged model; for that itself, and for exports of base and adapter apart, of base and adapter."""
        from luthier.export.origin import merged_onto

        merged = self.run.export("hf")
        of = "merged"
        if not KINDS[kind].merged:
            of = "16-bit"  # which such exports are made of, whatever was merged
        elif kind == "hf" or not (merged / "config.json").is_file():
            of = merged_onto(merged)
        if of not in self._references:
            self._references[of] = self._refer(of, merged, precision)
        return self._references[of]

    def _refer(self, of: str, merged: Path, precision: Precision) -> Reference:
        import torch

        from luthier.export.verify import refer
        from luthier.model.adapter import load_adapter
        from luthier.model.load import load_decoder

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        if of == "merged":
            return refer(load_decoder(merged, dtype=dtype), self._template, self._asked, "the merged model")
        decoder = load_decoder(self.base, dtype=dtype, quantize="nf4" if of == "nf4" else "none")
        load_adapter(decoder, self.run.adapter)
        return refer(decoder, self._template, self._asked, f"base ({of}) and adapter")

    def _precision(self) -> Precision:
        """fp32 where the memory that is free now holds the model in it, else bf16. Raises FitError."""
        import psutil

        from luthier.model.config import parameters, read_config

        count, free = parameters(read_config(self.base)), psutil.virtual_memory().available
        for precision, width in (("fp32", 4), ("bf16", 2)):
            if count * width * 1.3 < free:
                return cast("Precision", precision)
        needed = f"{count * 2 * 1.3 / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free"
        raise FitError(
            f"to verify this model takes {needed}", "verify on a larger machine: luthier export RUN --verify"
        )

    @cached_property
    def _template(self) -> Template:
        from luthier.data.render import make_template
        from luthier.data.tokenizer import load_tokenizer

        return make_template("model", load_tokenizer(self.run.adapter))

    @cached_property
    def _positions(self) -> int:
        """The model's context, or its window where that is shorter: some runtimes have the latter alone."""
        from luthier.model.config import read_config

        config = read_config(self.base)
        return min(config.max_positions, config.window or config.max_positions)

    @cached_property
    def _held_out(self) -> Sequence[Example]:
        """Held-out rows of the run, empty where they cannot be read any more: an export needs no rows."""
        from luthier.data.prepare import prepare
        from luthier.data.tokenizer import load_tokenizer
        from luthier.evaluate.questions import held_out_rows

        try:
            dataset = prepare(self.recipe, load_tokenizer(self.base))
            return held_out_rows(dataset, LOSS_ROWS)[1]
        except LuthierError as error:
            console.say(f"[dim]the run's rows cannot be read ({escape(error.message.splitlines()[0])})[/]")
            return ()

    @cached_property
    def _asked(self) -> Asked:
        from luthier.export.verify import Asked

        rows, source = self._rows(), "held-out rows of the run"
        if not rows:
            pairs, source = self._samples()
            rows = [self._as_row(question, answer) for question, answer in pairs]
        tokenizer = self._template.tokenizer
        prompts = (tokenizer.decode(row.ids[: row.answer], skip_special=True).strip() for row in rows)
        plain = [text for text in prompts if text and not tokenizer.control_pattern.search(text)]
        return Asked(tuple(rows), (*QUESTIONS, *plain[:ROWS]), source, self._positions)

    def _rows(self) -> list[Row]:
        from luthier.export.verify import Row

        rows: list[Row] = []
        total = 0
        for example in self._held_out[:ROWS]:
            ids = tuple(example.ids[:LONGEST].tolist())
            if len(ids) < 2 or total + len(ids) > TOKENS:
                continue
            rows.append(Row(ids, min(example.answer_start, len(ids) - 1)))
            total += len(ids)
        return rows

    def _samples(self) -> tuple[list[tuple[str, str]], str]:
        if self.run.evaluation.is_file():
            samples = read_object(self.run.evaluation, INDEX_BYTES).get("samples")
            pairs = [
                (str(one["prompt"]), str(one["reference"]))
                for one in (samples if isinstance(samples, list) else [])
                if isinstance(one, dict) and one.get("prompt") and one.get("reference")
            ]
            if pairs:
                return pairs, "samples in eval.json"
        return [(question, "I would like to know that too.") for question in QUESTIONS], "questions of our own"

    def _as_row(self, question: str, answer: str) -> Row:
        from luthier.data.conversation import Turn
        from luthier.export.verify import Row

        template = self._template
        prompt = template.prompt_ids([Turn("user", question)])
        ids = (*prompt, *template.tokenizer.encode(answer), template.end_of_turn)[:LONGEST]
        return Row(ids, min(len(prompt), len(ids) - 1))

    def _losses(self) -> MergeLosses | None:
        """Of a QLoRA run with held-out rows; None of others."""
        from luthier.cli.pins import pins_of
        from luthier.export.losses import merge_losses

        pins = pins_of(self.run, resume=False)
        if pins is None or pins.settings.quantize != "nf4" or not self._held_out:
            return None
        dtype = str(read_object(self.run.export("hf") / "config.json").get("dtype"))
        names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        with console.waiting("measuring what the merge costs on held-out rows"), stage("the losses were measured"):
            try:
                return merge_losses(
                    self.base,
                    self.run.adapter,
                    self._held_out,
                    names[dtype],  # type: ignore[arg-type]
                    pins.settings.precision,
                )
            except DataError:  # no held-out row has a label: there is no loss to give
                return None


def _of(absent: Verified, model: Path) -> Verified:
    return replace(absent, file=model.name)


def _say(kind: str, one: Verified) -> None:
    """One line on what was found, and where it does not hold what differs."""
    if one.passed is None:
        console.say(f"[yellow]{escape(kind)} was not verified[/]: {escape(one.reason)}")
        if one.install:
            console.say(f"  [bold]try:[/] {escape(one.install)}, then luthier export RUN --verify")
        return
    if one.argmax_agreement is None:  # it could not be opened
        console.say(f"[bold red]not the model[/] {escape(f'{kind} {one.file}')}: {escape(one.failures[0])}")
        return
    agreed = one.argmax_agreement
    asked = ""
    if one.threshold is not None and one.argmax_agreement_decided is not None:
        asked = f" ({one.argmax_agreement_decided:.2%} without near-ties; {one.threshold:.1%} is asked)"
    loss = "" if one.loss_increase is None else f", loss {one.loss_increase:+.4f}"
    ids = "the same" if one.tokens_identical else "other"
    said = (
        f"{ids} token ids in {one.texts} texts, the same next token at {agreed:.2%} of {one.tokens:,} places{asked}, "
        f"{one.continuations_identical} of {one.continuations} continuations the same{loss}"
    )
    if one.modelfile is not None and one.modelfile.identical is None:
        console.say(f"[yellow]its Modelfile was not verified[/]: {escape(one.modelfile.reason)}")
        console.say(f"  [bold]try:[/] {escape(one.modelfile.install)}, then luthier export RUN --verify")
    elif one.modelfile is not None and one.modelfile.identical:
        said += f"; the Modelfile's template writes {one.modelfile.conversations} conversations the same, in Go"
    word = "[green]verified[/]" if one.passed else "[bold red]not the model[/]"
    file = "" if one.file == kind else f" {one.file}"
    console.say(f"{word} {escape(kind + file)} ({one.weights}) in {escape(one.runtime)}: {escape(said)}")


def _say_losses(losses: MergeLosses, run: RunDirectory) -> None:
    console.say(
        f"held-out loss on {losses.rows} rows: {losses.trained:.4f} as trained (adapter on the NF4 base), "
        f"{losses.onto_16bit:.4f} merged into the 16-bit base, {losses.onto_quantised:.4f} merged into the quantised "
        f"one (luthier merge {escape(str(run.path))} --onto-quantised)"
    )
