"""Conversations to text: which template writes them, and which characters of the text are trained.

Whatever the recipe's `template` says ends as one jinja chat template (`chat_template_source`), and that one template
writes the training rows, the prompts of evaluation and chat, and goes into what is exported.

The mask of an assistant's turn i comes from rendering prefixes, with or without marks in the template:

    before = render(turns[:i], generation prompt)      what the model will see when it has to answer
    upto   = render(turns[:i + 1])                     must begin with `before`
    span   = upto[len(before) :] up to and including the first end-of-turn token

and the whole conversation must begin with `upto` up to the span's end: a template that rewrites earlier turns once a
later one follows has no honest mask for them, and is refused for that row.

Rows come in chunks: `write` renders them, `tokenize` calls the tokenizers library (in another thread, if you like),
`label` makes ids and labels (labels.py). A row that has something wrong with it is a `RowFault` and harms no other.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from luthier.data.conversation import IGNORED, Conversation, Ids, Turn
from luthier.data.jinja_chat import TEMPLATE_DATE, ChatTemplate, Message
from luthier.data.labels import EncodedChunk, Marked, RowFault, Rules, Tokenized, Written, label, tokenize
from luthier.data.templates import TEMPLATES, Layout, text_layout
from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import DataError, Problem, RecipeError

__all__ = ["Encoded", "Template", "TrainOn", "make_template"]

TrainOn: TypeAlias = Literal["completions", "last", "all"]
"""Every turn that says `train`, only the last of them, or the whole text with the template's own and the prompts."""

_VERSION = 1
"""Goes into fingerprints: raise it when the same row would become other ids or labels."""

_PROBE = "Luthier"
"""A content that no template says itself."""
_REMEDY = "mark the turn train: false, or use another template, such as alpaca"


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Ids and labels of one row (int32, not shifted), and whether a token had to be parted at a prompt's end."""

    ids: Ids
    labels: Ids
    parted: bool


