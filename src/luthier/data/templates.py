"""The templates a recipe can name: each is a jinja chat template of ours and how a row's turns are put into it.

    model             the model's own chat template
    alpaca            `### Instruction:` and `### Response:`, with and without `### Input:`
    llama3            headers between <|start_header_id|> and <|end_header_id|>, turns ended by <|eot_id|>
    chatml            turns between <|im_start|> and <|im_end|>
    mistral           questions between [INST] and [/INST]
    human-assistant   `###Human: …###Assistant: … ###`
    text              nothing but the contents: for rows of plain text

What the source says is what trains, evaluates, chats, and goes into GGUF files and Modelfiles. A new one is a source
here, a line in `TEMPLATES` and the name in the recipe's schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from luthier.data.conversation import Conversation, Turn
from luthier.data.text_template import parse_text_template
from luthier.data.tokenizer import ChatTokenizer
from luthier.errors import DataError, Problem, RecipeError

__all__ = ["TEMPLATES", "Layout", "text_layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a kind of template is: its jinja source, and how a row's turns are written for it.

    `takes_plain`: rows of plain text are written by it too, instead of as they are.
    """

    source: str
    arrange: Callable[[Conversation], tuple[Turn, ...]]
    takes_plain: bool = False


ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_INPUT = "\n\n### Input:\n"

LLAMA3 = (  # Meta, model card of Llama 3: contents are trimmed
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (  # OpenAI's ChatML as Qwen and many others write it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{{ message['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _quoted(text: str) -> str:
    """A jinja string literal. JSON's escapes are jinja's; non-ASCII stays as it is for other jinja readers."""
    return json.dumps(text, ensure_ascii=False)


def _needs(name: str, tokenizer: ChatTokenizer, *tokens: str) -> None:
    missing = [token for token in tokens if token not in tokenizer.controls]
    if not missing:
        return
    other = "`template: model`, the model's own" if tokenizer.chat_template else "`template: alpaca`, which needs none"
    raise DataError(
        f"`template: {name}` is written with the special tokens {' and '.join(tokens)}, and the tokenizer in "
        f"{tokenizer.folder} has no {' and no '.join(missing)}",
        f"use {other}; as plain text they would be many tokens each, and none that ends an answer",
    )


def _needs_end(tokenizer: ChatTokenizer) -> None:
    """The templates without tokens of their own end an answer with the tokenizer's end token."""
    if tokenizer.eos_token is None:
        raise DataError(
            f"the tokenizer in {tokenizer.folder} has no end token, so an answer could not be ended",
            "set eos_token in its tokenizer_config.json",
        )


def _as_it_is(conversation: Conversation) -> tuple[Turn, ...]:
    return conversation.turns


def _begun(tokenizer: ChatTokenizer, source: str) -> str:
    return ("{{ bos_token }}" if tokenizer.bos_id is not None else "") + source


def _model(tokenizer: ChatTokenizer) -> Layout:
    if tokenizer.chat_template is None:
        raise DataError(
            f"`template: model`, but the model in {tokenizer.folder} has no chat template (a base model?)",
            'set `template: alpaca`, a text such as "Q: {question}\\nA: {answer}", or take its Instruct version',
        )
    return Layout(tokenizer.chat_template, _as_it_is)


def _llama3(tokenizer: ChatTokenizer) -> Layout:
    _needs("llama3", tokenizer, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return Layout(_begun(tokenizer, LLAMA3), _as_it_is)


def _chatml(tokenizer: ChatTokenizer) -> Layout:
    _needs("chatml", tokenizer, "<|im_start|>", "<|im_end|>")
    return Layout(CHATML, _as_it_is)  # no BOS, unless the tokenizer always puts one: see Template


def _three_roles(name: str, system: str, user: str, assistant: str) -> str:
    """A source for layouts that have no place for tool turns: three jinja expressions, one a role."""
    refusal = f"template: {name} has no place for a turn of role "
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {assistant} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user} }}}}"
        f"{{% elif message['role'] == 'system' %}}{{{{ {system} }}}}"
        f"{{% else %}}{{{{ raise_exception({_quoted(refusal)} + message['role']) }}}}"
        "{% endif %}{% endfor %}"
    )


