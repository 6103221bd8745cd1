"""Is an export the model that was trained? The program that people run it in is asked, and held against a reference.

    adapter on its base  ->  merged (in transformers)  ->  each export (in its own runtime)

Each link is checked by itself: what is merged against base and adapter, every other export against what is merged.

    token ids       of held-out conversations, of texts that tokenizers differ on, of prompts by the chat template
    stop tokens     all that the template ends an answer with
    next tokens     teacher-forced over held-out rows: at how many places the likeliest token is the same one
    continuations   greedy, by the runtime's own cache and stop tokens
    loss            of the held-out answers, by both

Ids must be equal, all of them. How many next tokens must be is set by the type of the weights (`THRESHOLDS`); rounding
turns near-ties (`NEAR`), which say nothing of an export and are not counted against it. A continuation may part from
the reference where that is nearly undecided itself (`UNDECIDED`), for all that comes after is another text then; where
it is not, the export fails.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.conversation import Turn
from luthier.data.jinja_chat import dated
from luthier.data.render import Template
from luthier.export.modelfile_check import ModelfileChecked
from luthier.export.runtime import Precision, Runtime, RuntimeKind
from luthier.generate.generate import generate
from luthier.model.decoder import Decoder

__all__ = ["THRESHOLDS", "Asked", "Difference", "Reference", "Row", "Verified", "missing", "refer", "verify_model"]

THRESHOLDS: Mapping[str, float] = {"F32": 0.995, "F16": 0.995, "BF16": 0.995, "Q8_0": 0.98, "8-bit": 0.98}
"""Type of the weights -> the least share of places with the same likeliest token, or a near-tie; of few places, to a
whole one. Other types have none: what their rounding costs is what they are chosen for, and is told."""

NEAR: Mapping[str, float] = {"F32": 0.05, "F16": 0.05, "BF16": 0.1, "Q8_0": 0.2, "8-bit": 0.2}
"""Type -> by how much (nats) the reference may prefer its own token of a near-tie: what rounding moves."""

UNDECIDED: Mapping[str, float] = {"F32": 0.5, "F16": 0.5, "BF16": 0.5, "Q8_0": 1.0, "8-bit": 1.0}
"""Type -> by how much (nats) the reference may prefer its own token where a continuation goes another way."""

MOST_LOSS = 1.0
"""Nats a token by which the held-out loss of any export may be higher: beyond that it is not the model any more."""

BF16_THRESHOLD = 0.98
"""Where memory is too short for fp32 both sides compute in bf16, whose own rounding turns near-ties."""

PROBES = (
    "   leading and trailing   ",
    "tabs\t\tand\r\nlines\n\n\n  and  runs     of spaces",
    "I'm we'll THEY'RE it'S 'tis don't",
    "1234567890 3.14159 1,000,000 x²",
    "emoji 🦙👩‍👩‍👧 🇩🇪 ✈️",
    "日本語のテキスト 한국어 العربية ไทย 中文",
    "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i] * 0x1F;  // \\n\n}",
    "¿Qué? «naïve» — “quotes” … ½",
    "\u00a0no-break\u3000wide",
    "a",
    " ",
    "\n",
)
"""Texts on which tokenizers differ."""

CONTINUED, LIMIT = 8, 32
"""Prompts that are continued, and by how many tokens at most."""
TOP = 5


@dataclass(frozen=True)
class Row:
    """A held-out row: its tokens, and how many of them come before the last answer."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Asked:
    """What is asked of both: rows, questions for the chat template, and where they are from; nothing is continued
    beyond `positions`."""

    rows: tuple[Row, ...]
    questions: tuple[str, ...]
    source: str
    positions: int = 2**62

    @property
    def context(self) -> int:
        """Tokens of the longest text, with its continuation, in hundreds."""
        longest = max((len(row.ids) for row in self.rows), default=1)
        return -(-(longest + LIMIT + 1) // 128) * 128


@dataclass(frozen=True)
class _Line:
    """The reference on one text: its likeliest tokens at each place, best first, their logits, and log Σ exp."""

    ids: NDArray[np.int64]  # (T, TOP)
    logits: NDArray[np.float32]  # (T, TOP)
    losses: NDArray[np.float32]  # (T - 1,), of the text's own next tokens

    def gap(self, place: int, token: int) -> float:
        """By how much its own choice at `place` is likelier than `token`, in nats; at least that beyond the TOP."""
        found = np.flatnonzero(self.ids[place] == token)
        return float(self.logits[place, 0] - self.logits[place, found[0] if len(found) else -1])


@dataclass(frozen=True)
class Reference:
    """What the model says that an export is held against; `name` says which model it is."""

    name: str
    template: Template
    lines: tuple[_Line, ...]
    continued: tuple[tuple[tuple[int, ...], _Line], ...]


@dataclass(frozen=True)
class Difference:
    """Where an export is otherwise first, and by how much (`gap`, nats) the reference holds its own to be likelier."""

    what: str
    row: int | None = None
    position: int | None = None
    expected: str = ""
    found: str = ""
    gap: float | None = None

    def __str__(self) -> str:
        where = "" if self.row is None else f" in row {self.row}"
        where += "" if self.position is None else f" at token {self.position}"
        return f"{self.what}{where}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Verified:
    """What became of one exported model; `passed` None: it was not verified, and `reason` says why."""

    file: str
    passed: bool | None
    runtime: str
    against: str = ""
    weights: str = ""
    precision: str = ""
    source: str = ""
    texts: int = 0
    tokens_identical: bool | None = None
    tokens: int = 0
    argmax_agreement: float | None = None
    argmax_agreement_decided: float | None = None  # near-ties counted as the same
    threshold: float | None = None
    continuations: int = 0
    continuations_identical: int = 0
    loss_reference: float | None = None
    loss: float | None = None
    loss_increase: float | None = None
    first_difference: Difference | None = None
    failures: tuple[str, ...] = ()
    reason: str = ""
    install: str = ""
    modelfile: ModelfileChecked | None = None


def missing(kind: RuntimeKind) -> Verified | None:
    """The result where the runtime of this kind is not installed; None where it is."""
    if importlib.util.find_spec(kind.module) is not None:
        return None
    reason = f"{kind.package} is not installed, so the export was not verified"
    return Verified("", None, kind.package, reason=reason, install=kind.install)


@torch.inference_mode()
def refer(decoder: Decoder, template: Template, asked: Asked, name: str) -> Reference:
    """What `decoder` says to `asked`: a few numbers a text, so that it can be freed before a runtime is loaded."""
    lines = tuple(_line(decoder, row.ids) for row in asked.rows)
    continued: list[tuple[tuple[int, ...], _Line]] = []
    for row in _continued(asked):
        prompt = row.ids[: row.answer]
        drawn = tuple(generate(decoder, prompt, stop_ids=template.stop_ids, max_new_tokens=LIMIT))
        continued.append((drawn, _line(decoder, (*prompt, *drawn))))
    return Reference(name, template, lines, tuple(continued))


def _continued(asked: Asked) -> list[Row]:
    return [row for row in asked.rows if 0 < row.answer <= asked.positions - LIMIT][:CONTINUED]


def _line(decoder: Decoder, ids: Sequence[int]) -> _Line:
    ids_T = torch.tensor(ids, device=decoder.device)
    l_TV = decoder(ids_T).float()
    best = l_TV.topk(min(TOP, l_TV.shape[1]), dim=-1)
    losses = torch.nn.functional.cross_entropy(l_TV[:-1], ids_T[1:], reduction="none")
    return _Line(best.indices.cpu().numpy(), best.values.cpu().numpy(), losses.cpu().numpy())


def verify_model(
    kind: RuntimeKind, model: Path, asked: Asked, reference: Reference, precision: Precision = "fp32"
) -> Verified:
    """Hold the exported `model` (what `kind` opens) against the reference. Raises what opening it does."""
    runtime = kind.open(model, asked.context, precision)
    try:
        found = _Comparing(runtime, asked, reference)
        found.ids()
        found.stops()
        agreement = found.next_tokens()
        found.continuations()
    finally:
        runtime.close()
    threshold = THRESHOLDS.get(runtime.weights)
    if threshold is not None and precision == "bf16":
        threshold = min(threshold, BF16_THRESHOLD)
    failures = found.failures(threshold)
    loss, expected = found.losses
    return Verified(
        file=model.name,
        passed=not failures,
        runtime=f"{kind.package} {version(kind.package)}",
        against=reference.name,
        weights=runtime.weights,
        precision=precision,
        source=asked.source,
        texts=found.texts,
        tokens_identical=not found.other_ids,
        tokens=found.tokens,
        argmax_agreement=agreement,
        argmax_agreement_decided=found.decided,
        threshold=threshold,
        continuations=len(reference.continued),
        continuations_identical=len(reference.continued) - len(found.parted),
        loss_reference=expected,
        loss=loss,
        loss_increase=None if loss is None or expected is None else loss - expected,
        first_difference=found.first(failures),
        failures=failures,
    )


@dataclass
class _Comparing:
    """One runtime beside the reference, and what was found to be otherwise."""

    runtime: Runtime
    asked: Asked
    reference: Reference
    texts: int = 0
    tokens: int = 0
    other_ids: list[Difference] = field(default_factory=list)
    other_stops: list[Difference] = field(default_factory=list)
    other_tokens: list[Difference] = field(default_factory=list)
    parted: list[Difference] = field(default_factory=list)
    losses: tuple[float | None, float | None] = (None, None)

    def ids(self) -> None:
        """Of whole rows as text, of the probes, and of prompts that the export's own template writes."""
        template = self.reference.template
        tokenizer = template.tokenizer
        texts = [tokenizer.decode(row.ids) for row in self.asked.rows]
        # Where a tokenizer treats the beginning of a text otherwise than what follows a control token, and no runtime
        # does, texts are asked behind one: that is where they stand in a conversation.
        before = tokenizer.token_text(template.end_of_turn)
        alone = tokenizer.encode("a") != tokenizer.encode(f"{before}a", special=True)[1:]
        for number, plain in enumerate((*texts, *PROBES)):
            text = f"{before}{plain}" if alone else plain
            self._same(number, tokenizer.encode(text, special=True), self.runtime.tokenize(text), text, "token ids")
        answered = Turn("assistant", "Yes.")
        for number, question in enumerate(self.asked.questions):
            turns = [Turn("user", question)]
            if number % 2:
                turns = [*turns, answered, Turn("user", "Why is that?")]
            found = self.runtime.prompt_ids(turns)
            with dated(datetime.now()):  # as runtimes do, where the template writes the day
                expected = template.prompt_ids(turns)
            self._same(number, expected, found, question, "token ids of the chat template's prompt")

    def _same(self, row: int, expected: list[int], found: list[int], text: str, what: str) -> None:
        self.texts += 1
        if expected == found:
            return
        pairs = zip(expected, found, strict=False)
        at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(found)))
        told = f" of {text[:60]!r}"
        self.other_ids.append(Difference(what, row, at, self._at(expected, at) + told, self._at(found, at)))

    def _at(self, ids: list[int], at: int) -> str:
        return "the end" if at >= len(ids) else self._named(ids[at])

    def _named(self, token: int) -> str:
        return f"{token} {self.reference.template.tokenizer.token_text(token)!r}"

    def stops(self) -> None:
        """Whether the runtime ends where the template's answers do."""
        for token in self.reference.template.stop_ids:
            if not self.runtime.stops_at(token):
                self.other_stops.append(
                    Difference("a stop token", None, None, self._named(token), "that the runtime goes on after it")
                )

    def next_tokens(self) -> float:
        """The share of places with the same likeliest token; the losses of the answers on the way."""
        size = self.reference.template.tokenizer.vocab_size
        same, mine, theirs, count = 0, 0.0, 0.0, 0
        for number, (row, line) in enumerate(zip(self.asked.rows, self.reference.lines, strict=True)):
            l_TV = self.runtime.logits(row.ids)
            best = l_TV.argmax(-1)
            self.tokens += len(best)
            same += int((best == line.ids[:, 0]).sum())
            for at in np.flatnonzero(best != line.ids[:, 0]).tolist():
                own, other, gap = int(line.ids[at, 0]), int(best[at]), line.gap(at, int(best[at]))
                named = f"{other}, which is no token" if other >= size else self._named(other)
                self.other_tokens.append(Difference("the next token", number, at, self._named(own), named, gap))
            answer = slice(max(row.answer - 1, 0), None)
            mine += float(_losses(l_TV, row.ids)[answer].sum())
            theirs += float(line.losses[answer].sum())
            count += len(line.losses[answer])
        if count:
            self.losses = mine / count, theirs / count
        return same / self.tokens if self.tokens else math.nan

    def continuations(self) -> None:
        """Greedy, until the runtime stops by itself."""
        for number, (row, (drawn, line)) in enumerate(
            zip(_continued(self.asked), self.reference.continued, strict=True)
        ):
            found = tuple(self.runtime.greedy(row.ids[: row.answer], LIMIT))
            if found == drawn:
                continue
            pairs = enumerate(zip(drawn, found, strict=False))
            at = next((i for i, (one, other) in pairs if one != other), None)
            if at is None:  # the same tokens, and one of the two went on
                ends = f"to end after {len(drawn)} tokens", f"{len(found)} tokens"
                self.parted.append(Difference("where the continuation ends", number, None, *ends, math.inf))
                continue
            gap = line.gap(row.answer - 1 + at, found[at])
            named = self._named(drawn[at]), self._named(found[at])
            self.parted.append(Difference("the continuation", number, at, *named, gap))

    @property
    def clear(self) -> int:
        """The places with another next token that are no near-tie."""
        near = NEAR.get(self.runtime.weights, 0.0)
        return sum(one.gap is not None and one.gap > near for one in self.other_tokens)

    @property
    def decided(self) -> float:
        """The share of places with the same next token, or a near-tie."""
        return 1.0 - self.clear / self.tokens if self.tokens else math.nan

    def failures(self, threshold: float | None) -> tuple[str, ...]:
        """Why the export is not the model, in words; empty where it is."""
        failed = [f"{one}" for one in (*self.other_ids[:1], *self.other_stops[:1])]
        if threshold is not None and self.clear > math.ceil((1.0 - threshold) * self.tokens - 1e-9):
            failed.append(
                f"the likeliest next token is the same, or a near-tie, at {self.decided:.2%} of places, "
                f"{threshold:.1%} is asked"
            )
        undecided = UNDECIDED.get(self.runtime.weights)
        clear = [one for one in self.parted if undecided is not None and one.gap is not None and one.gap > undecided]
        failed += [f"{one}" for one in clear[:1]]
        loss, expected = self.losses
        if loss is not None and expected is not None and not loss - expected <= MOST_LOSS:
            failed.append(f"the held-out loss is {loss:.3f}, and that of {self.reference.name} {expected:.3f}")
        return tuple(failed)

    def first(self, failures: Sequence[str]) -> Difference | None:
        """What differs first: of what failed where something did, else the first of what may differ."""
        every = (*self.other_ids, *self.other_stops, *self.other_tokens, *self.parted)
        failed = (one for one in every if str(one) in failures)
        return next(failed, next(iter(every), None))


def _losses(l_TV: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float32]:
    """(T - 1,): the loss of each next token."""
    logits = torch.from_numpy(l_TV[:-1])
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()
