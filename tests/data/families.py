"""Chat formats of known model families, each twice: the jinja template that its models come with, and the same format
by hand in Python, which says what must be trained.

Written from the published formats: model cards and tokenizer_config.json of Llama 2 and 3.1, Mistral 7B v0.3, Qwen 2.5
and 3, Gemma, Phi-3, Zephyr and DeepSeek V3. The tokenizers are small byte-level ones with their control tokens. The
templates of ours stand here too, by hand (`BUNDLED`).

Where a family's template cannot be trained on a conversation, `refusal` says what the message must say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.data.conversation import Conversation, Turn
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from tests import tiny

Piece = tuple[str, bool]
"""A text of the format, and whether it is trained."""


def _never(conversation: Conversation) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """A family: its tokens, its jinja template (None for the ones of ours), and the same by hand.

    `template` is what a recipe says.
    """

    controls: tuple[str, ...]
    bos: str | None
    eos: str
    source: str | None
    write: Callable[[Conversation], list[Piece]]
    refusal: Callable[[Conversation], str | None] = _never
    pad: str | None = None
    template: str = "model"


LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n"
    "        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
    "{{- 'Cutting Knowledge Date: December 2023\\n' }}\n{{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
    "{{- system_message }}\n{{- '<|eot_id|>' }}\n{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim "
    "+ '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
MISTRAL_3 = (  # the system message stands in the last user's turn: it moves on with every question
    '{%- if messages[0]["role"] == "system" %}\n    {%- set system_message = messages[0]["content"] %}\n'
    "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n"
    '{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}\n'
    "{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if message['role'] == 'user' %}\n"
    "        {%- if message == user_messages[-1] and system_message is defined %}\n"
    '            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}\n        {%- else %}\n'
    '            {{- "[INST] " + message["content"] + "[/INST]" }}\n        {%- endif %}\n'
    '    {%- elif message["role"] == "assistant" %}\n        {{- " " + message["content"] + eos_token }}\n'
    "    {%- endif %}\n{%- endfor %}\n"
)
QWEN_25 = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' "
    '}}\n{%- endif %}\n{%- for message in messages %}\n    {%- if (message.role == "user") or '
    '(message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
QWEN_3 = (  # thinking is written for the last answer and taken out of the ones before
    "{%- if messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- set ns = namespace(last_query_index=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
    "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    '    {%- if ns.found is not defined and message.role == "user" %}\n        {%- set ns.found = true %}\n'
    "        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n"
    '{%- for message in messages %}\n    {%- if (message.role == "user") or '
    '(message.role == "system" and not loop.first) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    '    {%- elif message.role == "assistant" %}\n        {%- set content = message.content %}\n'
    "        {%- set reasoning_content = '' %}\n        {%- if '</think>' in message.content %}\n"
    "            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n"
    "            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
    ".lstrip('\\n') %}\n        {%- endif %}\n        {%- if loop.index0 > ns.last_query_index and loop.last %}\n"
    "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + "
    "'\\n</think>\\n\\n' + content.lstrip('\\n') }}\n        {%- else %}\n"
    "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n        {%- endif %}\n"
    "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
PHI_3 = (  # a conversation that is over ends with one more token
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (  # its role marks are plain text
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def _split(conversation: Conversation) -> tuple[str | None, tuple[Turn, ...]]:
    turns = conversation.turns
    return (turns[0].content, turns[1:]) if turns[0].role == "system" else (None, turns)


def _llama_2(conversation: Conversation) -> list[Piece]:
    system, (user, answer) = _split(conversation)
    question = user.content if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{user.content}"
    return [(f"<s>[INST] {question.strip()} [/INST]", False), (f" {answer.content.strip()} </s>", answer.train)]


def _llama_3(conversation: Conversation) -> list[Piece]:
    system, turns = _split(conversation)
    text = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    pieces = [(f"{text}Today Date: 26 Jul 2024\n\n{(system or '').strip()}<|eot_id|>", False)]
    for turn in turns:
        pieces.append((f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n", False))
        pieces.append((f"{turn.content.strip()}<|eot_id|>", turn.train))
    return pieces


def _mistral_3(conversation: Conversation) -> list[Piece]:
    system, turns = _split(conversation)
    pieces = [("<s>", False)]
    last = [turn for turn in turns if turn.role == "user"][-1]
    for turn in turns:
        if turn.role == "user":
            first = f"{system}\n\n" if system is not None and turn == last else ""
            pieces.append((f"[INST] {first}{turn.content}[/INST]", False))
        else:
            pieces.append((f" {turn.content}</s>", turn.train))
    return pieces


def _chatml(conversation: Conversation, default: str | None) -> list[Piece]:
    system, turns = _split(conversation)
    system = default if system is None else system
    pieces = [] if system is None else [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    for turn in turns:
        pieces.append((f"<|im_start|>{turn.role}\n", False))
        pieces += [(f"{turn.content}<|im_end|>", turn.train), ("\n", False)]
    return pieces


def _qwen_25(conversation: Conversation) -> list[Piece]:
    return _chatml(conversation, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")


def _qwen_3(conversation: Conversation) -> list[Piece]:
    *before, last = conversation.turns
    last = Turn("assistant", "<think>\n\n</think>\n\n" + last.content.lstrip("\n"), last.train)
    return _chatml(conversation._replace(turns=(*before, last)), None)


def _gemma(conversation: Conversation) -> list[Piece]:
    pieces = [("<bos>", False)]
    for turn in conversation.turns:
        role = {"user": "user", "assistant": "model"}[turn.role]
        pieces.append((f"<start_of_turn>{role}\n", False))
        pieces += [(f"{turn.content.strip()}<end_of_turn>", turn.train), ("\n", False)]
    return pieces


def _phi_3(conversation: Conversation) -> list[Piece]:
    pieces: list[Piece] = []
    for turn in conversation.turns:
        pieces += [(f"<|{turn.role}|>\n", False), (f"{turn.content}<|end|>", turn.train), ("\n", False)]
    return [*pieces, ("<|endoftext|>", False)]


def _zephyr(conversation: Conversation) -> list[Piece]:
    pieces: list[Piece] = []
    for turn in conversation.turns:
        pieces += [(f"<|{turn.role}|>\n", False), (f"{turn.content}</s>", turn.train), ("\n", False)]
    return pieces


def _deepseek(conversation: Conversation) -> list[Piece]:
    system, turns = _split(conversation)
    pieces = [(f"<｜begin▁of▁sentence｜>{system or ''}", False)]
    for turn in turns:
        if turn.role == "user":
            pieces.append((f"<｜User｜>{turn.content}", False))
        else:
            pieces += [("<｜Assistant｜>", False), (f"{turn.content}<｜end▁of▁sentence｜>", turn.train)]
    return pieces


def _repeats_bos(conversation: Conversation) -> str | None:
    """Llama 2 begins every exchange with BOS."""
    exchanges = sum(turn.role == "user" for turn in conversation.turns)
    return f"the beginning-of-text token {exchanges} times" if exchanges > 1 else None


def _rewritten(conversation: Conversation) -> str | None:
    """The first trained turn that others follow."""
    earlier = (i for i, turn in enumerate(conversation.turns[:-1], 1) if turn.train)
    turn = next(earlier, None)
    return None if turn is None else f"turn {turn} has no honest mask: the chat template rewrites it once later turns"


def _moves_system(conversation: Conversation) -> str | None:
    """Mistral v0.3 puts the system message into the last question, and into those that say the same."""
    system, turns = _split(conversation)
    if system is None:
        return None
    exchanges = list(zip(turns[::2], turns[1::2], strict=True))
    last = exchanges[-1][0].content
    moved = (i for i, (user, answer) in enumerate(exchanges) if answer.train and user.content != last)
    number = next(moved, None)
    return None if number is None else f"turn {2 * number + 3} has no honest mask"


def _no_system(conversation: Conversation) -> str | None:
    return "System role not supported" if conversation.turns[0].role == "system" else None


_LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PHI_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_S, _E = "<s>", "</s>"

FAMILIES = {
    "llama-2": Family(("<unk>", _S, _E), _S, _E, LLAMA_2, _llama_2, _repeats_bos),
    "llama-3.1": Family(_LLAMA_3_TOKENS, _LLAMA_3_TOKENS[0], "<|eot_id|>", LLAMA_3, _llama_3),
    "mistral-v3": Family((_S, _E, "[INST]", "[/INST]"), _S, _E, MISTRAL_3, _mistral_3, _moves_system, pad=_E),
    "qwen-2.5": Family(_CHATML_TOKENS, None, "<|im_end|>", QWEN_25, _qwen_25, pad="<|endoftext|>"),
    "qwen-3": Family(_CHATML_TOKENS, None, "<|im_end|>", QWEN_3, _qwen_3, _rewritten, pad="<|im_end|>"),
    "gemma": Family(_GEMMA_TOKENS, "<bos>", "<eos>", GEMMA, _gemma, _no_system, pad="<pad>"),
    "phi-3": Family(_PHI_TOKENS, None, "<|endoftext|>", PHI_3, _phi_3, pad="<|endoftext|>"),
    "zephyr": Family(("<unk>", _S, _E), _S, _E, ZEPHYR, _zephyr, pad=_E),
    "deepseek-v3": Family(_DEEPSEEK_TOKENS, *_DEEPSEEK_TOKENS[:2], DEEPSEEK, _deepseek, pad=_DEEPSEEK_TOKENS[1]),
}


@cache
def _vocabulary(controls: tuple[str, ...]) -> str:
    tok = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tiny.LLAMA3_SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(controls), show_progress=False, initial_alphabet=alphabet
    )
    tok.train_from_iterator(tiny.TEXT * 4, trainer)
    return tok.to_str()


def make_tokenizer(
    folder: Path, controls: tuple[str, ...], bos: str | None, eos: str | None, **more: str | None
) -> ChatTokenizer:
    """A small tokenizer with these control tokens, saved by transformers into `folder` and loaded by us.

    `more`: pad, template.
    """
    named = {"bos_token": bos, "eos_token": eos, "pad_token": more.get("pad")}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary(controls)),
        **{name: token for name, token in named.items() if token is not None},
    )
    fast.chat_template = more.get("template")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def _alpaca(conversation: Conversation) -> list[Piece]:
    system, turns = _split(conversation)
    text = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    paired = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    pieces = [("<s>" if system is None else f"<s>{system}", False)]
    for number, turn in enumerate(turns):
        if turn.role == "user":
            first = "" if number or system is not None else paired if "\n\n### Input:\n" in turn.content else text
            pieces.append((f"{first}\n\n### Instruction:\n{turn.content}\n\n### Response:\n", False))
        else:
            pieces.append((f"{turn.content}</s>", turn.train))
    return pieces


def _llama3(conversation: Conversation) -> list[Piece]:
    pieces = [("<|begin_of_text|>", False)]
    for turn in conversation.turns:
        pieces.append((f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n", False))
        pieces.append((f"{turn.content.strip()}<|eot_id|>", turn.train))
    return pieces


def _mistral(conversation: Conversation, close: str) -> list[Piece]:
    system, turns = _split(conversation)
    pieces = [("<s>", False)]
    for number, turn in enumerate(turns):
        if turn.role == "user":
            first = "" if number or system is None else f"{system}\n\n"
            pieces.append((f"[INST] {first}{turn.content}{close}", False))
        else:
            pieces.append((f" {turn.content}</s>", turn.train))
    return pieces


def _human_assistant(conversation: Conversation) -> list[Piece]:
    system, turns = _split(conversation)
    pieces = [("<s>" if system is None else f"<s>{system}\n\n", False)]
    for turn in turns:
        if turn.role == "user":
            pieces.append((f"###Human: {turn.content}###Assistant:", False))
        else:
            pieces.append((f" {turn.content} ###</s>", turn.train))
    return pieces


def _contents(conversation: Conversation) -> list[Piece]:
    pieces = [("<s>", False)]
    for turn in conversation.turns:
        pieces.append((f"{turn.content}</s>" if turn.role == "assistant" else turn.content, turn.train))
    return pieces


_PLAIN = ("<unk>", _S, _E)
BUNDLED = {
    "alpaca": Family(_PLAIN, _S, _E, None, _alpaca, template="alpaca"),
    "alpaca, pad is eos": Family(_PLAIN, _S, _E, None, _alpaca, pad=_E, template="alpaca"),
    "llama3": Family(_LLAMA_3_TOKENS, _LLAMA_3_TOKENS[0], "<|end_of_text|>", None, _llama3, template="llama3"),
    "chatml": Family(_CHATML_TOKENS, None, _CHATML_TOKENS[0], None, lambda row: _chatml(row, None), template="chatml"),
    "mistral": Family(_PLAIN, _S, _E, None, lambda row: _mistral(row, " [/INST]"), pad=_E, template="mistral"),
    "mistral, [INST] a token": Family(
        (_S, _E, "[INST]", "[/INST]"), _S, _E, None, lambda row: _mistral(row, "[/INST]"), template="mistral"
    ),
    "human-assistant": Family(_PLAIN, _S, _E, None, _human_assistant, template="human-assistant"),
    "text": Family(_PLAIN, _S, _E, None, _contents, template="text"),
}


def tokenizer_of(family: Family, folder: Path) -> ChatTokenizer:
    """The family's tokenizer, with its chat template if it has one, in `folder`."""
    return make_tokenizer(folder, family.controls, family.bos, family.eos, pad=family.pad, template=family.source)
