"""Conversations to text: which template writes them, and which characters of the text are trained.

Whatever the recipe's `template` says ends as one jinja chat template (`chat_template_source`), and that one template
writes the training rows, the prompts of evaluation and chat, and goes into what is exported.

The mask of an assistant's turn i comes from rendering prefixes, with or without marks in the template:

    before = render(turns[:i], generation prompt)      what the model will see when it has to answer
    upto   = render(turns[:i + 1])                     must begin with `before`
    span   = upto[len(before) :] up to and including the first end-of-turn token

and the whole conversation must begin with `upto` up to the span's end: a template that rewrites earlier turns once a
later one follows has no honest mask for them, and is refused for that row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from luthier.data.conversation import Conversation, Turn
from luthier.data.jinja_chat import render_chat
from luthier.data.labels import Encoded, Marked, encode_marked
from luthier.data.text_template import ALPACA_INPUT, alpaca_source, parse_text_template, plain_source
from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import DataError, Problem, RecipeError

__all__ = ["TEMPLATES", "Template", "make_template"]

_PROBE = "Luthier"
"""A content that no template says itself."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a kind of template is: its jinja source, and how a row's turns are written for it.

    `takes_plain`: rows of plain text are written by it too, instead of as they are.
    """

    source: str
    arrange: Callable[[Conversation], tuple[Turn, ...]]
    takes_plain: bool = False


class Template:
    """One way of writing conversations for one tokenizer.

    Attributes:
        name: what the recipe says: model, alpaca, text, or the text with {fields}; `make_template(name, tokenizer)`
            makes this template again.
        chat_template_source: the jinja chat template; put into exported tokenizers and GGUF files.
        end_of_turn: the id of the token that ends an answer; labelled in every trained turn.
        stop_ids: the ids that end generation: end_of_turn and the model's own.
        stop_strings: their texts.
    """

    def __init__(self, name: str, layout: _Layout, tokenizer: ChatTokenizer) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._layout = layout
        self._special = dict(tokenizer.special)
        if tokenizer.eos_token is not None:
            self._special.setdefault("eos_token", tokenizer.eos_token)
        self.chat_template_source = layout.source
        bos = self._special.get("bos_token")
        if tokenizer.adds_bos and isinstance(bos, str) and not self._render(_probe(), False).startswith(bos):
            # The model has always seen BOS first; a chat template without it relies on the tokenizer to add it.
            self.chat_template_source = "{{ bos_token }}" + layout.source
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

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and labels of one row; see `encode_many`."""
        return self.encode_many([conversation])[0]

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Ids and labels of rows: trained are the answers and their end-of-turn tokens, nothing else.

        Raises:
            DataError: naming the row: the template refuses it or rewrites its history, a field is missing, BOS is not
                there exactly once, or an end-of-turn token would not be trained.
        """
        marked: list[Marked] = []
        for conversation in conversations:
            try:
                marked.append(self._mark(conversation))
            except DataError as error:
                raise _at(conversation, error) from error
        try:
            encoded = encode_marked(marked, self.tokenizer)
        except DataError:  # find the row: the batch does not say which
            encoded = [self._encode_one(*pair) for pair in zip(conversations, marked, strict=True)]
        for conversation, row, found in zip(conversations, marked, encoded, strict=True):
            self._check(conversation, row, found)
        return encoded

    def _encode_one(self, conversation: Conversation, row: Marked) -> Encoded:
        try:
            return encode_marked([row], self.tokenizer)[0]
        except DataError as error:
            raise _at(conversation, error) from error

    def _render(self, turns: Sequence[Turn], generation_prompt: bool) -> str:
        source = self.chat_template_source
        return render_chat(source, turns, generation_prompt=generation_prompt, special=self._special)

    def _mark(self, conversation: Conversation) -> Marked:
        turns = self.turns(conversation)
        if self._as_it_is(conversation):
            mark, (content,) = self.tokenizer.guard([turns[0].content])
            bos = self._special.get("bos_token")
            start = bos if isinstance(bos, str) else ""
            text = start + content + self._document_end()
            return Marked(text, mark, ((len(start), len(text)),))
        mark, contents = self.tokenizer.guard([turn.content for turn in turns], edges=self._edges)
        turns = _with_contents(turns, contents)
        whole = self._render(turns, False)
        trained = [i for i, turn in enumerate(turns) if turn.train]
        return Marked(whole, mark, tuple(self._span(turns, i, whole) for i in trained))

    def _as_it_is(self, conversation: Conversation) -> bool:
        return conversation.plain and not self._layout.takes_plain

    def _document_end(self) -> str:
        """The token after a plain text: the tokenizer's own end, which a chat's end-of-turn need not be."""
        own = self.tokenizer.eos_token
        return own if own is not None and own in self.tokenizer.controls else self._end_text

    def _span(self, turns: Sequence[Turn], i: int, whole: str) -> tuple[int, int]:
        before = self._render(turns[:i], True)
        upto = whole if i == len(turns) - 1 else self._render(turns[: i + 1], False)
        remedy = "mark the turn train: false, or use another template, such as alpaca"
        if not upto.startswith(before):
            reason = "the chat template does not begin the answer as it prompts for it"
            raise DataError(f"turn {i + 1} has no honest mask: {reason}", remedy)
        at = upto.find(self._end_text, len(before))
        if at < 0:
            raise DataError(f"the chat template writes no {self._end_text} after turn {i + 1}", remedy)
        end = at + len(self._end_text)
        if whole[:end] != upto[:end]:
            reason = "the chat template rewrites it once later turns follow"
            raise DataError(f"turn {i + 1} has no honest mask: {reason}", remedy)
        return len(before), end

    def _check(self, conversation: Conversation, row: Marked, found: Encoded) -> None:
        trained_ends = int(((found.labels == self.end_of_turn) | (found.labels == self._plain_end_id)).sum())
        if trained_ends < len(row.spans):
            message = f"{len(row.spans) - trained_ends} answers of the row end without a trained end-of-turn token"
            raise DataError(f"{conversation.source}: {message}", "use another template; such a model would never stop")
        bos = self.tokenizer.bos_id
        if bos is None or bos in self.stop_ids:  # where one token serves as both, its count says nothing
            return
        count = int((found.ids == bos).sum())
        if count > 1 or (count == 0 and self.tokenizer.adds_bos):
            message = f"the template writes the beginning-of-text token {count} times"
            raise DataError(f"{conversation.source}: {message}", "correct it: once, at the beginning")

    @property
    def _plain_end_id(self) -> int:
        return self.tokenizer.controls[self._document_end()]

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


def _with_contents(turns: Sequence[Turn], contents: Sequence[str]) -> tuple[Turn, ...]:
    return tuple(Turn(turn.role, content, turn.train) for turn, content in zip(turns, contents, strict=True))


def _at(conversation: Conversation, error: DataError) -> DataError:
    return DataError(f"{conversation.source}: {error.message}", error.remedy)


def _own_end(tokenizer: ChatTokenizer) -> None:
    if tokenizer.eos_token is None:
        raise DataError(
            f"the tokenizer in {tokenizer.folder} has no end token, so an answer could not be ended",
            "set eos_token in its tokenizer_config.json",
        )


def _model(tokenizer: ChatTokenizer) -> _Layout:
    if tokenizer.chat_template is None:
        raise DataError(
            f"`template: model`, but the model in {tokenizer.folder} has no chat template (a base model?)",
            'set `template: alpaca`, a text such as "Q: {question}\\nA: {answer}", or take its Instruct version',
        )
    return _Layout(tokenizer.chat_template, lambda conversation: conversation.turns)


def _alpaca(tokenizer: ChatTokenizer) -> _Layout:
    _own_end(tokenizer)

    def arrange(conversation: Conversation) -> tuple[Turn, ...]:
        instruction, given = (conversation.fields.get(key, "") for key in ("instruction", "input"))
        joined = f"{instruction}\n\n{given}"  # how formats.py writes a row with an input as one turn
        if not given.strip() or conversation.turns[-2].content != joined:
            return conversation.turns
        content = instruction + ALPACA_INPUT + given
        return tuple(Turn("user", content) if turn.role == "user" else turn for turn in conversation.turns)

    return _Layout(alpaca_source(tokenizer.bos_id is not None), arrange)


def _plain(tokenizer: ChatTokenizer) -> _Layout:
    _own_end(tokenizer)
    return _Layout(plain_source(tokenizer.bos_id is not None), lambda conversation: conversation.turns)


def _custom(text: str, tokenizer: ChatTokenizer) -> _Layout:
    _own_end(tokenizer)
    template = parse_text_template(text)
    if tokenizer.control_pattern.search(template.inner_literals):
        reason = f"the text template has a special token between its fields: {template.inner_literals!r}"
        raise RecipeError([Problem("template", None, reason, "only before the first field or after the last but one")])
    bos = tokenizer.special.get("bos_token")
    writes_bos = isinstance(bos, str) and not template.before.startswith(bos)

    def arrange(conversation: Conversation) -> tuple[Turn, ...]:
        missing = [name for name in template.fields if name not in conversation.fields]
        if missing:
            has = ", ".join(conversation.fields) or "none that are text"
            names = ", ".join(f"{{{name}}}" for name in missing)
            raise DataError(f"the template names {names}, which the row lacks; it has {has}", "correct `template`")
        if not conversation.fields[template.answer].strip():
            raise DataError(f"the answer {{{template.answer}}} is empty", "correct or remove the row")
        user = Turn("user", template.user_content(conversation.fields))
        return user, Turn("assistant", conversation.fields[template.answer], train=True)

    return _Layout(template.jinja(writes_bos), arrange, takes_plain=True)


TEMPLATES: Mapping[str, Callable[[ChatTokenizer], _Layout]] = {"model": _model, "alpaca": _alpaca, "text": _plain}
"""Name -> layout. `text` is for rows of plain text, and is what `model` becomes where all rows are such."""


def make_template(name_or_text: str, tokenizer: ChatTokenizer) -> Template:
    """The template a recipe names: model, alpaca, or a text with {fields} whose last field is the answer.

    Raises:
        DataError: `model` where the model has no chat template, or a template that never ends an answer.
        RecipeError: no such name, or a text that cannot be read.
    """
    if name_or_text in TEMPLATES:
        return Template(name_or_text, TEMPLATES[name_or_text](tokenizer), tokenizer)
    if "{" in name_or_text:
        return Template(name_or_text, _custom(name_or_text, tokenizer), tokenizer)
    near = difflib.get_close_matches(name_or_text, TEMPLATES, n=1)
    remedy = f"did you mean {near[0]}?" if near else 'model, alpaca, or a text such as "Q: {question}\\nA: {answer}"'
    raise RecipeError([Problem("template", None, f"there is no template {name_or_text!r}", remedy)])