def _mistral(tokenizer: ChatTokenizer) -> Layout:
    """Mistral's: the system turn stands in the first user's. Where [INST] is a token (from v3 on), no space is put
    before [/INST]."""
    _needs_end(tokenizer)
    close = "[/INST]" if {"[INST]", "[/INST]"} <= tokenizer.controls.keys() else " [/INST]"
    source = (
        "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        + _three_roles(
            "mistral",
            "raise_exception('template: mistral takes a system turn only as the first turn')",
            f"'[INST] ' + (system if loop.first else '') + message['content'] + {_quoted(close)}",
            "' ' + message['content'] + eos_token",
        ).replace("in messages %}", "in turns %}", 1)
    )
    return Layout(_begun(tokenizer, source), _as_it_is)


def _human_assistant(tokenizer: ChatTokenizer) -> Layout:
    """The space before an answer is the answer's, so that it can be one token with the answer's first word."""
    _needs_end(tokenizer)
    source = _three_roles(
        "human-assistant",
        "message['content'] + '\\n\\n'",
        "'###Human: ' + message['content'] + '###Assistant:'",
        "' ' + message['content'] + ' ###' + eos_token",
    )
    return Layout(_begun(tokenizer, source), _as_it_is)


def _contents(bos: bool, system: str, user: str) -> str:
    """A source without tokens or words of its own but those in the two jinja expressions."""
    return (
        ("{{ bos_token }}" if bos else "") + "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% elif message['role'] == 'system' %}}{{{{ {system} }}}}"
        f"{{% else %}}{{{{ {user} }}}}{{% endif %}}{{% endfor %}}"
    )


def _alpaca(tokenizer: ChatTokenizer) -> Layout:
    """Alpaca's prompt (Taori et al. 2023, Stanford Alpaca).

    The first user turn is opened by the preamble (a system turn takes its place). A turn with `### Input:` in it gets
    the preamble for a task with an input, which is how rows that have one are written.
    """
    _needs_end(tokenizer)
    paired = f"{_quoted(ALPACA_INPUT)} in message['content']"
    preamble = f"({_quoted(ALPACA_PAIRED)} if {paired} else {_quoted(ALPACA_PLAIN)})"
    opening = f"({preamble} if loop.first else '')"
    before, after = _quoted("\n\n### Instruction:\n"), _quoted("\n\n### Response:\n")
    user = f"{opening} + {before} + message['content'] + {after}"
    return Layout(_contents(tokenizer.bos_id is not None, "message['content']", user), _arrange_alpaca)


def _arrange_alpaca(conversation: Conversation) -> tuple[Turn, ...]:
    given = conversation.fields.get("input", "")
    if not given.strip() or len(conversation.turns) < 2:
        return conversation.turns
    instruction = conversation.fields.get("instruction", "")
    if conversation.turns[-2].content != f"{instruction}\n\n{given}":  # how a row with an input is written as one turn
        return conversation.turns
    content = instruction + ALPACA_INPUT + given
    return tuple(Turn("user", content) if turn.role == "user" else turn for turn in conversation.turns)


def _text(tokenizer: ChatTokenizer) -> Layout:
    """Of rows of plain text: a user's text is the beginning that the model continues."""
    _needs_end(tokenizer)
    return Layout(_contents(tokenizer.bos_id is not None, "message['content']", "message['content']"), _as_it_is)


def text_layout(text: str, tokenizer: ChatTokenizer) -> Layout:
    """The layout of a text with {fields}, see text_template.py: a row's fields become a user's turn and an answer.

    Raises:
        RecipeError: the text cannot be read.
    """
    _needs_end(tokenizer)
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

    user = f"{_quoted(template.before)} + message['content'] + {_quoted(template.after)}"
    source = _contents(writes_bos, f"message['content'] + {_quoted(chr(10) * 2)}", user)
    return Layout(source, arrange, takes_plain=True)


TEMPLATES: Mapping[str, Callable[[ChatTokenizer], Layout]] = {
    "model": _model,
    "alpaca": _alpaca,
    "llama3": _llama3,
    "chatml": _chatml,
    "mistral": _mistral,
    "human-assistant": _human_assistant,
    "text": _text,
}
"""Name -> layout. `text` is for rows of plain text, and is what `model` becomes where all rows are such."""