class Template:
    """One way of writing conversations for one tokenizer.

    Attributes:
        name: what the recipe says, a name or a text with {fields}; `make_template(name, tokenizer)` makes this template
            again.
        train_on: which turns are trained.
        chat_template_source: the jinja chat template; put into exported tokenizers and GGUF files.
        end_of_turn: the id of the token that ends an answer; labelled in every trained turn.
        stop_ids: the ids that end generation: end_of_turn and the model's own.
        stop_strings: their texts.
    """

    def __init__(self, name: str, layout: Layout, tokenizer: ChatTokenizer, train_on: TrainOn = "completions") -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._layout = layout
        self._special = dict(tokenizer.special)
        if tokenizer.eos_token is not None:
            self._special.setdefault("eos_token", tokenizer.eos_token)
        self.chat_template_source = layout.source
        self._jinja = ChatTemplate(layout.source, self._special)
        bos = self._special.get("bos_token")
        if tokenizer.adds_bos and isinstance(bos, str) and not self._render(_probe(), False).startswith(bos):
            # The model has always seen BOS first; a chat template without it relies on the tokenizer to add it.
            self.chat_template_source = "{{ bos_token }}" + layout.source
            self._jinja = ChatTemplate(self.chat_template_source, self._special)
        self._end_text = self._find_end_of_turn()
        self.end_of_turn = tokenizer.controls[self._end_text]
        self._edges = self._contents_could_make_controls()
        self.stop_ids = tuple(dict.fromkeys((self.end_of_turn, *tokenizer.eos_ids)))
        texts = (tokenizer.token_text(number) for number in self.stop_ids)
        self.stop_strings = tuple(text for text in texts if text is not None)

    def turns(self, conversation: Conversation) -> tuple[Turn, ...]:
        """The turns that are written for a row: a text template puts the row's fields into the user's.

        Raises:
            DataError: the row lacks a field that the template names.
        """
        return self._layout.arrange(conversation)

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        """The text of the turns; with `generation_prompt`, up to where the assistant's answer begins."""
        return self._render(turns, generation_prompt)

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The ids a model is given to answer `turns`: exactly how a training row with these turns begins."""
        mark, contents = self.tokenizer.guard([turn.content for turn in turns], edges=self._edges)
        return self.tokenizer.encode_guarded(self._render(_with_contents(turns, contents), True), mark)

    def prompt_ids_of(self, conversation: Conversation) -> list[int]:
        """The ids before the last answer of a row: what `Example.ids` holds before its last trained span."""
        if self._as_it_is(conversation):
            bos = self.tokenizer.bos_id
            return [] if bos is None else [bos]
        turns = self.turns(conversation)
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        return self.prompt_ids(turns[:last])

    def write(self, conversations: Sequence[Conversation]) -> Written:
        """Render a chunk's rows and find what is trained in them; what is wrong with a row is in `faults`."""
        written = Written(self.tokenizer)
        for conversation in conversations:
            try:
                written.add(self._mark(conversation))
            except DataError as error:
                written.refuse(RowFault(error.message, error.remedy or "correct the row, or take it out"))
        return written

    def tokenize(self, written: Written) -> Tokenized:
        """The tokens of a written chunk; nearly all of the work, and Python is free meanwhile."""
        return tokenize(written, self.tokenizer)

    def label(self, tokenized: Tokenized) -> EncodedChunk:
        """Ids and labels of a tokenised chunk: trained are the answers and their end-of-turn tokens, nothing else
        (with `train_on: all`, everything)."""
        return label(tokenized, self.tokenizer, self._rules)

    def encode_chunk(self, conversations: Sequence[Conversation]) -> EncodedChunk:
        """Ids and labels of a chunk's rows: the three steps in a row."""
        return self.label(self.tokenize(self.write(conversations)))

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and labels of one row; see `encode_many`."""
        return self.encode_many([conversation])[0]

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Ids and labels of rows, each in arrays of its own.

        Raises:
            DataError: of the first faulty row, naming it: the template refuses it or rewrites its history, a field is
                missing, BOS is not there exactly once, or an end-of-turn token would not be trained.
        """
        chunk = self.encode_chunk(conversations)
        for i, fault in chunk.faults.items():
            raise DataError(f"{conversations[i].source}: {fault.reason}", fault.remedy)
        labels = np.where(chunk.labels, chunk.ids, np.int32(IGNORED))
        cuts = np.cumsum(chunk.lengths)[:-1]
        rows = zip(np.split(chunk.ids, cuts), np.split(labels, cuts), chunk.parted.tolist(), strict=True)
        return [Encoded(ids, of_row, parted) for ids, of_row, parted in rows] if conversations else []

    def _render(self, turns: Sequence[Turn], generation_prompt: bool) -> str:
        return self._jinja.render(_messages(turns), generation_prompt)

    def _mark(self, conversation: Conversation) -> Marked:
        if self._as_it_is(conversation):
            return self._mark_plain(conversation.turns[0].content)
        turns = self._layout.arrange(conversation)
        mark, contents = self.tokenizer.guard([turn.content for turn in turns], edges=self._edges)
        messages: list[Message] = [
            {"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)
        ]
        whole = self._jinja.render(messages, False)
        if not whole.isascii():
            _check_encodable(whole)
        trained = [i for i, turn in enumerate(turns) if turn.train]
        if self.train_on == "last":
            trained = trained[-1:]
        if self.train_on != "all":
            return Marked(whole, mark, [self._span(messages, i, whole) for i in trained])
        spans = []
        for i in trained:  # everything is trained, but prompts are still cut from answers where that can be done
            with suppress(DataError):
                spans.append(self._span(messages, i, whole))
        return Marked(whole, mark, spans)

    def _mark_plain(self, content: str) -> Marked:
        if not content.isascii():
            _check_encodable(content)
        mark, (content,) = self.tokenizer.guard([content])
        bos = self._special.get("bos_token")
        start = bos if isinstance(bos, str) else ""
        text = start + content + self._document_end()
        return Marked(text, mark, ((len(start), len(text)),))

    def _as_it_is(self, conversation: Conversation) -> bool:
        return conversation.plain and not self._layout.takes_plain

    def _document_end(self) -> str:
        """The token after a plain text: the tokenizer's own end, which a chat's end-of-turn need not be."""
        own = self.tokenizer.eos_token
        return own if own is not None and own in self.tokenizer.controls else self._end_text

    def _span(self, messages: Sequence[Message], i: int, whole: str) -> tuple[int, int]:
        before = self._jinja.render(messages[:i], True)
        upto = whole if i == len(messages) - 1 else self._jinja.render(messages[: i + 1], False)
        if not upto.startswith(before):
            reason = "the chat template does not begin the answer as it prompts for it"
            raise DataError(f"turn {i + 1} has no honest mask: {reason}", _REMEDY)
        at = upto.find(self._end_text, len(before))
        if at < 0:
            raise DataError(f"the chat template writes no {self._end_text} after turn {i + 1}", _REMEDY)
        end = at + len(self._end_text)
        if upto is not whole and not whole.startswith(upto[:end]):
            reason = "the chat template rewrites it once later turns follow"
            raise DataError(f"turn {i + 1} has no honest mask: {reason}", _REMEDY)
        return len(before), end

    @cached_property
    def _rules(self) -> Rules:
        tokenizer = self.tokenizer
        ends = (self.end_of_turn, tokenizer.controls[self._document_end()])
        # Where one token serves as BOS and as end, or opens every turn (SmolLM2's), its count says nothing.
        text = self._special.get("bos_token")
        opens_turns = isinstance(text, str) and not tokenizer.adds_bos and self._render(_probe(), False).count(text) > 1
        bos = None if tokenizer.bos_id in self.stop_ids or opens_turns else tokenizer.bos_id
        return Rules(ends, bos, tokenizer.adds_bos, self.train_on == "all")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides ids and labels, but for the tokenizer, which has its own."""
        special = sorted(self._special.items())
        parts = (_VERSION, self.name, self.train_on, self.chat_template_source, special, TEMPLATE_DATE.isoformat())
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def _find_end_of_turn(self) -> str:
        """The text of the first control token after an answer, found by rendering one."""
        rendered = self._render(_probe(), False)
        found = self.tokenizer.control_pattern.search(rendered, rendered.rfind(_PROBE) + len(_PROBE))
        if rendered.count(_PROBE) < 2 or found is None:
            raise DataError(
                "the template ends an answer with no special token, so the model could not learn to stop",
                "use `template: alpaca`, which ends answers with the model's end token",
            )
        return found[0]

    def _contents_could_make_controls(self) -> bool:
        rendered = [self._render((*_probe(), *_probe()), False)]
        with suppress(DataError):  # a template that refuses system turns will render none
            rendered.append(self._render((Turn("system", _PROBE), *_probe()), False))
        return any(self.tokenizer.completable(text.split(_PROBE)) for text in rendered)


def _probe() -> tuple[Turn, ...]:
    return Turn("user", _PROBE), Turn("assistant", _PROBE)


def _messages(turns: Sequence[Turn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _with_contents(turns: Sequence[Turn], contents: Sequence[str]) -> tuple[Turn, ...]:
    return tuple(Turn(turn.role, content, turn.train) for turn, content in zip(turns, contents, strict=True))


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"the row's text holds half of a UTF-16 pair (U+{ord(text[error.start]):04X})"
        raise DataError(reason, "write the file again in UTF-8; what made it cut a character in two") from error


def make_template(name_or_text: str, tokenizer: ChatTokenizer, train_on: TrainOn = "completions") -> Template:
    """The template a recipe names (see templates.py), or a text with {fields} whose last field is the answer.

    Raises:
        DataError: the template cannot be used with this model: `model` where it has no chat template, a named one whose
            tokens the tokenizer lacks, or one that never ends an answer.
        RecipeError: no such name, or a text that cannot be read.
    """
    if name_or_text in TEMPLATES:
        return Template(name_or_text, TEMPLATES[name_or_text](tokenizer), tokenizer, train_on)
    if "{" in name_or_text:
        return Template(name_or_text, text_layout(name_or_text, tokenizer), tokenizer, train_on)
    near = difflib.get_close_matches(name_or_text, TEMPLATES, n=1)
    named = ", ".join(name for name in TEMPLATES if name != "text")
    remedy = f"did you mean {near[0]}?" if near else f'{named}, or a text such as "Q: {{question}}\\nA: {{answer}}"'
    raise RecipeError([Problem("template", None, f"there is no template {name_or_text!r}", remedy)])
